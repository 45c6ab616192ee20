"""Write features of any number of images or captions to a file: ``python -m clipcore.features DATA --out X.npy``.

====================  ================================================================
``__main__.py``       the command
``arguments.py``      its flags
``inputs.py``         opens files, folders, shards and tables as images or captions
``encode.py``         encodes them, batch by batch
``write.py``          ``write_features``: all of it
``row_file.py``       the file, which a killed process leaves so that the next one goes on with it
====================  ================================================================
"""
