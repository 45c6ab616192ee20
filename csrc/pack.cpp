// Several tensors <-> one wire buffer, with cast: the CPU code, and the dispatch to the CUDA kernels.
//
// On the CPU, ATen's own copy casts, in parallel and with its bits. On CUDA, one kernel does it all (pack_kernels.cu), if
// the build had a CUDA toolkit.

#include "pack.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#ifdef CLIPCORE_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "pack_kernels.h"
#endif

namespace clipcore {
namespace {

// A view of the numbers from a byte of a wire buffer on.
at::Tensor numbers(const at::Tensor& bytes, int64_t at, int64_t count, at::ScalarType dtype) {
  return bytes.narrow(0, at, count * static_cast<int64_t>(at::elementSize(dtype))).view(dtype);
}

void check_device(const at::Tensor& x) {
  TORCH_CHECK(
      x.is_cpu() || (x.is_cuda() && has_cuda_kernels()),
      "clipcore._C was built without CUDA kernels and got a tensor on ", x.device(),
      "; build it where an nvcc of torch's CUDA version is on the PATH");
}

} // namespace

bool has_cuda_kernels() {
#ifdef CLIPCORE_WITH_CUDA
  return true;
#else
  return false;
#endif
}

at::Tensor pack(
    const std::vector<int64_t>& header, const std::optional<at::Tensor>& ids_B, const at::Tensor& x_BE,
    const Layout& layout) {
  check_device(x_BE);
  const at::NoGradGuard no_grad;
  const int64_t num_rows = std::min(x_BE.size(0), layout.max_rows);
  const int64_t num_columns = x_BE.size(1);
  auto part = at::empty({layout.part_bytes}, x_BE.options().dtype(at::kByte));
  if (x_BE.is_cpu()) {
    std::memcpy(part.mutable_data_ptr(), header.data(), header.size() * sizeof(int64_t));
    if (ids_B.has_value()) {
      numbers(part, layout.ids_at, num_rows, at::kLong).copy_(ids_B->narrow(0, 0, num_rows));
    }
    numbers(part, layout.rows_at, num_rows * num_columns, layout.wire_dtype)
        .view({num_rows, num_columns})
        .copy_(x_BE.narrow(0, 0, num_rows));
    return part;
  }
#ifdef CLIPCORE_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x_BE.device());
  const auto rows = x_BE.contiguous();
  const auto ids = ids_B.has_value() ? ids_B->contiguous() : at::Tensor();
  C10_CUDA_CHECK(launch_pack(
      header.data(), ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr, rows.const_data_ptr(),
      num_rows, num_columns, static_cast<int>(rows.scalar_type()), part.mutable_data_ptr(), layout.ids_at,
      layout.rows_at, static_cast<int>(layout.wire_dtype), c10::cuda::getCurrentCUDAStream()));
#endif
  return part;
}

std::pair<at::Tensor, std::optional<at::Tensor>> unpack(
    const at::Tensor& parts, const Layout& layout, const std::vector<int64_t>& shard_sizes,
    int64_t num_columns, at::ScalarType rows_dtype, bool has_ids) {
  check_device(parts);
  const at::NoGradGuard no_grad;
  const int64_t num_rows = std::accumulate(shard_sizes.begin(), shard_sizes.end(), int64_t{0});
  auto rows_GE = at::empty({num_rows, num_columns}, parts.options().dtype(rows_dtype));
  std::optional<at::Tensor> ids_G;
  if (has_ids) {
    ids_G = at::empty({num_rows}, parts.options().dtype(at::kLong));
  }
  if (parts.is_cpu()) {
    int64_t first = 0;
    for (size_t rank = 0; rank < shard_sizes.size(); ++rank) {
      const int64_t size = shard_sizes[rank];
      const int64_t part = static_cast<int64_t>(rank) * layout.part_bytes;
      if (has_ids) {
        ids_G->narrow(0, first, size).copy_(numbers(parts, part + layout.ids_at, size, at::kLong));
      }
      rows_GE.narrow(0, first, size)
          .copy_(numbers(parts, part + layout.rows_at, size * num_columns, layout.wire_dtype)
                     .view({size, num_columns}));
      first += size;
    }
    return {rows_GE, ids_G};
  }
#ifdef CLIPCORE_WITH_CUDA
  const c10::cuda::CUDAGuard guard(parts.device());
  C10_CUDA_CHECK(launch_unpack(
      parts.const_data_ptr(), layout.part_bytes, layout.ids_at, layout.rows_at, shard_sizes.data(),
      static_cast<int64_t>(shard_sizes.size()), num_columns, static_cast<int>(layout.wire_dtype),
      has_ids ? ids_G->mutable_data_ptr<int64_t>() : nullptr, rows_GE.mutable_data_ptr(),
      static_cast<int>(rows_dtype), c10::cuda::getCurrentCUDAStream()));
#endif
  return {rows_GE, ids_G};
}

} // namespace clipcore
