"""The contrastive losses over one rank or many, under open_clip's names.

There is one distributed mode, which is always exact: ``shard.py``. A rank returns its part of the loss times the number of
ranks, so the average of the parameters' gradients, as DistributedDataParallel takes it, is exactly the gradient of the loss
of the whole batch. With equal shares the returned loss is the mean over the rank's own pairs. Shares may differ and be
empty. The maths is in ``clipcore.kernels.contrastive`` and ``clipcore.kernels.sigmoid``.

==================  ================================================================
``clip.py``         ``ClipLoss``
``siglip.py``       ``SigLipLoss``
``distill.py``      ``DistillClipLoss``
``soft_targets.py`` what a teacher's probabilities say that the logits should be
``options.py``      the arguments that both share
``shard.py``        a rank's part of the logits
``all_gather.py``   gathers the rows of every rank, and sums their gradients
``wire.py``         what a rank sends for that, and its check
``exchange.py``     the gather in PyTorch alone, where the extension is not built
==================  ================================================================
"""

from clipcore.loss.clip import ClipLoss
from clipcore.loss.distill import DistillClipLoss
from clipcore.loss.siglip import SigLipLoss

__all__ = ["ClipLoss", "DistillClipLoss", "SigLipLoss"]
