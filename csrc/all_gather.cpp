// The gradient all-gather over a c10d process group: rows, ids and a header in one collective.
//
// Letters: B rows on this rank (they may differ between ranks), E features, W ranks, G rows of all ranks.
// Forward:  rows_GE = concat over ranks of x_BE, in rank order, cast to the wire's dtype and back.
// Backward: dx_BE = this rank's rows of sum over ranks of drows_GE, plus the gradient of own_BE. The sum runs in
//           float64 for float64 and in float32 otherwise, and is rounded once to the dtype of x. In bfloat16, each
//           doubling of the group would lose a bit of the gradient.
//
// Two autograd nodes make both directions asynchronous. The anchor, x_BE -> own_BE, is created before the collective
// has arrived, and the gather node, own_BE -> rows_GE, after it. Among ready nodes, autograd runs the most recently
// created first: the gather node, which only starts the reduce-scatter; then, during the reduce-scatter, the backward of
// what the caller computed with own_BE in between; and last the anchor, on which both depend, which waits for the sums.
//
// Only ATen and c10d calls: the same code serves gloo on the CPU and NCCL on CUDA tensors. The group is passed by name,
// because a name does not depend on torch's changes to the Python type of a group. clipcore/loss/wire.py writes and
// checks the headers.

#include "all_gather.h"

#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

namespace clipcore {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// torch 2.13 renamed the single-tensor collectives; the old names are deprecated there.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
constexpr auto kGather = &c10d::ProcessGroup::all_gather_single;
constexpr auto kReduceScatter = &c10d::ProcessGroup::reduce_scatter_single;
#else
constexpr auto kGather = &c10d::ProcessGroup::_allgather_base;
constexpr auto kReduceScatter = &c10d::ProcessGroup::_reduce_scatter_base;
#endif

constexpr int64_t kHeaderLength = 8;

ExchangePtr exchange_of(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Exchange>(ctx->saved_data["exchange"].toCapsule());
}

void refuse_second_derivative() {
  TORCH_CHECK_VALUE(
      !at::GradMode::is_enabled(),
      "start_gather has no second derivative: call backward without create_graph=True");
}

class Anchor : public torch::autograd::Function<Anchor> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_BE, const ExchangePtr& exchange) {
    ctx->saved_data["exchange"] = c10::IValue::make_capsule(exchange);
    ctx->set_materialize_grads(false);
    return x_BE;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative();
    const auto exchange = exchange_of(ctx);
    auto sum_BE = exchange->take_sum();
    if (grads[0].defined()) {
      sum_BE.add_(grads[0]);
    }
    return {sum_BE.to(exchange->dtype()), at::Tensor()};
  }
};

class Gather : public torch::autograd::Function<Gather> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& own_BE, const ExchangePtr& exchange) {
    ctx->saved_data["exchange"] = c10::IValue::make_capsule(exchange);
    ctx->set_materialize_grads(false);
    return exchange->unpack_rows();
  }

  // Nothing flows along the edge to the anchor: it only makes the anchor run later.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative();
    exchange_of(ctx)->start_sum(grads[0]);
    return {at::Tensor(), at::Tensor()};
  }
};

} // namespace

Exchange::Exchange(
    const at::Tensor& x_BE, const std::optional<at::Tensor>& ids_B, const std::vector<int64_t>& header,
    std::vector<int64_t> shard_sizes, Layout layout, const std::string& group_name)
    : group_(c10d::resolve_process_group(group_name)),
      shard_sizes_(std::move(shard_sizes)),
      layout_(layout),
      num_rows_(x_BE.size(0)),
      num_columns_(x_BE.size(1)),
      x_options_(x_BE.options()),
      has_ids_(ids_B.has_value()),
      part_(pack(header, ids_B, x_BE, layout)),
      parts_(at::empty({group_->getSize() * layout.part_bytes}, part_.options())) {
  gathering_ = ((*group_).*kGather)(parts_, part_, c10d::AllgatherOptions());
}

at::Tensor Exchange::headers() {
  TORCH_CHECK(gathering_, "the rows of this gather were taken before");
  gathering_->wait();
  const auto words = parts_.view(at::kLong).view({static_cast<int64_t>(shard_sizes_.size()), -1});
  return words.narrow(1, 0, kHeaderLength);
}

at::Tensor Exchange::unpack_rows() {
  TORCH_CHECK(gathering_, "the rows of this gather were taken before");
  auto [rows_GE, ids_G] =
      unpack(parts_, layout_, shard_sizes_, num_columns_, dtype(), has_ids_);
  ids_G_ = std::move(ids_G);
  part_.reset();
  parts_.reset();
  gathering_.reset();
  return rows_GE;
}

void Exchange::start_sum(const at::Tensor& grad_GE) {
  if (summing_) { // from a backward pass that ended before the anchor
    summing_->wait();
  }
  const auto options = x_options_.dtype(dtype() == at::kDouble ? at::kDouble : at::kFloat);
  const auto num_ranks = static_cast<int64_t>(shard_sizes_.size());
  const bool even = std::all_of(shard_sizes_.begin(), shard_sizes_.end(), [this](int64_t size) {
    return size == layout_.max_rows;
  });
  if (grad_GE.defined() && even) {
    summand_ = grad_GE.to(options.dtype()).contiguous();
  } else {
    summand_ = at::zeros({num_ranks * layout_.max_rows, num_columns_}, options);
    int64_t first = 0;
    for (int64_t rank = 0; grad_GE.defined() && rank < num_ranks; ++rank) {
      const int64_t size = shard_sizes_[rank];
      summand_.narrow(0, rank * layout_.max_rows, size).copy_(grad_GE.narrow(0, first, size));
      first += size;
    }
  }
  sum_ = at::empty({layout_.max_rows, num_columns_}, options);
  if (sum_.numel() > 0) {
    summing_ = ((*group_).*kReduceScatter)(sum_, summand_, c10d::ReduceScatterOptions());
  }
}

at::Tensor Exchange::take_sum() {
  if (!sum_.defined()) {
    start_sum(at::Tensor());
  }
  if (summing_) {
    summing_->wait();
  }
  summing_.reset();
  summand_.reset();
  return std::exchange(sum_, at::Tensor()).narrow(0, 0, num_rows_);
}

std::tuple<ExchangePtr, at::Tensor> start_gather(
    const at::Tensor& x_BE, const std::optional<at::Tensor>& ids_B, const std::vector<int64_t>& header,
    const std::vector<int64_t>& shard_sizes, int64_t ids_at, int64_t rows_at, int64_t part_bytes,
    at::ScalarType wire_dtype, const std::string& group_name) {
  TORCH_CHECK_VALUE(x_BE.dim() == 2, "start_gather: expected x [B, E], got shape ", x_BE.sizes());
  TORCH_CHECK_VALUE(
      x_BE.is_floating_point() && at::isFloatingType(wire_dtype),
      "start_gather: x and the wire must be of a floating-point dtype, got ", x_BE.scalar_type(), " and ",
      wire_dtype);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(header.size()) == kHeaderLength, "start_gather: a header has ", kHeaderLength,
      " numbers, got ", header.size());
  TORCH_CHECK_VALUE(
      !ids_B.has_value() ||
          (ids_B->dim() == 1 && ids_B->size(0) == x_BE.size(0) && ids_B->scalar_type() == at::kLong &&
           ids_B->device() == x_BE.device()),
      "start_gather: expected ids as int64 [", x_BE.size(0), "] on ", x_BE.device());
  TORCH_CHECK_VALUE(!shard_sizes.empty(), "start_gather: shard_sizes is empty");
  const int64_t max_rows = *std::max_element(shard_sizes.begin(), shard_sizes.end());
  const int64_t rows_bytes =
      max_rows * x_BE.size(1) * static_cast<int64_t>(at::elementSize(wire_dtype));
  const int64_t ids_bytes = ids_B.has_value() ? max_rows * static_cast<int64_t>(sizeof(int64_t)) : 0;
  const int64_t header_bytes = kHeaderLength * static_cast<int64_t>(sizeof(int64_t));
  TORCH_CHECK_VALUE(
      header_bytes <= ids_at && ids_at + ids_bytes <= rows_at && rows_at + rows_bytes <= part_bytes &&
          ids_at % 16 == 0 && rows_at % 16 == 0 && part_bytes % 16 == 0,
      "start_gather: a part has a header, ids and rows one behind the other, each at a multiple of 16 bytes");
  const Layout layout{ids_at, rows_at, part_bytes, max_rows, wire_dtype};
  auto exchange = c10::make_intrusive<Exchange>(x_BE, ids_B, header, shard_sizes, layout, group_name);
  auto own_BE = Anchor::apply(x_BE, exchange);
  return {std::move(exchange), std::move(own_BE)};
}

at::Tensor headers(const ExchangePtr& exchange) {
  return exchange->headers();
}

std::tuple<at::Tensor, std::optional<at::Tensor>> unpack_gather(
    const ExchangePtr& exchange, const at::Tensor& own_BE) {
  auto rows_GE = Gather::apply(own_BE, exchange);
  return {std::move(rows_GE), exchange->ids_G()};
}

} // namespace clipcore
