"""The contrastive losses over one rank or many, under open_clip's names.

One distributed mode, which is always right: ``shard.py``. What a rank returns is its part of the loss times the number of
ranks, so that averaging the parameters' gradients, as DistributedDataParallel does, gives exactly the gradient of the
loss of the whole batch. With equal shares it is the mean over the rank's own pairs. Shares may differ and be empty. The
maths is in ``clipcore.kernels.contrastive`` and ``clipcore.kernels.sigmoid``.

==================  ================================================================
``clip.py``         ``ClipLoss``
``siglip.py``       ``SigLipLoss``
``options.py``      the arguments that both have
``shard.py``        a rank's part of the logits
``all_gather.py``   rows of every rank, and their gradients back
==================  ================================================================
"""

from clipcore.loss.clip import ClipLoss
from clipcore.loss.siglip import SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
