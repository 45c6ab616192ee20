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
FLOP). "stash" keeps each logit in 16 bits, fixed-point between the least and greatest of its tile, and needs 3 (6 B G
E). The error of a stashed logit is at most scale / 65,536 and typically a quarter of that; sums and gradients use the
same stored values. On the CPU a stash holds exponentials in float32 and changes no bit. `plan` chooses and says why.

Precision: logits.py. Logits, exponentials and sums are float32. The gradient of a block is complete, the positives
taken off, before it is rounded to the operand dtype; it is stored over its largest upstream gradient, times 2^13 in
float16, so that probabilities down to 1e-8 are normal numbers.
Traffic per logit: library engine 8 bytes forward, 14 backward (stash: 10 and 8), fused engine 0 and 6 (stash 2 and 8),
for 16-bit operands, plus the operands once a block.
Determinism: no atomics; partial sums are written and added in a fixed order.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3. Single-pass sums with a fixed offset are also in
MemoryEfficientCLIP (whose offset fails at scale 100), blocks with two library products in Liger-Kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import logits, tiles
from clipcore.kernels.contrastive_cpu import contrastive_bwd_cpu, contrastive_fwd_cpu
from clipcore.kernels.contrastive_problem import Problem, Targets
from clipcore.kernels.contrastive_triton import (
    ENGINE_TABLE,
    contrastive_bwd_triton,
    contrastive_fwd_triton,
    packed_shapes,
)
from clipcore.kernels.logits import LOG2E, Pairs
from clipcore.kernels.normalize import normalize_ref

# A stash larger than this is recomputed instead, unless the caller allows more.
STASH_BYTES = 2**30


class ContrastiveTerms(NamedTuple):
    """What the loss is made of, each differentiable; float64, since the losses are small differences of them."""

    row_lse_B: Tensor  # log-sum-exp of each image's logits over the texts
    column_lse_G: Tensor  # of each text's logits over these images
    row_target_B: Tensor  # mean logit of each image's target; of no meaning where it has none
    column_target_G: Tensor  # of each text's target, the part of these images


class Plan(NamedTuple):
    """How a problem will be computed; `str` says so in one line."""

    shape: tuple[int, int, int]  # B, G, E
    operand: torch.dtype
    device: str
    engine: str
    backward: bool
    stash: bool
    stash_bytes: int  # what a stash takes
    budget_bytes: int  # what it may take

    def __str__(self) -> str:
        B, G, E = self.shape
        mode = f"{'stash' if self.stash else 'recompute'}, {3 if self.stash else 4} products"
        why = "fits" if self.stash else "is more than"
        return (
            f"contrastive loss of {B:,} x {G:,} x {E} on {self.device}: "
            f"{mode if self.backward else 'forward only, 1 product'} in "
            f"{str(self.operand).removeprefix('torch.')}, {self.engine} engine; a stash of "
            f"{self.stash_bytes / 2**20:,.1f} MiB {why if self.backward else 'is not needed under'} "
            f"the budget of {self.budget_bytes / 2**20:,.1f} MiB"
        )


def contrastive_ref(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = False,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The reference: the loss by the B x G matrix, in the promoted dtype of the embeddings, differentiable."""
    dtype = torch.promote_types(image_BE.dtype, text_GE.dtype)
    x_BE, y_GE = image_BE.to(dtype), text_GE.to(dtype)
    if normalize:
        x_BE, y_GE = normalize_ref(x_BE), normalize_ref(y_GE)
    z_BG = scale * x_BE @ y_GE.T
    B, G = z_BG.shape
    label_BG = torch.zeros(B, G, dtype=torch.bool, device=z_BG.device)
    label_BG.diagonal(first_label).fill_(True)
    valid_BG, positive_BG = torch.ones_like(label_BG), label_BG
    if image_ids is not None and text_ids is not None:
        same_BG = image_ids[:, None] == text_ids
        if same_id == "positive":
            positive_BG = same_BG
        else:
            valid_BG = label_BG | ~same_BG
    return (
        _cross_entropy_ref(z_BG, valid_BG, positive_BG, label_smoothing)
        + _cross_entropy_ref(z_BG.T, valid_BG.T, positive_BG.T, label_smoothing)
    ) / 2


def _cross_entropy_ref(z: Tensor, valid: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of the rows that have a positive."""
    rows = positive.any(1)
    z, valid, positive = z[rows], valid[rows], positive[rows]
    log_p = z.masked_fill(~valid, -torch.inf).log_softmax(1).masked_fill(~valid, 0)
    positive, valid = positive.to(z.dtype), valid.to(z.dtype)
    target = (1 - smoothing) * positive / positive.sum(1, keepdim=True)
    target = target + smoothing * valid / valid.sum(1, keepdim=True)
    return -(target * log_p).sum(1).mean()


# Operators.


@torch.library.custom_op("clipcore::contrastive_fwd", mutates_args=())
def _contrastive_fwd(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(
        *(image_BE, text_GE, scale, Pairs(image_ids, text_ids, first_label, same_id), normalized),
        *(operand, engine, workspace_bytes, Targets(*target_weights) if target_weights else None),
    )
    forward = contrastive_fwd_triton if image_BE.is_cuda else contrastive_fwd_cpu
    with tiles.on_device(image_BE.device):
        return forward(problem, stash)  # type: ignore[return-value]


@_contrastive_fwd.register_fake
def _(image_BE: Tensor, text_GE: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    stash = arguments[-1]
    B, G = image_BE.shape[0], text_GE.shape[0]
    on_cpu = image_BE.device.type == "cpu"
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    shape, range_shape, dtype = ((B, G), (0, 0, 2), wide) if on_cpu else packed_shapes(B, G)
    if not stash:
        shape, range_shape = (0, 0), (0, 0, 2)
    return (
        *(image_BE.new_empty(length, dtype=torch.float64) for length in (B, G, B, G, B, G, B, G)),
        image_BE.new_empty(shape, dtype=dtype),
        image_BE.new_empty(range_shape, dtype=torch.float32),
    )


@torch.library.custom_op("clipcore::contrastive_bwd", mutates_args=())
def _contrastive_bwd(
    upstream: list[Tensor],
    terms: list[Tensor],
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if 0 in (len(image_BE), len(text_GE)):  # no logits, and sums whose logarithms are -inf
        return (
            image_BE.new_zeros(image_BE.shape if need_image else 0),
            text_GE.new_zeros(text_GE.shape if need_text else 0),
            torch.zeros_like(scale),
        )
    problem = Problem(
        *(image_BE, text_GE, scale, Pairs(image_ids, text_ids, first_label, same_id), normalized),
        *(operand, engine, workspace_bytes, Targets(*target_weights) if target_weights else None),
    )
    backward = contrastive_bwd_triton if image_BE.is_cuda else contrastive_bwd_cpu
    with tiles.on_device(image_BE.device):
        return backward(problem, upstream, terms, (need_image, need_text))


@_contrastive_bwd.register_fake
def _(
    upstream: list[Tensor],
    terms: list[Tensor],
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_image, need_text = arguments[-2:]
    return (
        image_BE.new_empty(image_BE.shape if need_image else (0,)),
        text_GE.new_empty(text_GE.shape if need_text else (0,)),
        scale.new_empty(scale.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image_BE, text_GE, scale, image_ids, text_ids, target_weights, *settings, _ = inputs
    row_lse, column_lse, _, _, *rest = output
    ctx.save_for_backward(
        *(image_BE, text_GE, scale, row_lse, column_lse, *rest, image_ids, text_ids),
        *target_weights,
    )
    ctx.settings = settings
    # The gradient of the stash that nobody asks for would be as large as the stash.
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    tiles.check_first_order("contrastive_loss")
    image_BE, text_GE, scale, *terms, image_ids, text_ids = ctx.saved_tensors[:13]
    target_weights = list(ctx.saved_tensors[13:])
    row_lse, column_lse = terms[:2]
    upstream = [
        torch.zeros_like(like) if grad is None else grad.to(like.dtype).contiguous()
        for grad, like in zip(grads[:4], (row_lse, column_lse) * 2, strict=True)
    ]
    need_image, need_text, need_scale = ctx.needs_input_grad[:3]
    found = _contrastive_bwd(
        *(upstream, terms, image_BE, text_GE, scale, image_ids, text_ids, target_weights),
        *ctx.settings,
        *(need_image, need_text),
    )
    needed = (need_image, need_text, need_scale)
    gradients = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    # One entry for each input, and for the list of targets one for each of its own.
    rest: list[Any] = [None] * (ctx.num_inputs - 3)
    rest[2] = [None] * len(target_weights)
    return (*gradients, *rest)


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)
tiles.register_autocast("contrastive_fwd", num_operands=0)
tiles.register_autocast("contrastive_bwd", num_operands=0)


# The public functions.


def plan(
    image_BE: Tensor,
    text_GE: Tensor,
    *,
    stash_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
    backward: bool = True,
) -> Plan:
    """How `contrastive_terms` will compute a problem: which engine, with a stash or without, and why.

    The rule: a stash where a backward follows and the stash is at most `stash_bytes` (1 GiB by default); the engine
    that was measured to be faster for the chip, width and operands, and the library's where neither was. A GPU's stash
    rounds the logits of float32 operands to 16 bits: for those there is one only where `stash_bytes` asks for it.
    """
    B, E = image_BE.shape
    G = text_GE.shape[0]
    operand = logits.operand_dtype(image_BE, text_GE, operand_dtype)
    on_cpu = not image_BE.is_cuda
    budget = stash_bytes
    if budget is None:
        budget = STASH_BYTES if on_cpu or operand.itemsize == 2 else 0
    shape, dtype = ((B, G), operand) if on_cpu else packed_shapes(B, G)[::2]
    needed = shape[0] * shape[1] * dtype.itemsize
    if not on_cpu and engine is None:
        key = (tiles.architecture(image_BE.device), E, 8 * operand.itemsize)
        engine = ENGINE_TABLE.get(key, "library")
    stash = backward and 0 < needed <= budget
    device = image_BE.device.type
    return Plan(*((B, G, E), operand, device, engine or "library", backward, stash, needed, budget))


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
    stash_bytes: int | None = None,
    workspace_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
) -> ContrastiveTerms:
    """Log-sum-exp and target logit of each image over the texts and of each text over the images.

    What a loss over one rank or many is made of; `contrastive_loss` is the one over one rank. Differentiable once in
    both embeddings and the scale. The arguments are those of `contrastive_loss`, but for:

    Args:
        targets: how each row's and each column's target spreads; None puts it on the pair's own column.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
    """
    logits.check_embeddings(image_BE, text_GE, operand_dtype, engine)
    Pairs(image_ids, text_ids, first_label, same_id).check(image_BE, text_GE)
    scale = tiles.as_scalar("scale", scale, image_BE, text_GE)
    # "ignore" alone only takes pairs out: a positive is still known by its place.
    if image_ids is not None and same_id == "positive" and targets is None:
        targets = uniform_targets(image_BE, text_GE, first_label, image_ids, text_ids, same_id, 0.0)
    # Kernels read ids and weights one after the other.
    image_ids, text_ids = (
        None if ids is None else ids.contiguous() for ids in (image_ids, text_ids)
    )
    targets = None if targets is None else Targets(*(weight.contiguous() for weight in targets))
    logits.check_no_tangent("contrastive_terms", image_BE, text_GE, scale)
    wants_grad = image_BE.requires_grad or text_GE.requires_grad or scale.requires_grad
    chosen = plan(
        *(image_BE, text_GE),
        stash_bytes=stash_bytes,
        operand_dtype=operand_dtype,
        engine=engine,
        backward=wants_grad and torch.is_grad_enabled(),
    )
    if workspace_bytes is None:
        workspace_bytes = logits.WORKSPACE_BYTES["cuda" if image_BE.is_cuda else "cpu"]
    row_lse, column_lse, row_target, column_target, *_ = torch.ops.clipcore.contrastive_fwd(
        *(image_BE, text_GE, scale, image_ids, text_ids, list(targets or ()), first_label, same_id),
        *(not normalize, chosen.operand, chosen.engine, workspace_bytes, chosen.stash),
    )
    # The operation counts in powers of two.
    powers = (row_lse, column_lse, row_target, column_target)
    return ContrastiveTerms(*(power / LOG2E for power in powers))


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
    """InfoNCE of images and texts, the mean of both directions, without the B x G matrix.

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
        stash_bytes: the most that a stash may take (module docstring); 0 always recomputes. Default 1 GiB, and 0 for
            float32 operands on a GPU, whose logits a stash rounds to 16 bits.
        workspace_bytes: what a GPU may hold for a block, its operands and the sum of its rows' gradients, and the CPU
            for a block. Default 512 MB on CUDA, 64 MiB on the CPU. Not in it: about 150 bytes a row and column, 4 G E
            bytes for the sum of text gradients of 16 bits, and on the CPU rows of length one and their gradients in
            float32.
        operand_dtype: what a GPU multiplies. Default float32 for float32 embeddings outside autocast, else float16.
            The CPU multiplies in float32 (float64 for float64) in any case.
        engine: "library" or "fused" on a GPU (logits.py). Default as measured.

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
    logits.check_embeddings(image_BE, text_GE, operand_dtype, engine)
    Pairs(image_ids, text_ids, first_label, same_id).check(image_BE, text_GE)
    B, G = image_BE.shape[0], text_GE.shape[0]
    rows = slice(max(0, -first_label), min(B, G - first_label))
    columns = slice(rows.start + first_label, rows.stop + first_label)
    by_id = image_ids is not None and same_id == "positive"
    if rows.stop <= rows.start and not by_id:
        raise ValueError(f"no image of {B} has a text among {G} with first_label {first_label}")
    targets = None
    if by_id or label_smoothing > 0:
        targets = uniform_targets(
            image_BE, text_GE, first_label, image_ids, text_ids, same_id, label_smoothing
        )
    terms = contrastive_terms(
        *(image_BE, text_GE, scale),
        normalize=normalize,
        first_label=first_label,
        image_ids=image_ids,
        text_ids=text_ids,
        same_id=same_id,
        targets=targets,
        stash_bytes=stash_bytes,
        workspace_bytes=workspace_bytes,
        operand_dtype=operand_dtype,
        engine=engine,
    )
    row_loss_B = terms.row_lse_B - terms.row_target_B
    column_loss_G = terms.column_lse_G - terms.column_target_G
    if by_id:
        assert targets is not None
        row_loss = _mean_where(row_loss_B, targets.row_positive_B > 0)
        column_loss = _mean_where(column_loss_G, targets.column_positive_G > 0)
    else:
        row_loss, column_loss = row_loss_B[rows].mean(), column_loss_G[columns].mean()
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    return ((row_loss + column_loss) / 2).to(wide)


def _mean_where(values_N: Tensor, chosen_N: Tensor) -> Tensor:
    """The mean of the chosen, whatever the others are (NaN if none is chosen)."""
    return torch.where(chosen_N, values_N, 0.0).sum() / chosen_N.sum()


def uniform_targets(
    image_BE: Tensor,
    text_GE: Tensor,
    first_label: int,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    same_id: str,
    label_smoothing: float,
) -> Targets:
    """Targets spread evenly over a row's positives, and a share of `label_smoothing` over its valid columns."""
    B, G = image_BE.shape[0], text_GE.shape[0]
    # A third in float32 would shift a target of 100 by 3e-6, for all rows alike.
    wide = torch.float64
    # Positives and valid columns of each image, and of each text its positives and valid rows.
    counts = [image_BE.new_ones(length, dtype=wide) for length in (B, G)]
    valid = [image_BE.new_full((length,), other, dtype=wide) for length, other in ((B, G), (G, B))]
    if image_ids is not None and text_ids is not None:
        same = count_equal(image_ids, text_ids), count_equal(text_ids, image_ids)
        if same_id == "positive":
            counts = [count.to(wide) for count in same]
        else:
            own = (
                _equal_to_partner(image_ids, text_ids, first_label),
                _equal_to_partner(text_ids, image_ids, -first_label),
            )
            valid = [
                number - (count - by_position)
                for number, count, by_position in zip(valid, same, own, strict=True)
            ]
    row, column = (
        spread_evenly(count, number, label_smoothing)
        for count, number in zip(counts, valid, strict=True)
    )
    return Targets(*row, *column)


def spread_evenly(
    positives_N: Tensor, valid_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Weights of a positive and of any valid pair of rows that have so many of them; 0 where there are none."""
    return (
        torch.where(positives_N > 0, (1 - label_smoothing) / positives_N, 0.0),
        torch.where(valid_N > 0, label_smoothing / valid_N, 0.0),
    )


def count_equal(ids_N: Tensor, others_M: Tensor) -> Tensor:
    """int64 [N]: how many of the others equal each id, in O((N + M) log M)."""
    ordered_M = others_M.sort().values
    ids_N = ids_N.contiguous()
    last = torch.searchsorted(ordered_M, ids_N, right=True)
    return last - torch.searchsorted(ordered_M, ids_N)


def _equal_to_partner(ids_N: Tensor, others_M: Tensor, first_label: int) -> Tensor:
    """int64 [N]: 1 where the partner by position exists and has the same id."""
    N, M = ids_N.shape[0], others_M.shape[0]
    equal_N = torch.zeros_like(ids_N)
    start, stop = max(0, -first_label), min(N, M - first_label)
    if start < stop:
        partners = others_M[start + first_label : stop + first_label]
        equal_N[start:stop] = (ids_N[start:stop] == partners).to(ids_N.dtype)
    return equal_N


def check_label_smoothing(label_smoothing: float) -> None:
    """ValueError unless it is a share of a target that leaves some."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing has to be in [0, 1), got {label_smoothing}")
