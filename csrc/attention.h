// Packed attention in float32 on the CPU: both passes, contract in kernels/attention.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace clipcore {

// The vector widths of this processor in floats, the widest first; empty if it or the compiler has none.
std::vector<int64_t> attention_lanes();

// qkv_RL3HK: float32 with the columns of a head side by side. segments_RL: int32, contiguous. lanes: one of attention_lanes().
// Returns (output [R, L, H*K], log-sum-exp [R, H, L]).
std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& qkv_RL3HK,
    bool is_causal,
    const std::optional<at::Tensor>& segments_RL,
    int64_t lanes);

// grad_RLD: contiguous. Returns the gradient of the packed projection.
at::Tensor attention_backward(
    const at::Tensor& grad_RLD,
    const at::Tensor& qkv_RL3HK,
    const at::Tensor& lse_RHL,
    bool is_causal,
    const std::optional<at::Tensor>& segments_RL,
    int64_t lanes);

} // namespace clipcore
