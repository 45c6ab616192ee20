"""The Triton kernels of packed attention; attention_triton.py launches them.

Legend: R rows of L tokens, H heads, SIZE the head size in parts K0 and K1 (attention_tiles.py); m queries, n keys;
q, k, v and g (the output's gradient) the tiles; p probabilities, s scores.

    p = 2^(s scale - lse)      scale = log2(e) / sqrt(SIZE), lse = the logarithm to base 2 of the sum over keys
    delta_m = sum_n p_mn (g_m . v_n) = g_m . o_m        ds_mn = p_mn (g_m . v_n - delta_m)
    dv_n = sum_m p_mn g_m      dq_m = sum_n ds_mn k_n / sqrt(SIZE)      dk_n = sum_m ds_mn q_m / sqrt(SIZE)

A program serves a block of tokens of one row and head. The programs of one row and head have neighbouring numbers, so that
L2 holds what they share. The last tokens of a row take a smaller block (REST). It is a branch of the same launch: a launch
of its own would read the keys from memory again. A block walks over the row in steps (STEP, 0 where the row has no whole
step), the last of which is smaller (TAIL). Whole steps then lie inside the row and need no mask. TAIL = STEP makes all
steps alike, each with a mask: that is less code, and fewer registers where heads are wide.
Scores, p, sums and accumulators are float32; the operands of a product have the dtype of the projection.
"""

from __future__ import annotations

from clipcore.kernels.attention_tiles import (
    add_rows,
    hide_unseen,
    load_log_sums,
    load_rows,
    multiply_rows,
    store_rows,
    sum_products,
    zero_rows,
)
from clipcore.kernels.launch import tl, triton

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _locate(pid, L, H, SIZE: tl.constexpr):
    """Return the offsets of the pid-th row and head in qkv, in the output, in lse, and in the segments."""
    r = (pid // H).to(tl.int64)
    h = pid % H
    return r * L * (3 * H * SIZE) + h * SIZE, (r * L * H + h) * SIZE, (r * H + h) * L, r * L


@triton.jit
def _fwd_step(
    acc0, acc1, largest, total, q0, q1, k_ptr, v_ptr, m, start, stride, L, scale, segment_ptr,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    STEP: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Add STEP keys to the output and the sum, both relative to the largest score so far."""
    n = start + tl.arange(0, STEP)
    k0, k1 = load_rows(k_ptr, n, stride, L, SIZE, K0, K1, INSIDE)
    s = multiply_rows(q0, q1, k0, k1, K1)
    s = hide_unseen(
        s, m[:, None], n[None, :], L, segment_ptr, float("-inf"), CAUSAL, SEGMENTS, INSIDE
    )
    next_largest = tl.maximum(largest, tl.max(s, axis=1))
    shrink = tl.exp2((largest - next_largest) * scale)
    p = tl.exp2(s * scale - (next_largest * scale)[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc0 *= shrink[:, None]
    if K1 > 0:
        acc1 *= shrink[:, None]
    v0, v1 = load_rows(v_ptr, n, stride, L, SIZE, K0, K1, INSIDE)
    acc0, acc1 = add_rows(acc0, acc1, p, v0, v1, K1)
    return acc0, acc1, next_largest, total


@triton.jit
def _fwd_block(
    q_ptr, segment_ptr, out_ptr, lse_ptr, first, L, H, scale,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Compute and store the outputs of BLOCK queries."""
    m = first + tl.arange(0, BLOCK)
    stride = 3 * H * SIZE
    k_ptr = q_ptr + H * SIZE
    v_ptr = k_ptr + H * SIZE
    q0, q1 = load_rows(q_ptr, m, stride, L, SIZE, K0, K1, False)
    # It is finite, so that a step in which a query sees no key does not compute inf - inf.
    largest = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    acc0, acc1 = zero_rows(BLOCK, K0, K1)
    end = L
    if CAUSAL:
        end = min(first + BLOCK, L)
    whole = 0
    if STEP > 0:
        whole = L // STEP * STEP if TAIL < STEP else L
        for start in range(0, min(whole, end), STEP):
            acc0, acc1, largest, total = _fwd_step(
                acc0, acc1, largest, total, q0, q1, k_ptr, v_ptr, m, start, stride, L, scale, segment_ptr,
                CAUSAL, SEGMENTS, SIZE, K0, K1, STEP, TAIL < STEP,
            )  # fmt: skip
    if TAIL > 0 and TAIL != STEP and (not CAUSAL or whole < end):
        acc0, acc1, largest, total = _fwd_step(
            acc0, acc1, largest, total, q0, q1, k_ptr, v_ptr, m, whole, stride, L, scale, segment_ptr,
            CAUSAL, SEGMENTS, SIZE, K0, K1, TAIL, False,
        )  # fmt: skip
    factor = 1.0 / total
    if SEGMENTS:
        factor = tl.where(tl.load(segment_ptr + m, mask=m < L, other=-1) >= 0, factor, 0.0)
    acc0 *= factor[:, None]
    acc1 *= factor[:, None]
    store_rows(out_ptr, m, H * SIZE, L, acc0, acc1, SIZE, K0, K1)
    tl.store(lse_ptr + m, largest * scale + tl.log2(total), mask=m < L)


@triton.jit
def attention_fwd_kernel(
    qkv_ptr, segment_ptr, out_ptr, lse_ptr, blocks, L, H, scale,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Compute one block of outputs; a row and head has `blocks` of BLOCK queries and one of REST."""
    each = blocks + (REST > 0)
    block = tl.program_id(0) % each
    qkv, out, row, tokens = _locate(tl.program_id(0) // each, L, H, SIZE)
    if SEGMENTS:
        segment_ptr += tokens
    if REST == 0 or block < blocks:
        _fwd_block(
            qkv_ptr + qkv, segment_ptr, out_ptr + out, lse_ptr + row, block * BLOCK, L, H, scale,
            CAUSAL, SEGMENTS, SIZE, K0, K1, BLOCK, STEP, TAIL,
        )  # fmt: skip
    else:
        _fwd_block(
            qkv_ptr + qkv, segment_ptr, out_ptr + out, lse_ptr + row, blocks * BLOCK, L, H, scale,
            CAUSAL, SEGMENTS, SIZE, K0, K1, REST, STEP, TAIL,
        )  # fmt: skip


@triton.jit
def attention_bwd_tile_kernel(
    qkv_ptr, segment_ptr, grad_ptr, lse_ptr, dqkv_ptr, L, H, scale,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a row and head that fit one tile."""
    qkv, out, row, tokens = _locate(tl.program_id(0), L, H, SIZE)
    if SEGMENTS:
        segment_ptr += tokens
    m = tl.arange(0, BLOCK)
    stride = 3 * H * SIZE
    q_ptr = qkv_ptr + qkv
    q0, q1 = load_rows(q_ptr, m, stride, L, SIZE, K0, K1, False)
    k0, k1 = load_rows(q_ptr + H * SIZE, m, stride, L, SIZE, K0, K1, False)
    lse = load_log_sums(lse_ptr + row, segment_ptr, m, L, SEGMENTS)
    p = tl.exp2(multiply_rows(q0, q1, k0, k1, K1) * scale - lse[:, None])
    p = hide_unseen(p, m[:, None], m[None, :], L, segment_ptr, 0.0, CAUSAL, SEGMENTS, False)
    g0, g1 = load_rows(grad_ptr + out, m, H * SIZE, L, SIZE, K0, K1, False)
    d_ptr = dqkv_ptr + qkv
    zero0, zero1 = zero_rows(BLOCK, K0, K1)
    dv0, dv1 = add_rows(zero0, zero1, tl.trans(p.to(q0.dtype)), g0, g1, K1)
    store_rows(d_ptr + 2 * H * SIZE, m, stride, L, dv0, dv1, SIZE, K0, K1)
    v0, v1 = load_rows(q_ptr + 2 * H * SIZE, m, stride, L, SIZE, K0, K1, False)
    dp = multiply_rows(g0, g1, v0, v1, K1)
    # delta comes from the probabilities themselves: where a query sees one key, ds is then exactly 0, as it should be.
    delta = tl.sum(p * dp, axis=1) / tl.maximum(tl.sum(p, axis=1), 1e-30)
    ds = (p * (dp - delta[:, None])).to(q0.dtype)
    unit = scale * LN2
    dq0, dq1 = add_rows(zero0, zero1, ds, k0, k1, K1)
    store_rows(d_ptr, m, stride, L, dq0 * unit, dq1 * unit, SIZE, K0, K1)
    dk0, dk1 = add_rows(zero0, zero1, tl.trans(ds), q0, q1, K1)
    store_rows(d_ptr + H * SIZE, m, stride, L, dk0 * unit, dk1 * unit, SIZE, K0, K1)


@triton.jit
def _query_step(
    dq0, dq1, q0, q1, g0, g1, lse, delta, k_ptr, v_ptr, m, start, stride, L, scale, segment_ptr,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    STEP: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Add the share of STEP keys to the gradients of queries."""
    n = start + tl.arange(0, STEP)
    k0, k1 = load_rows(k_ptr, n, stride, L, SIZE, K0, K1, INSIDE)
    v0, v1 = load_rows(v_ptr, n, stride, L, SIZE, K0, K1, INSIDE)
    p = tl.exp2(multiply_rows(q0, q1, k0, k1, K1) * scale - lse[:, None])
    p = hide_unseen(p, m[:, None], n[None, :], L, segment_ptr, 0.0, CAUSAL, SEGMENTS, INSIDE)
    ds = p * (multiply_rows(g0, g1, v0, v1, K1) - delta[:, None])
    return add_rows(dq0, dq1, ds, k0, k1, K1)


@triton.jit
def _query_block(
    q_ptr, segment_ptr, out_ptr, g_ptr, lse_ptr, delta_ptr, dq_ptr, first, L, H, scale,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK queries. KEEP: store their delta for the keys' launch."""
    m = first + tl.arange(0, BLOCK)
    stride = 3 * H * SIZE
    k_ptr = q_ptr + H * SIZE
    v_ptr = k_ptr + H * SIZE
    q0, q1 = load_rows(q_ptr, m, stride, L, SIZE, K0, K1, False)
    g0, g1 = load_rows(g_ptr, m, H * SIZE, L, SIZE, K0, K1, False)
    o0, o1 = load_rows(out_ptr, m, H * SIZE, L, SIZE, K0, K1, False)
    delta = sum_products(o0, o1, g0, g1, K1)
    if KEEP:
        tl.store(delta_ptr + m, delta, mask=m < L)
    lse = load_log_sums(lse_ptr, segment_ptr, m, L, SEGMENTS)
    dq0, dq1 = zero_rows(BLOCK, K0, K1)
    end = L
    if CAUSAL:
        end = min(first + BLOCK, L)
    whole = 0
    if STEP > 0:
        whole = L // STEP * STEP if TAIL < STEP else L
        for start in range(0, min(whole, end), STEP):
            dq0, dq1 = _query_step(
                dq0, dq1, q0, q1, g0, g1, lse, delta, k_ptr, v_ptr, m, start, stride, L, scale, segment_ptr,
                CAUSAL, SEGMENTS, SIZE, K0, K1, STEP, TAIL < STEP,
            )  # fmt: skip
    if TAIL > 0 and TAIL != STEP and (not CAUSAL or whole < end):
        dq0, dq1 = _query_step(
            dq0, dq1, q0, q1, g0, g1, lse, delta, k_ptr, v_ptr, m, whole, stride, L, scale, segment_ptr,
            CAUSAL, SEGMENTS, SIZE, K0, K1, TAIL, False,
        )  # fmt: skip
    unit = scale * LN2
    store_rows(dq_ptr, m, stride, L, dq0 * unit, dq1 * unit, SIZE, K0, K1)


@triton.jit
def _key_step(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, out_ptr, g_ptr, lse_ptr, delta_ptr, n, start, stride, L, H, scale,
    segment_ptr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
    SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, STEP: tl.constexpr, INSIDE: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Add the share of STEP queries to the gradients of keys and values; tiles are transposed, keys by queries."""
    m = start + tl.arange(0, STEP)
    q0, q1 = load_rows(q_ptr, m, stride, L, SIZE, K0, K1, INSIDE)
    g0, g1 = load_rows(g_ptr, m, H * SIZE, L, SIZE, K0, K1, INSIDE)
    lse = load_log_sums(lse_ptr, segment_ptr, m, L, SEGMENTS)
    if KEPT:
        delta = tl.load(delta_ptr + m, mask=m < L, other=0.0)
    else:
        o0, o1 = load_rows(out_ptr, m, H * SIZE, L, SIZE, K0, K1, INSIDE)
        delta = sum_products(o0, o1, g0, g1, K1)
    p = tl.exp2(multiply_rows(k0, k1, q0, q1, K1) * scale - lse[None, :])
    # Keys past the end need no mask: their gradients are not stored.
    p = hide_unseen(p, m[None, :], n[:, None], L, segment_ptr, 0.0, CAUSAL, SEGMENTS, True)
    dv0, dv1 = add_rows(dv0, dv1, p, g0, g1, K1)
    ds = p * (multiply_rows(v0, v1, g0, g1, K1) - delta[None, :])
    dk0, dk1 = add_rows(dk0, dk1, ds, q0, q1, K1)
    return dk0, dk1, dv0, dv1


@triton.jit
def _key_block(
    q_ptr, segment_ptr, out_ptr, g_ptr, lse_ptr, delta_ptr, dq_ptr, first, L, H, scale,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK keys and values. KEPT: load the delta that the queries' launch has stored."""
    n = first + tl.arange(0, BLOCK)
    stride = 3 * H * SIZE
    k0, k1 = load_rows(q_ptr + H * SIZE, n, stride, L, SIZE, K0, K1, False)
    v0, v1 = load_rows(q_ptr + 2 * H * SIZE, n, stride, L, SIZE, K0, K1, False)
    dk0, dk1 = zero_rows(BLOCK, K0, K1)
    dv0, dv1 = zero_rows(BLOCK, K0, K1)
    whole = 0
    if STEP > 0:
        begin = 0
        if CAUSAL:
            begin = first // STEP * STEP
        whole = L // STEP * STEP if TAIL < STEP else L
        for start in range(begin, whole, STEP):
            dk0, dk1, dv0, dv1 = _key_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, out_ptr, g_ptr, lse_ptr, delta_ptr, n, start, stride, L, H,
                scale, segment_ptr, CAUSAL, SEGMENTS, SIZE, K0, K1, STEP, TAIL < STEP, KEPT,
            )  # fmt: skip
    if TAIL > 0 and TAIL != STEP:
        dk0, dk1, dv0, dv1 = _key_step(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, out_ptr, g_ptr, lse_ptr, delta_ptr, n, whole, stride, L, H,
            scale, segment_ptr, CAUSAL, SEGMENTS, SIZE, K0, K1, TAIL, False, KEPT,
        )  # fmt: skip
    unit = scale * LN2
    store_rows(dq_ptr + H * SIZE, n, stride, L, dk0 * unit, dk1 * unit, SIZE, K0, K1)
    store_rows(dq_ptr + 2 * H * SIZE, n, stride, L, dv0, dv1, SIZE, K0, K1)


@triton.jit
def attention_bwd_kernel(
    qkv_ptr, segment_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr, blocks, L, H, scale,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    PASS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one block; a row and head has `blocks` of BLOCK tokens and one of REST.

    PASS says whose: the queries', the keys' and values', or both. "query" stores the deltas that "key" needs. "both"
    computes them again for the keys, and each program does one of the two.
    """
    each = blocks + (REST > 0)
    block = tl.program_id(0) % each
    index = tl.program_id(0) // each
    is_key = index % 2 == 1
    if PASS == "both":
        index = index // 2
    qkv, out, row, tokens = _locate(index, L, H, SIZE)
    if SEGMENTS:
        segment_ptr += tokens
    q_ptr = qkv_ptr + qkv
    out_ptr += out
    grad_ptr += out
    lse_ptr += row
    dq_ptr = dqkv_ptr + qkv
    if PASS != "both":
        delta_ptr += row
    first = block * BLOCK
    if PASS == "query" or (PASS == "both" and not is_key):
        if REST == 0 or block < blocks:
            _query_block(
                q_ptr, segment_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, first, L, H, scale,
                CAUSAL, SEGMENTS, SIZE, K0, K1, BLOCK, STEP, TAIL, PASS == "query",
            )  # fmt: skip
        else:
            _query_block(
                q_ptr, segment_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, first, L, H, scale,
                CAUSAL, SEGMENTS, SIZE, K0, K1, REST, STEP, TAIL, PASS == "query",
            )  # fmt: skip
    if PASS == "key" or (PASS == "both" and is_key):
        if REST == 0 or block < blocks:
            _key_block(
                q_ptr, segment_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, first, L, H, scale,
                CAUSAL, SEGMENTS, SIZE, K0, K1, BLOCK, STEP, TAIL, PASS == "key",
            )  # fmt: skip
        else:
            _key_block(
                q_ptr, segment_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, first, L, H, scale,
                CAUSAL, SEGMENTS, SIZE, K0, K1, REST, STEP, TAIL, PASS == "key",
            )  # fmt: skip
