// Run the kernels of csrc/pack_kernels.cu on the host: every thread of every block in turn.
// They have no barriers and no shared memory. The test writes pack_kernels_on_host.inc: the kernels' source, with each
// launch turned into a call of on_host.

#include <cuda_runtime_api.h>

#define __launch_bounds__(threads)
static dim3 gridDim, blockDim;
static uint3 blockIdx, threadIdx;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
void on_host(void (*kernel)(Parameters...), dim3 grid, int threads, Arguments... arguments) {
  gridDim = grid;
  blockDim = dim3(threads);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
}

#include "pack_kernels_on_host.inc"

extern "C" int pack(const int64_t* header, const int64_t* ids, const void* rows, int64_t num_rows, int64_t num_columns,
    int rows_type, void* part, int64_t ids_at, int64_t rows_at, int wire_type) {
  return clipcore::launch_pack(header, ids, rows, num_rows, num_columns, rows_type, part, ids_at, rows_at, wire_type, 0);
}

extern "C" int unpack(const void* parts, int64_t part_bytes, int64_t ids_at, int64_t rows_at,
    const int64_t* shard_sizes, int64_t num_ranks, int64_t num_columns, int wire_type, int64_t* ids, void* rows,
    int rows_type) {
  return clipcore::launch_unpack(
      parts, part_bytes, ids_at, rows_at, shard_sizes, num_ranks, num_columns, wire_type, ids, rows, rows_type, 0);
}
