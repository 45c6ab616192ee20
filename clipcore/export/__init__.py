"""Write a model for other packages: ``python -m clipcore.export RUN_OR_FILE --to open_clip OUT``.

========================  ================================================================
``__main__.py``           the command line
``write.py``              a folder, written aside and checked before it gets its name
``interpolations.py``     the models between a run's first weights and its last
``vocabulary.py``         the tokenizer files of transformers
``onnx_towers.py``        the towers as ONNX
``check.py``              loads what was written, by clipcore and by the package that it is for
========================  ================================================================
"""

from clipcore.export.write import TARGETS, export_model

__all__ = ["TARGETS", "export_model"]
