"""InfoNCE of image and text embeddings: both directions from one similarity, in bounded memory, without atomics.

Legend: B image rows (of this rank), G text rows (of all), E embedding size, R and C rows and columns of a block.

    z_bg   = scale * <x_b, y_g>                         x, y = image and text rows, over their lengths if asked
    r_b    = log sum_g exp(z_bg)                        c_g = log sum_b exp(z_bg), over valid pairs
    t_b    = sum_g T_bg z_bg                            u_g = sum_b U_bg z_bg, the logits of what should be found
    loss   = 1/2 [mean_b (r_b - t_b) + mean_g (c_g - u_g)] over the rows and columns that have a positive
    dz_bg  = dr_b exp(z_bg - r_b) + dc_g exp(z_bg - c_g) + dt_b T_bg + du_g U_bg
    dx     = scale dz y,     dy = scale dz^T x,     dscale = sum_bg dz_bg <x_b, y_g>

T and U spread a row's and a column's target: all on the pair's own column (plain), evenly on the columns of equal id
("positive"), and a share `label_smoothing` of it evenly on every valid column. With ids in mode "ignore" a pair of
equal ids that is not the row's own is no valid pair: it counts neither as positive nor as negative.

The operation returns r, c, t, u and differentiates them; the loss is a few sums of them (`contrastive_loss`), and over
several ranks `clipcore.loss` completes c first.

Sums: with a fixed offset o, 0 up to scale 70 and scale - 70 beyond, the one exponential exp(z - o) serves r and c at
once: |cosine| <= 1 keeps it below e^70, so that 2^24 rows of them fit in float32, and cosines down to -0.57 at scale
100 stay normal numbers. In powers of two o is an integer, so that z - o is exact.
A positive that is known by its place (no smoothing, no ids or "ignore") stays out of the sums; its exponential is added
in float64, so that the loss and 1 - P of a pair that is found with near certainty keep their relative accuracy.
Every row's and column's sum is checked on the device. Where one is too small to be exact, or too large (scale above
100, rows that are not of length one), a running maximum sums it again, from the operands or the stash that everything
else uses; it then has an offset of its own, and the backward takes two exponentials. All others keep their bits. On the
CPU such rows and columns are computed in float64. No host synchronisation on a GPU; a kernel that is not needed returns
at once.

Memory: "recompute" holds one block of logits and makes the similarity again in the backward: 4 products (8 B G E
FLOP). "stash" keeps each logit in 16 bits, fixed-point between the least and greatest of its row segment, and needs 3 (6 B G
E). The error of a stashed logit is at most scale / 65,536 and typically a quarter of that; sums and gradients use the
same stored values. On the CPU a stash holds exponentials in float32 and changes no bit. "dense" keeps a small matrix on
a GPU in float32, as the library gave it, and needs 3 products too. `plan` chooses and says why.

Precision: ``clipcore.kernels.logits``. Logits, exponentials and sums are float32. The gradient of a block is complete,
the positives taken off, before it is rounded to the operand dtype; it is stored over its largest upstream gradient, times
2^13 in float16, so that probabilities down to 1e-8 are normal numbers.
Traffic per logit: library engine 8 bytes forward, 14 backward (stash: 10 and 8), fused engine 0 and 6 (stash 2 and 8),
for 16-bit operands, plus their reads by each block.
Determinism: no atomics; partial sums are written and added in a fixed order.

Files: ``reference.py`` the reference, ``targets.py`` T and U, ``kernels.py`` the Triton kernels that multiply,
``sums_pass.py`` and ``gradient_pass.py`` those that pass over a block in memory, ``fixed_point.py`` the stash's numbers,
``launches.py`` how they are launched, ``planning.py`` the choice of a plan, ``budget.py`` what a stash may take,
``gpu.py`` and ``cpu.py`` the walks, ``sums.py`` what their sums become, ``sums_gpu.py`` and ``vector_kernels.py`` the same
on a GPU, ``mean_gpu.py`` and ``mean_kernels.py`` their mean, ``running_max_*.py`` the sums that a fixed offset cannot
hold, ``operator.py`` and ``mean.py`` PyTorch's side, and here the public functions.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3. Single-pass sums with a fixed offset are also in
MemoryEfficientCLIP (whose offset fails at scale 100), blocks with two library products in Liger-Kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.budget import default_stash_bytes
from clipcore.kernels.contrastive.mean import contrastive_mean
from clipcore.kernels.contrastive.operator import contrastive_outputs
from clipcore.kernels.contrastive.planning import Plan, plan, plan_for
from clipcore.kernels.contrastive.reference import contrastive_ref
from clipcore.kernels.contrastive.sums import Outputs, counted_rows
from clipcore.kernels.contrastive.targets import Targets, check_label_smoothing, uniform_targets
from clipcore.kernels.logits.pairs import LOG2E, LossInputs, Pairs, checked_inputs

__all__ = [
    "ContrastiveTerms",
    "Plan",
    "Targets",
    "contrastive_loss",
    "contrastive_ref",
    "contrastive_terms",
    "default_stash_bytes",
    "plan",
]


class ContrastiveTerms(NamedTuple):
    """What the loss is made of, each differentiable; float64, since the losses are small differences of them."""

    row_lse_B: Tensor  # log-sum-exp of each image's logits over the texts
    column_lse_G: Tensor  # of each text's logits over these images
    row_target_B: Tensor  # mean logit of each image's target; of no meaning where it has none
    column_target_G: Tensor  # of each text's target, the part of these images


def contrastive_terms(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = True,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    targets: Targets | None = None,
    stash: bool | None = None,
    stash_bytes: int | None = None,
    workspace_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
) -> ContrastiveTerms:
    """Return the log-sum-exp and the target logit of each image over the texts and of each text over the images.

    What a loss over one rank or many is made of; `contrastive_loss` is the one over one rank. Differentiable once in
    both embeddings and the scale. The arguments are those of `contrastive_loss`, but for:

    Args:
        targets: how each row's and each column's target spreads; None puts it on the pair's own column.
        stash: whether logits are kept for a backward, as decided for a larger problem that this is a part of
            [as `plan` says for this one].

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
    """
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    inputs = checked_inputs(
        image_BE,
        text_GE,
        scale,
        pairs,
        operation="contrastive_terms",
        normalize=normalize,
        workspace_bytes=workspace_bytes,
        operand_dtype=operand_dtype,
        engine=None if engine == "dense" else engine,
    )
    # "ignore" alone only takes pairs out: a positive is still known by its place.
    if image_ids is not None and same_id == "positive" and targets is None:
        targets = uniform_targets(image_BE, text_GE, pairs, 0.0)
    outputs = _outputs(inputs, targets, stash, stash_bytes, engine)
    # The operation counts in powers of two.
    return ContrastiveTerms(
        row_lse_B=outputs.row_lse_log2_B / LOG2E,
        column_lse_G=outputs.column_lse_log2_G / LOG2E,
        row_target_B=outputs.row_target_log2_B / LOG2E,
        column_target_G=outputs.column_target_log2_G / LOG2E,
    )


def _outputs(
    inputs: LossInputs,
    targets: Targets | None,
    stash: bool | None,
    stash_bytes: int | None,
    engine: str | None,
) -> Outputs:
    """Return the operation's outputs for checked inputs."""
    image_BE, text_GE, scale = inputs.image_BE, inputs.text_GE, inputs.scale
    wants_grad = image_BE.requires_grad or text_GE.requires_grad or scale.requires_grad
    backward = wants_grad and torch.is_grad_enabled()
    # What was decided for a larger problem is not decided again.
    budget = stash_bytes if stash is None else 0
    chosen = plan_for(image_BE, len(text_GE), inputs.operand, budget, engine, backward)
    is_stash = chosen.stash
    if stash is not None:
        is_stash = backward and stash and chosen.engine != "dense" and chosen.stash_bytes > 0

    return contrastive_outputs(
        inputs._replace(engine=chosen.engine),
        None if targets is None else targets.contiguous(),
        is_stash,
    )


def contrastive_loss(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = True,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0.0,
    stash_bytes: int | None = None,
    workspace_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
) -> Tensor:
    """Return InfoNCE of images and texts, the mean of both directions, without the B x G matrix.

    Image row b and text row `first_label + b` are a pair. Rows of either side without a partner are extra negatives of
    the other side. Each direction is the mean over its rows that have a positive.

    Args:
        image_BE: [B, E] float16, bfloat16 or float32 (float64 on the CPU), E at most 8192 on CUDA.
        text_GE: [G, E], same device.
        scale: what the cosine is multiplied with: a number or a tensor of one element (exp of CLIP's logit_scale).
        normalize: divide rows by their lengths; False takes them as they are, for embeddings of length one. Rows
            shorter than 1e-12 have cosine 0 to everything and gradient 0.
        first_label: column of the first image's pair; may be negative.
        image_ids, text_ids: int64 [B] and [G], both or none. Equal ids mark what belongs together, such as the hash
            of a caption.
        same_id: "ignore" leaves pairs of equal ids out unless they are a pair by position (false negatives);
            "positive" makes them positives, which share the row's target evenly, and position means nothing.
        label_smoothing: in [0, 1): this share of every target goes evenly to all valid columns of its row.
        stash_bytes: the most that a stash may take (module docstring); 0 always recomputes. Default 1 GiB on the CPU; on a
            GPU at most an eighth of what is free at the first call of the process, decided then and kept
            (``default_stash_bytes``), and 0 for float32 operands, whose logits a stash rounds to 16 bits. See `engine`
            for small matrices.
        workspace_bytes: what a GPU may hold for a block, its operands and the sum of its rows' gradients, and the CPU
            for a block. Default 512 MB on CUDA, 64 MiB on the CPU. Not in it: about 150 bytes a row and column, 4 G E
            bytes for the sum of text gradients of 16 bits, the operands of all texts on a GPU unless it is below the
            default (2 G E bytes, none where the texts can be multiplied as they are), and on the CPU rows of length one
            and their gradients in float32.
        operand_dtype: what a GPU multiplies. Default float32 for float32 embeddings outside autocast, else float16.
            The CPU multiplies in float32 (float64 for float64) in any case.
        engine: "library" or "fused" on a GPU (``clipcore.kernels.logits``), default as measured; or "dense", which is the
            default up to 4,096 rows and columns where `stash_bytes` is not given: the matrix of products is kept in float32.

    Returns:
        A scalar, float32 (float64 for float64 on the CPU); NaN, the mean over nothing, where same_id="positive" finds no
        equal ids (the host does not wait for a GPU to learn it).

    Raises:
        ValueError: shapes, dtypes, devices, ids or ranges do not fit, or `first_label` leaves no pair.
        RuntimeError: forward-mode differentiation, which the operation does not have.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; several positives as in UniCL (arXiv 2204.03610).

    >>> import torch
    >>> contrastive_loss(torch.eye(2), torch.eye(2), 10.0)
    tensor(4.5399e-05)
    """
    check_label_smoothing(label_smoothing)
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    inputs = checked_inputs(
        image_BE,
        text_GE,
        scale,
        pairs,
        operation="contrastive_loss",
        normalize=normalize,
        workspace_bytes=workspace_bytes,
        operand_dtype=operand_dtype,
        engine=None if engine == "dense" else engine,
    )
    B, G = len(image_BE), len(text_GE)
    by_id = image_ids is not None and same_id == "positive"
    rows, _ = counted_rows(B, G, [], first_label)
    if rows.stop <= rows.start and not by_id:
        raise ValueError(f"no image of {B} has a text among {G} with first_label {first_label}")

    targets = None
    if by_id or label_smoothing > 0:
        targets = uniform_targets(image_BE, text_GE, pairs, label_smoothing)
    outputs = _outputs(inputs, targets, None, stash_bytes, engine)

    # By id a row has a positive where one has a weight, else where it has a partner.
    weights = []
    if by_id:
        assert targets is not None
        weights = [targets.row_positive_B, targets.column_positive_G]
    wide = launch.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    return contrastive_mean(outputs, weights, first_label, wide)
