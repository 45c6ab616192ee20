"""AdamW in one pass over all parameters, with moments that may be bfloat16, rounded without bias.

Legend: T tensors of a call. For every element, with t steps done including this one:

    g  = grad * grad_scale                          grad_scale on the device, as clipping gives it
    m  = m + (1 - beta1) (g - m)                    v = beta2 v + (1 - beta2) g^2
    p  = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

Precision: float32 throughout, with IEEE division and square root; p is updated from m and v before they are rounded.
bfloat16 keeps 8 bits. Rounded to nearest, a moment would stand still as soon as its change is under 1/512 of it, which
for beta2 = 0.999 is always. Stochastic rounding rounds up with a probability equal to the fraction that it cuts off, so
the mean over steps is exact: 16 random bits are added below the last kept one. bfloat16 parameters are rounded so too.
The shadow, a bfloat16 copy of float32 parameters for the next forward pass, is rounded to nearest.

Random bits: Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011), of key `seed` and counter
(element group, purpose, step, stream). An element is identified by its place in the whole tensor, so that a resumed
run, a tensor split among ranks and both devices draw the same bits.
Traffic a parameter: float32 moments 28 bytes, bfloat16 ones 20; 2 more for a shadow. About 45 FLOPs with bfloat16, 15
without. Floor: its bytes over the memory bandwidth. One launch serves all tensors, whose addresses lie in a table: a
CLIP has hundreds of tensors, most of them too small for a launch of their own. Determinism: elements are independent.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); Gupta et al. 2015 (arXiv 1502.02551) for stochastic rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from clipcore import native
from clipcore.kernels import launch
from clipcore.kernels.launch import tl, triton

# Elements of a whole tensor that one program updates, and words of a Philox block: element e of a chunk takes word
# e // 1024 of block e % 1024. Another size would give a resumed run other bits.
CHUNK = 4096
WORDS = 4
ROUNDS = 7
MOMENTS, WEIGHTS = 0, 1  # the purposes of random bits
# Elements that the reference updates at once on the CPU, so that they stay in its cache.
CPU_ELEMENTS = 64 * CHUNK


class Update(NamedTuple):
    """One tensor's part of a call, all of one shape, contiguous.

    Attributes:
        param: float32, or bfloat16 without another copy.
        grad: any floating-point type.
        exp_avg, exp_avg_sq: m and v, both float32 or both bfloat16.
        shadow: bfloat16, receives the rounded parameter.
        stream: the tensor's number among those that share a seed.
        first: where in the whole tensor this part begins, for a tensor that is split.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    shadow: Tensor | None = None
    stream: int = 0
    first: int = 0


class Factors(NamedTuple):
    """The numbers of a step that are the same for all elements."""

    decay: float
    coefficient1: float  # 1 - beta1
    beta2: float
    coefficient2: float
    step_size: float
    root_correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float

    @classmethod
    def of(
        cls, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
    ) -> Factors:
        return cls(
            decay=1 - lr * weight_decay,
            coefficient1=1 - beta1,
            beta2=beta2,
            coefficient2=1 - beta2,
            step_size=lr / (1 - beta1**step),
            root_correction=(1 - beta2**step) ** -0.5,
            eps=eps,
        )


# The reference.


def random_words(
    seed: int, step: int, stream: int, first: int, count: int, purpose: int = MOMENTS
) -> Tensor:
    """Return the random words of elements first, first + 1, ... of a tensor, int32 [count]. Philox in wrapping int64."""
    lanes = CHUNK // WORDS
    start, stop = first // CHUNK, -(-(first + count) // CHUNK)
    mask = 0xFFFFFFFF
    c0 = torch.arange(start * lanes, stop * lanes) & mask
    c1, c2, c3 = (torch.full_like(c0, word & mask) for word in (purpose, step, stream))
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(ROUNDS):
        # The high half of a wrapped product is still right, once the sign bits that the shift copies in are masked off.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (product2 >> 32).bitwise_and_(mask).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(mask).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product2.bitwise_and_(mask), product0.bitwise_and_(mask)
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    words = torch.stack([c.to(torch.int32).view(-1, lanes) for c in (c0, c1, c2, c3)], 1)
    return words.flatten()[first - start * CHUNK :][:count]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 x to bfloat16, up where adding the low 16 bits of `bits` (int32) carries; NaN and infinities stay."""
    carried = (bits & 0xFFFF).add_(x.view(torch.int32)).bitwise_right_shift_(16)
    # A NaN as GPUs write it, all ones, would carry into the sign.
    return carried.to(torch.int16).view(torch.bfloat16).masked_fill_(x.isnan(), torch.nan)


def adamw_ref(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new (param, exp_avg, exp_avg_sq) in their dtypes; float64 inside for float64. The reference."""
    f = Factors.of(lr, beta1, beta2, eps, weight_decay, step)
    wide = launch.accumulate_dtype(param.dtype)
    g = grad.to(wide) if grad_scale is None else grad.to(wide) * grad_scale.to(wide)
    m, v = exp_avg.to(wide), exp_avg_sq.to(wide)
    m = m + f.coefficient1 * (g - m)
    v = f.beta2 * v + f.coefficient2 * (g * g)
    p = f.decay * param.to(wide) - f.step_size * (m / (v.sqrt() * f.root_correction + eps))

    def words(purpose: int) -> Tensor:
        drawn = random_words(seed, step, stream, first, param.numel(), purpose)
        return drawn.view(param.shape).to(param.device)

    if exp_avg.dtype == torch.bfloat16:
        bits = words(MOMENTS)
        m, v = round_stochastically(m, bits), round_stochastically(v, bits >> 16)
    if param.dtype == torch.bfloat16:
        p = round_stochastically(p, words(WEIGHTS))
    return p.to(param.dtype), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)


# Triton.


@triton.jit
def _stored(x, bits, BFLOAT16: tl.constexpr):
    """Return float32 x as it is stored: unchanged, or for bfloat16 rounded as `round_stochastically` does."""
    if BFLOAT16:
        carried = (x.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -0x10000
        x = tl.where(x == x, carried.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _words(seed, block, purpose, step, stream, ROUNDS: tl.constexpr):
    """Return the four int32 words of each Philox block."""
    zero = block * 0
    c0, c1, c2, c3 = tl.philox(seed, block, zero + purpose, zero + step, zero + stream, ROUNDS)
    return (
        c0.to(tl.int32, bitcast=True),
        c1.to(tl.int32, bitcast=True),
        c2.to(tl.int32, bitcast=True),
        c3.to(tl.int32, bitcast=True),
    )


@triton.jit
def _adamw_kernel(
    param_like,
    grad_like,
    moment_like,
    shadow_like,
    table_ptr,
    scale_ptr,
    num_tensors,
    decay,
    coefficient1,
    beta2,
    coefficient2,
    step_size,
    root_correction,
    eps,
    SCALE: tl.constexpr,
    SHADOW: tl.constexpr,
    BFLOAT16_MOMENTS: tl.constexpr,
    BFLOAT16_PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Update one chunk of one tensor. Pointers named `like` give dtypes; the addresses are in the table (`_table`)."""
    pid = tl.program_id(0)
    number = tl.arange(0, TENSORS)
    begun = tl.load(table_ptr + number, mask=number < num_tensors, other=2**31 - 1)
    table_ptr += tl.sum((begun <= pid).to(tl.int32), axis=0) - 1
    first = tl.load(table_ptr + 7 * num_tensors)
    chunk = first // CHUNK + (pid - tl.load(table_ptr))
    base = (
        chunk * CHUNK - first
    )  # where the chunk starts in this part; negative if the part begins inside the chunk
    start = tl.maximum(-base, 0).to(tl.int32)
    stop = tl.minimum(tl.load(table_ptr + 6 * num_tensors) - base, CHUNK).to(tl.int32)
    param = tl.load(table_ptr + num_tensors).to(param_like.dtype)
    grad = tl.load(table_ptr + 2 * num_tensors).to(grad_like.dtype)
    exp_avg = tl.load(table_ptr + 3 * num_tensors).to(moment_like.dtype)
    exp_avg_sq = tl.load(table_ptr + 4 * num_tensors).to(moment_like.dtype)
    shadow = tl.load(table_ptr + 5 * num_tensors).to(shadow_like.dtype)
    if ALIGNED:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
        shadow = tl.multiple_of(shadow, 16)
        base, start, stop = (
            tl.multiple_of(base, 16),
            tl.multiple_of(start, 16),
            tl.multiple_of(stop, 16),
        )

    LANES: tl.constexpr = CHUNK // 4
    lane = tl.arange(0, LANES)
    if BFLOAT16_MOMENTS or BFLOAT16_PARAM:
        stream = tl.load(table_ptr + 8 * num_tensors).to(tl.int32)
        step = tl.load(table_ptr + 9 * num_tensors).to(tl.int32)
        seed = tl.load(table_ptr + 10 * num_tensors)
        block = (chunk * LANES).to(tl.int32) + lane
    if BFLOAT16_MOMENTS:
        moment_words = _words(seed, block, 0, step, stream, ROUNDS)
    if BFLOAT16_PARAM:
        param_words = _words(seed, block, 1, step, stream, ROUNDS)
    scale = 1.0
    if SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    for word in tl.static_range(4):
        i = word * LANES + lane
        mask = (i >= start) & (i < stop)
        offset = base + i
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            g *= scale
        m = tl.load(exp_avg + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + offset, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(param + offset, mask=mask, other=0.0).to(tl.float32)
        m += coefficient1 * (g - m)
        v = beta2 * v + coefficient2 * (g * g)
        denominator = tl.sqrt_rn(v) * root_correction + eps
        p = decay * p - step_size * tl.div_rn(m, denominator)
        if BFLOAT16_MOMENTS:
            m = _stored(m, moment_words[word], True)
            v = _stored(v, moment_words[word] >> 16, True)
        if BFLOAT16_PARAM:
            p = _stored(p, param_words[word], True)
        tl.store(exp_avg + offset, m.to(moment_like.dtype.element_ty), mask=mask)
        tl.store(exp_avg_sq + offset, v.to(moment_like.dtype.element_ty), mask=mask)
        tl.store(param + offset, p.to(param_like.dtype.element_ty), mask=mask)
        if SHADOW:
            tl.store(shadow + offset, p.to(shadow_like.dtype.element_ty), mask=mask)


def _chunks(update: Update) -> int:
    """Return the number of programs of a tensor: the chunks of the whole tensor that its part touches."""
    numel = update.param.numel()
    return -(-(update.first + numel) // CHUNK) - update.first // CHUNK if numel else 0


def _table(updates: Sequence[Update], step: int, seed: int) -> tuple[Tensor, int]:
    """Return the table, int64 [11, T] on the device, and the number of programs.

    Each row has one number a tensor: its first program; the addresses of parameter, gradient, both moments and shadow;
    elements; first; stream; step; seed. Seed and step are in the table because Triton may compile again for an integer
    argument that changes.
    """
    begun, rows = 0, []
    for update in updates:
        tensors = update[:5]
        rows.append(
            [
                begun,
                *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
                update.param.numel(),
                update.first,
                update.stream,
                step,
                (seed & 2**64 - 1) - (seed & 2**63) * 2,  # the same 64 bits, with a sign
            ]
        )
        begun += _chunks(update)
    device = updates[0].param.device
    # Pinned memory is copied without the host waiting; torch's allocator keeps it until the copy is done.
    columns = list(zip(*rows, strict=True))
    table = torch.tensor(columns, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), begun


def _is_aligned(update: Update) -> bool:
    """Return whether every access is aligned to 16 bytes: addresses, length and place are multiples of 16."""
    tensors = [tensor for tensor in update[:5] if tensor is not None]
    return (update.param.numel() | update.first) % 16 == 0 and all(
        tensor.data_ptr() % 16 == 0 for tensor in tensors
    )


# architecture -> num_warps, for chunks of 4,096 elements. Not yet measured.
_LAUNCH_TABLE = {80: 4, 90: 4, 100: 4}


def adamw_all_triton(
    updates: Sequence[Update], factors: Factors, step: int, grad_scale: Tensor | None, seed: int
) -> None:
    """Launch the kernel, once for all tensors of the same dtypes and alignment."""
    groups: dict[Any, list[Update]] = {}
    for update in updates:
        if update.param.numel() > 0:
            dtypes = tuple(None if tensor is None else tensor.dtype for tensor in update[:5])
            groups.setdefault((dtypes, _is_aligned(update)), []).append(update)
    for (_, is_aligned), group in groups.items():
        first = group[0]
        table, num_programs = _table(group, step, seed)
        _adamw_kernel[(num_programs,)](
            param_like=first.param,
            grad_like=first.grad,
            moment_like=first.exp_avg,
            shadow_like=first.param if first.shadow is None else first.shadow,
            table_ptr=table,
            scale_ptr=first.param if grad_scale is None else grad_scale,
            num_tensors=len(group),
            **factors._asdict(),
            SCALE=grad_scale is not None,
            SHADOW=first.shadow is not None,
            BFLOAT16_MOMENTS=first.exp_avg.dtype == torch.bfloat16,
            BFLOAT16_PARAM=first.param.dtype == torch.bfloat16,
            ALIGNED=is_aligned,
            TENSORS=triton.next_power_of_2(len(group)),
            CHUNK=CHUNK,
            ROUNDS=ROUNDS,
            num_warps=_LAUNCH_TABLE[launch.architecture(first.param.device)],
            # Fusion could differ between these variants: a split tensor would then get other bits than a whole one.
            enable_fp_fusion=False,
        )
        _note_change(group)


def _note_change(updates: Sequence[Update]) -> None:
    """Count the change of each tensor, so that a backward pass that has kept one sees it and raises."""
    for update in updates:
        changed = (update.param, update.exp_avg, update.exp_avg_sq, update.shadow)
        torch.autograd.graph.increment_version([t for t in changed if t is not None])


def adamw_all_(
    updates: Sequence[Update],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Do the step of `adamw_` for many tensors of one device: on a GPU, one launch for all of the same dtypes.

    >>> p, g, m, v = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    >>> adamw_all_([Update(p, g, m, v)], lr=0.1, beta1=0.9, beta2=0.98, eps=0.0, weight_decay=0.0, step=1)
    >>> p
    tensor([0.9000, 0.9000, 0.9000])
    """
    if not updates:
        return
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    device = updates[0].param.device
    for update in updates:
        _check(update, device)
    if grad_scale is not None and (grad_scale.numel() != 1 or grad_scale.device != device):
        raise ValueError(
            f"grad_scale has to be one element on {device}, got {list(grad_scale.shape)} on {grad_scale.device}"
        )
    settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    if device.type == "cuda":
        with launch.on_device(device):
            adamw_all_triton(updates, Factors.of(**settings, step=step), step, grad_scale, seed)
        return
    _adamw_all_cpu(updates, {**settings, "step": step, "grad_scale": grad_scale, "seed": seed})


def _adamw_all_cpu(updates: Sequence[Update], settings: dict[str, Any]) -> None:
    """Update by the extension (csrc/adamw.cpp), else by the reference in pieces; the random bits are the same.

    torch's pass serves float64 only: its bits depend on how elements fall on vectors, so the parts of a split tensor
    would differ from the whole one.
    """
    extension = native.load()
    narrow = [update for update in updates if update.param.dtype != torch.float64]
    if extension is None:
        for update in narrow:
            _adamw_in_pieces(update, settings)
    elif narrow:
        names = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
        scale, kept = settings["grad_scale"], (torch.float32, torch.bfloat16)
        grads = [u.grad if u.grad.dtype in kept else u.grad.float() for u in narrow]
        extension.adamw(
            params=[update.param.detach() for update in narrow],
            grads=[grad.detach() for grad in grads],
            exp_avgs=[update.exp_avg for update in narrow],
            exp_avg_sqs=[update.exp_avg_sq for update in narrow],
            shadows=[update.shadow for update in narrow],
            streams=[update.stream for update in narrow],
            firsts=[update.first for update in narrow],
            factors=list(Factors.of(**{name: settings[name] for name in names})),
            grad_scale=1.0 if scale is None else float(scale),
            step=settings["step"],
            seed=settings["seed"] & 2**64 - 1,
        )
        _note_change(narrow)
    for update in updates:
        if update.param.dtype == torch.float64:
            _adamw_torch(*(tensor.view(-1) for tensor in update[:4]), **settings)


def _adamw_in_pieces(update: Update, settings: dict[str, Any]) -> None:
    """Update by the reference, some chunks at a time, so that a piece stays in the cache."""
    *tensors, shadow, stream, first = update
    flat = [tensor.view(-1) for tensor in tensors]
    numel, start = update.param.numel(), 0
    while start < numel:
        # Pieces end where chunks end: random words are drawn for whole chunks.
        stop = min(numel, ((first + start) // CPU_ELEMENTS + 1) * CPU_ELEMENTS - first)
        pieces = [tensor[start:stop] for tensor in flat]
        new = adamw_ref(*pieces, **settings, stream=stream, first=first + start)
        for i, value in zip((0, 2, 3), new, strict=True):
            pieces[i].copy_(value)
        start = stop
    if shadow is not None:
        shadow.copy_(update.param)


def _adamw_torch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    grad_scale: Tensor | None,
    seed: int,
    **settings: float,
) -> None:
    """Update in place by torch's fused pass. It counts the step itself, and would write a scaled gradient back."""
    grad = grad.to(param.dtype)
    torch_adamw(
        [param],
        [grad if grad_scale is None else grad * grad_scale.to(grad.dtype)],
        [exp_avg],
        [exp_avg_sq],
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(step - 1.0)],
        fused=True,
        amsgrad=False,
        maximize=False,
        **settings,  # type: ignore[arg-type]
    )


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    shadow: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
    first: int = 0,
) -> None:
    """Do one AdamW step of a tensor in place: parameter, both moments and the shadow.

    Args:
        param, grad, exp_avg, exp_avg_sq, shadow, stream, first: see `Update`.
        lr, beta1, beta2, eps, weight_decay: as of torch.optim.AdamW.
        step: of this update, from 1.
        grad_scale: one element on the device that every gradient is multiplied with, such as clipping's.
        seed: of the stochastic rounding, 64 bits. The same seed, step, stream and place give the same bits.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit.
    """
    adamw_all_(
        [Update(param, grad, exp_avg, exp_avg_sq, shadow, stream, first)],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        seed=seed,
    )


def _check(update: Update, device: torch.device) -> None:
    """Raise ValueError unless the tensors of an update fit each other."""
    param = update.param
    float64 = {torch.float64} if device.type == "cpu" else set()
    for name, tensor in zip(Update._fields[:5], update[:5], strict=True):
        if tensor is None:
            continue
        if tensor.shape != param.shape or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has to be contiguous {list(param.shape)} on {device}, "
                f"got {list(tensor.shape)} of strides {tensor.stride()} on {tensor.device}"
            )
    kinds = {torch.float32, torch.bfloat16} | float64
    if param.dtype not in kinds:
        raise ValueError(f"param has to be float32 or bfloat16, got {param.dtype}")
    if not update.grad.is_floating_point() or (update.grad.dtype == torch.float64) > bool(float64):
        raise ValueError(f"grad has to be floating-point, got {update.grad.dtype}")
    if update.exp_avg.dtype not in kinds or update.exp_avg_sq.dtype != update.exp_avg.dtype:
        raise ValueError(
            f"exp_avg and exp_avg_sq have to be both float32 or both bfloat16, "
            f"got {update.exp_avg.dtype} and {update.exp_avg_sq.dtype}"
        )
    if update.shadow is not None and (update.shadow.dtype, param.dtype) != (
        torch.bfloat16,
        torch.float32,
    ):
        raise ValueError(
            f"shadow has to be bfloat16 beside a float32 param, got {update.shadow.dtype} and {param.dtype}"
        )
