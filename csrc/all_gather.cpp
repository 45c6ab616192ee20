// The gradient all-gather over a c10d process group, as one C++ autograd function.
//
// Letters: B rows on this rank, E features, W ranks in the group, G = W * B.
// Forward:  y_GE = concat over ranks of x_BE, in rank order; bit-exact, in the dtype of x.
// Backward: dx_BE = this rank's rows of sum over ranks of dy_GE. The sum runs in float32 for narrower
//           dtypes and in float64 for float64, then is rounded once to the dtype of x: W bfloat16
//           addends would otherwise lose a bit of the gradient with every doubling of the group.
//
// Only ATen and c10d calls: the same code serves gloo on the CPU and NCCL on CUDA tensors. The group
// travels by name, because the name outlives torch's changes to the Python type of a group.

#include "all_gather.h"

#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <ATen/ops/_assert_async.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

namespace clipcore {
namespace {

using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;

// torch 2.13 renamed the single-tensor collectives; the old names are deprecated there.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
constexpr auto kGather = &c10d::ProcessGroup::all_gather_single;
constexpr auto kReduceScatter = &c10d::ProcessGroup::reduce_scatter_single;
#else
constexpr auto kGather = &c10d::ProcessGroup::_allgather_base;
constexpr auto kReduceScatter = &c10d::ProcessGroup::_reduce_scatter_base;
#endif

at::Tensor gather(const GroupPtr& group, at::Tensor x) {
  auto sizes = x.sizes().vec();
  sizes[0] *= group->getSize();
  auto y = at::empty(sizes, x.options());
  ((*group).*kGather)(y, x, c10d::AllgatherOptions())->wait();
  return y;
}

at::Tensor reduce_scatter(const GroupPtr& group, at::Tensor dy) {
  auto sizes = dy.sizes().vec();
  sizes[0] /= group->getSize();
  auto dx = at::empty(sizes, dy.options());
  ((*group).*kReduceScatter)(dx, dy, c10d::ReduceScatterOptions())->wait();
  return dx;
}

// Ranks that disagree about the shape or the dtype would hang, or exchange garbage. Each rank
// therefore sends one number first: dtype (7 bits), rows (32 bits), columns (24 bits). On CUDA the
// comparison stays on the device, so that the host never waits for it.
void check_same_on_all_ranks(const GroupPtr& group, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      x.size(0) < (int64_t{1} << 32) && x.size(1) < (int64_t{1} << 24),
      "all_gather_with_grad: at most 2^32 - 1 rows and 2^24 - 1 columns, got shape ", x.sizes());
  const int64_t mine = (static_cast<int64_t>(x.scalar_type()) << 56) | (x.size(0) << 24) | x.size(1);
  auto signatures = gather(group, at::full({1}, mine, x.options().dtype(at::kLong)));
  if (!x.is_cpu()) {
    at::_assert_async(
        signatures.eq(mine).all(),
        "all_gather_with_grad: every rank must pass the same number of rows, columns and dtype");
    return;
  }
  const auto* theirs = signatures.const_data_ptr<int64_t>();
  for (int64_t rank = 0; rank < signatures.size(0); ++rank) {
    TORCH_CHECK_VALUE(
        theirs[rank] == mine,
        "all_gather_with_grad: every rank must pass the same shape and dtype, but rank ",
        group->getRank(), " has ", x.sizes(), " ", x.scalar_type(), " and rank ", rank, " has [",
        (theirs[rank] >> 24) & 0xffffffff, ", ", theirs[rank] & 0xffffff, "] ",
        static_cast<at::ScalarType>(theirs[rank] >> 56));
  }
}

class AllGather : public torch::autograd::Function<AllGather> {
 public:
  static at::Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const at::Tensor& x_BE,
      const std::string& group_name) {
    ctx->saved_data["group_name"] = group_name;
    const auto group = c10d::resolve_process_group(group_name);
    check_same_on_all_ranks(group, x_BE);
    return gather(group, x_BE);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const auto group = c10d::resolve_process_group(ctx->saved_data["group_name"].toStringRef());
    const auto& dy_GE = grads[0];
    const auto sum_dtype = dy_GE.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    auto dx_BE = reduce_scatter(group, dy_GE.to(sum_dtype).contiguous());
    return {dx_BE.to(dy_GE.scalar_type()), at::Tensor()};
  }
};

} // namespace

at::Tensor all_gather_with_grad(const at::Tensor& x_BE, const std::string& group_name) {
  TORCH_CHECK_VALUE(
      x_BE.dim() == 2, "all_gather_with_grad: expected x [B, E], got shape ", x_BE.sizes());
  TORCH_CHECK_VALUE(
      x_BE.is_contiguous(), "all_gather_with_grad: x must be contiguous; call x.contiguous()");
  TORCH_CHECK_VALUE(
      x_BE.is_floating_point(),
      "all_gather_with_grad: x must be a floating-point tensor, got ", x_BE.scalar_type());
  return AllGather::apply(x_BE, group_name);
}

} // namespace clipcore
