// AdamW on the CPU in one pass, contract in kernels/adamw.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace clipcore {

// In place, on contiguous tensors of the CPU. params and grads: float32 or bfloat16; the moments: both float32 or both
// bfloat16, which are rounded stochastically, as bfloat16 parameters are; shadows: none, or bfloat16, rounded to nearest.
// streams, firsts: those of each tensor, for its random bits. factors: those of kernels/adamw.py, in the same order.
void adamw(
    const std::vector<at::Tensor>& params,
    const std::vector<at::Tensor>& grads,
    const std::vector<at::Tensor>& exp_avgs,
    const std::vector<at::Tensor>& exp_avg_sqs,
    const std::vector<std::optional<at::Tensor>>& shadows,
    const std::vector<int64_t>& streams,
    const std::vector<int64_t>& firsts,
    const std::vector<double>& factors,
    double grad_scale,
    int64_t step,
    uint64_t seed);

} // namespace clipcore
