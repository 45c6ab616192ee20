"""The kernels of the sigmoid loss in Triton.

Legend, maths and precision: ``clipcore.kernels.sigmoid``. N and M are rows and columns of a block, tiles
and strips are parts of it.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton
from clipcore.kernels.strips import (
    strip_ids,
    strip_load,
    strip_pairs,
    strip_place,
    strip_rows,
    strip_store,
)
from clipcore.kernels.tiles import add_to_place, multiply, positives, tile_numbers


@triton.jit
def _log1p_over(t):
    """Return log(1 + t) / t for t in [0, 1]: the polynomial through the Chebyshev points, by Horner's rule."""
    poly = 0.00198669636 * t - 0.0131878254
    poly = poly * t + 0.0410065711
    poly = poly * t - 0.0818804061
    poly = poly * t + 0.123779956
    poly = poly * t - 0.160876229
    poly = poly * t + 0.198858203
    poly = poly * t - 0.249864965
    poly = poly * t + 0.333324975
    poly = poly * t - 0.499999795
    poly = poly * t + 0.999999999
    return poly


@triton.jit
def _power(cosine, factor_ptr):
    """Return the logit as a power of two.

    Factor and bias are two floats each: rounding them to one would shift all logits alike. The high part of the bias comes
    last, beside which the low parts would be lost, for all logits alike too.
    """
    low = cosine * tl.load(factor_ptr + 1) + tl.load(factor_ptr + 3)
    return (cosine * tl.load(factor_ptr) + low) + tl.load(factor_ptr + 2)


@triton.jit
def _far_softplus(power, GRADIENT_SCALE: tl.constexpr):
    """Return (softplus, sigmoid * GRADIENT_SCALE) of negatives far from their margin, power < -5: t = 2^power < 1/32.

    log(1 + t) / t and 1 / (1 + t) by the cubics through the Chebyshev points of [0, 1/32]: relative errors below 4e-9
    and 2e-8, less than float32's last place.
    """
    t = tl.exp2(power)
    over_t = 1.0 - t * (0.49999855 - t * (0.333100248 - t * 0.237933834))
    ratio = GRADIENT_SCALE - t * (
        0.999992821 * GRADIENT_SCALE
        - t * (0.99884525 * GRADIENT_SCALE - t * (0.940089647 * GRADIENT_SCALE))
    )
    return t * over_t, t * ratio


@triton.jit
def _softplus(power, GRADIENT_SCALE: tl.constexpr):
    """Return (softplus, sigmoid * GRADIENT_SCALE) of any power."""
    t = tl.exp2(-tl.abs(power))
    loss = tl.maximum(power, 0.0) * 0.6931471805599453 + t * _log1p_over(t)
    loss = tl.where(power == power, loss, power)  # whatever a maximum makes of NaN
    return loss, tl.where(power > 0, GRADIENT_SCALE, t * GRADIENT_SCALE) / (1.0 + t)


@triton.jit(do_not_specialize=["first_label"])
def sigmoid_kernel(
    x_desc,  # [N, D] in tiles [BLOCK_N, BLOCK_D]
    y_desc,  # [M, D] in tiles [BLOCK_M, BLOCK_D]
    factor_ptr,  # float32 [4]: the factor from cosines to powers of two, and the bias as one, each in two parts
    image_id_ptr,  # int64 [N]
    text_id_ptr,  # int64 [M]
    grad_ptr,  # [N, M], rows stride_grad apart
    partial_ptr,  # float64 [3, programs]: sums of the loss, of gradient * cosine, of the gradient
    N,
    M,
    D,
    stride_grad,
    stride_partial,
    first_label,
    GRADIENT_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """Multiply a tile; add its sums, and leave the gradient of its logits."""
    tile_n, tile_m, n, m = tile_numbers(N, M, BLOCK_N, BLOCK_M, GROUP_N)
    inside = (n[:, None] < N) & (m[None, :] < M)
    cosine = multiply(x_desc, y_desc, tile_n, tile_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    valid, positive = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)

    power = _power(cosine, factor_ptr)
    loss, grad = _softplus(tl.where(positive, -power, power), GRADIENT_SCALE)
    partial_ptr += tl.program_id(0)
    add_to_place(partial_ptr, tl.sum(tl.sum(tl.where(valid, loss, 0.0), axis=1), axis=0))
    if GRADIENT:
        grad = tl.where(valid, tl.where(positive, -grad, grad), 0.0)
        along = tl.sum(tl.sum(grad * cosine, axis=1), axis=0)
        total = tl.sum(tl.sum(grad, axis=1), axis=0)
        add_to_place(partial_ptr + stride_partial, along / GRADIENT_SCALE)
        add_to_place(partial_ptr + 2 * stride_partial, total / GRADIENT_SCALE)
        offsets = n.to(tl.int64)[:, None] * stride_grad + m[None, :]
        tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_label"])
def sigmoid_pass(
    product_ptr,  # float32 [N, M], rows stride_product apart
    factor_ptr,  # float32 [4]
    image_id_ptr,  # int64 [N]
    text_id_ptr,  # int64 [M]
    grad_ptr,  # [N, M], rows stride_grad apart
    partial_ptr,  # float64 [3, programs]: sums of the loss, of gradient * cosine, of the gradient
    N,
    M,
    stride_product,
    stride_grad,
    stride_partial,
    first_label,
    GRADIENT_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the sums of each strip of a block that the library has multiplied, and leave the gradient of its logits."""
    first_n, first_m, is_edge = strip_place(N, M, first_label, ROWS, COLS)
    partial_ptr += tl.program_id(0)
    # Both forms are compiled, and each strip takes one.
    for EDGE in tl.static_range(2):
        if is_edge == EDGE:
            loss, along, total = _sigmoid_strip(
                product_ptr,
                factor_ptr,
                image_id_ptr,
                text_id_ptr,
                grad_ptr,
                N,
                M,
                stride_product,
                stride_grad,
                first_label,
                first_n,
                first_m,
                GRADIENT_SCALE,
                GRADIENT,
                IDS,
                ROWS,
                COLS,
                STEP=1 if EDGE else STEP,
                EDGE=EDGE,
            )
            add_to_place(partial_ptr, loss)
            if GRADIENT:
                add_to_place(partial_ptr + stride_partial, along)
                add_to_place(partial_ptr + 2 * stride_partial, total)


@triton.jit
def _sigmoid_strip(
    product_ptr,
    factor_ptr,
    image_id_ptr,
    text_id_ptr,
    grad_ptr,
    N,
    M,
    stride_product,
    stride_grad,
    first_label,
    first_n,
    first_m,
    GRADIENT_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Return a strip's (loss, gradient along the cosines, sum of the gradient). Arguments as in ``sigmoid_pass``."""
    m = first_m + tl.arange(0, COLS)
    in_m = m < M
    text_id = strip_ids(text_id_ptr, m, in_m, IDS, EDGE)

    loss_sum = tl.zeros((COLS,), tl.float32)
    along = tl.zeros((COLS,), tl.float32)
    total = tl.zeros((COLS,), tl.float32)
    for step_n in range(0, strip_rows(first_n, N, ROWS, EDGE), STEP):
        n = first_n + step_n + tl.arange(0, STEP)
        in_n = n < N
        row_n = n.to(tl.int64)[:, None]
        inside = in_n[:, None] & in_m[None, :]
        cosine = strip_load(product_ptr + row_n * stride_product + m[None, :], inside, EDGE)
        power = _power(cosine, factor_ptr)
        image_id = strip_ids(image_id_ptr, n, in_n, IDS, EDGE)
        valid, positive = strip_pairs(n, m, inside, first_label, image_id, text_id, IDS, EDGE)

        if EDGE or IDS == "positive":
            loss, grad = _softplus(tl.where(positive, -power, power), GRADIENT_SCALE)
            grad = tl.where(positive, -grad, grad)
        elif tl.max(tl.max(power, axis=0), axis=0) < -5.0:
            loss, grad = _far_softplus(power, GRADIENT_SCALE)
        else:
            loss, grad = _softplus(power, GRADIENT_SCALE)
        if EDGE or IDS == "ignore":
            loss, grad = tl.where(valid, loss, 0.0), tl.where(valid, grad, 0.0)

        loss_sum += tl.sum(loss, axis=0)
        if GRADIENT:
            along += tl.sum(grad * cosine, axis=0)
            total += tl.sum(grad, axis=0)
            grad_ptrs = grad_ptr + row_n * stride_grad + m[None, :]
            strip_store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), inside, EDGE)
    return (
        tl.sum(loss_sum.to(tl.float64), axis=0),
        tl.sum(along.to(tl.float64), axis=0) / GRADIENT_SCALE,
        tl.sum(total.to(tl.float64), axis=0) / GRADIENT_SCALE,
    )
