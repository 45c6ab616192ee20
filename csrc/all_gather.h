#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace clipcore {

// x_BE [B, E] -> [W * B, E] over the process group of that name; see all_gather.cpp.
at::Tensor all_gather_with_grad(const at::Tensor& x_BE, const std::string& group_name);

} // namespace clipcore
