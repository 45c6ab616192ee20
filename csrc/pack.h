#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace clipcore {

// One rank's part of a gather, in bytes: the header, then ids, then rows; clipcore/loss/all_gather.py defines the layout.
struct Layout {
  int64_t ids_at;
  int64_t rows_at;
  int64_t part_bytes;
  int64_t max_rows; // rows that a part has room for
  at::ScalarType wire_dtype;
};

// Whether CUDA tensors are supported.
bool has_cuda_kernels();

// header, ids_B and x_BE cast to the wire's dtype -> one part, uint8 [part_bytes]. Rows beyond max_rows are left
// out: the header then tells all ranks that there are too many.
at::Tensor pack(
    const std::vector<int64_t>& header, const std::optional<at::Tensor>& ids_B, const at::Tensor& x_BE,
    const Layout& layout);

// The parts of all ranks, uint8 [W * part_bytes] -> rows_GE in rows_dtype and ids_G (none without has_ids).
std::pair<at::Tensor, std::optional<at::Tensor>> unpack(
    const at::Tensor& parts, const Layout& layout, const std::vector<int64_t>& shard_sizes,
    int64_t num_columns, at::ScalarType rows_dtype, bool has_ids);

} // namespace clipcore
