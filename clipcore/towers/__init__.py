"""CLIP's two towers, from their parts to a whole model, and readers of other people's weights.

==========================  ================================================================
``architectures.py``        the shapes of the models, by name and by description
``open_clip_models.py``     the models of open_clip, in the layout of its files
``modules.py``              the towers' parts: they hold parameters and call kernels
``compiled.py``             a transformer block in torch's operators, for a compiler
``vision.py``               the Vision Transformer
``pooling_head.py``         SigLIP's attention pooling
``resnet.py``               the ResNet
``text.py``                 the text tower
``intermediates.py``        the outputs of single blocks
``model.py``                CLIP
``loading.py``              loads weights into a CLIP, or makes the CLIP that they belong to
``lora.py``                 matrices of low rank beside frozen weights
``interpolation.py``        the model between two states of one
``factory.py``              the functions that make models, as in open_clip
``openai.py``               the `load` of OpenAI's package, and a model with its call
``open_clip_arguments.py``  open_clip's arguments that clipcore lacks: accepted or refused
``published.py``            what an installed open_clip knows of published weights, and of ImageNet's names
``weights.py``              reads files of weights of every origin into tensors by name
``torchscript.py``          TorchScript archives, read without TorchScript
``convert.py``              converts the tensor names of other packages to open_clip's
``descriptions.py``         reads the description files beside weights
``layouts.py``              writes weights and descriptions for other packages
==========================  ================================================================
"""
