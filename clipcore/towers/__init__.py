"""CLIP's two towers, from their parts to a whole model, and the weights that other people wrote for them.

==========================  ================================================================
``architectures.py``        the shapes of the models, under open_clip's names
``modules.py``              the towers' parts: they hold parameters and call kernels
``vision.py``               the Vision Transformer
``resnet.py``               the ResNet
``text.py``                 the text tower
``model.py``                CLIP, and the functions that make or load one
``open_clip_arguments.py``  open_clip's arguments that clipcore lacks: taken or refused by name
``weights.py``              files of weights of every origin, to tensors by name
``torchscript.py``          TorchScript archives, read without TorchScript
``convert.py``              the names of tensors in other packages, and open_clip's
``descriptions.py``         what the files beside weights say about their model
==========================  ================================================================
"""
