"""The kernel of the sigmoid loss in Triton.

Legend, maths and precision: ``clipcore.kernels.sigmoid``. N and M are rows and columns of a block, tiles are parts of it.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton
from clipcore.kernels.tiles import load_product, multiply, positives, tile_numbers


@triton.jit
def _log1p_over(t):
    """log(1 + t) / t for t in [0, 1]: the polynomial through the Chebyshev points, by Horner's rule."""
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
def _add(sum_ptr, values):
    """Add a tile's values, summed in float32, to a sum in float64 that is this program's own."""
    tl.store(sum_ptr, tl.load(sum_ptr) + tl.sum(tl.sum(values, axis=1), axis=0))


@triton.jit
def sigmoid_kernel(
    x_desc,
    y_desc,
    product_ptr,
    factor_ptr,
    image_id_ptr,
    text_id_ptr,
    grad_ptr,
    partial_ptr,
    N,
    M,
    D,
    stride_product,
    stride_partial,
    first_label,
    GRADIENT_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IDS: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    tile_n, tile_m, n, m = tile_numbers(N, M, BLOCK_N, BLOCK_M, GROUP_N)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if FUSED:
        cosine = multiply(x_desc, y_desc, tile_n, tile_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    else:
        cosine = load_product(product_ptr, stride_product, n, m, inside)
    valid, positive = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)
    # In powers of two. Factor and bias are two floats each: rounding them to one would shift all logits alike.
    low = cosine * tl.load(factor_ptr + 1) + tl.load(factor_ptr + 3)
    power = cosine * tl.load(factor_ptr) + tl.load(factor_ptr + 2) + low
    power = tl.where(positive, -power, power)
    t = tl.exp2(-tl.abs(power))
    loss = tl.maximum(power, 0.0) * 0.6931471805599453 + t * _log1p_over(t)
    loss = tl.where(power == power, loss, power)  # whatever a maximum makes of NaN
    # Sums over blocks for each place of a tile in them: loss, d_scale, d_bias.
    partial_ptr += tl.program_id(0)
    _add(partial_ptr, tl.where(valid, loss, 0.0))
    if GRADIENT:
        probability = tl.where(power > 0, 1.0, t) / (1.0 + t)
        grad = tl.where(valid, tl.where(positive, -probability, probability), 0.0)
        _add(partial_ptr + stride_partial, grad * cosine)
        _add(partial_ptr + 2 * stride_partial, grad)
        offsets = n.to(tl.int64)[:, None] * M + m[None, :]
        stored = (grad * GRADIENT_SCALE).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + offsets, stored, mask=inside)
