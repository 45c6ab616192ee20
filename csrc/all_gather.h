#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pack.h"

namespace clipcore {

// One gather from its start to the end of its backward; see all_gather.cpp.
class Exchange : public torch::CustomClassHolder {
 public:
  // Packs this rank's part and starts the collective.
  Exchange(
      const at::Tensor& x_BE, const std::optional<at::Tensor>& ids_B, const std::vector<int64_t>& header,
      std::vector<int64_t> shard_sizes, Layout layout, const std::string& group_name);

  // Waits for all parts; returns their headers, int64 [W, 8].
  at::Tensor headers();

  // After `headers`: returns rows_GE, sets `ids_G_`, and frees the buffers.
  at::Tensor unpack_rows();

  // Starts the sum over ranks of the gradient of rows_GE (undefined for zeros).
  void start_sum(const at::Tensor& grad_GE);

  // Waits for that sum; returns this rank's rows [B, E] of it, in the dtype of the sum. If it was not started, this
  // rank contributes zeros.
  at::Tensor take_sum();

  at::ScalarType dtype() const { return x_options_.dtype().toScalarType(); }
  const std::optional<at::Tensor>& ids_G() const { return ids_G_; }

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::vector<int64_t> shard_sizes_;
  Layout layout_;
  int64_t num_rows_;
  int64_t num_columns_;
  at::TensorOptions x_options_;
  bool has_ids_;
  at::Tensor part_;
  at::Tensor parts_;
  std::optional<at::Tensor> ids_G_;
  c10::intrusive_ptr<c10d::Work> gathering_;
  at::Tensor summand_;
  at::Tensor sum_;
  c10::intrusive_ptr<c10d::Work> summing_;
};

using ExchangePtr = c10::intrusive_ptr<Exchange>;

// The exchange, and x_BE as the anchor returns it.
std::tuple<ExchangePtr, at::Tensor> start_gather(
    const at::Tensor& x_BE, const std::optional<at::Tensor>& ids_B, const std::vector<int64_t>& header,
    const std::vector<int64_t>& shard_sizes, int64_t ids_at, int64_t rows_at, int64_t part_bytes,
    at::ScalarType wire_dtype, const std::string& group_name);

at::Tensor headers(const ExchangePtr& exchange);

// rows_GE with its node in the graph, and ids_G.
std::tuple<at::Tensor, std::optional<at::Tensor>> unpack_gather(
    const ExchangePtr& exchange, const at::Tensor& own_BE);

} // namespace clipcore
