"""Name what is in images: ``python -m clipcore.classify IMAGE... --labels "a, b, c" --checkpoint RUN``.

=====================  ================================================================
``__main__.py``        the command
``arguments.py``       its flags
``labels.py``          the names, from the command line or from a file
``images.py``          finds the images and reads them, a batch at a time
``classification.py``  the best names of each image
``output.py``          the table, the summary, and files of csv and JSON
=====================  ================================================================
"""
