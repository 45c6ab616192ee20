// Rows, ids and a header <-> the bytes of a gather, with cast: one launch a direction.
//
// Both directions are copies: each element is read once and written once, in accesses of 16 bytes if both addresses
// allow it. A thread handles as many elements at a time as fill 16 bytes of the narrower type, so that accesses to the
// wider one are whole too. Casts round as torch's .to() does: to nearest even, and from float64 to a 16-bit type through
// float32. Equal types are copied, which keeps the payload of a NaN.
//
// No torch headers: this file compiles for any architecture with nvcc alone (tests/test_pack_kernels.py).

#include "pack_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace clipcore {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048; // several for each multiprocessor of any chip; beyond, threads loop
constexpr int kRanksPerLaunch = 64;  // their offsets are a kernel argument, which needs no copy to the device

struct Header {
  int64_t word[kHeaderWords];
};

struct Shards {
  int64_t first_row[kRanksPerLaunch + 1]; // within the output; one more gives the size of the last
};

__device__ inline float widened(__half value) { return __half2float(value); }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widened(float value) { return value; }
__device__ inline double widened(double value) { return value; }

template <typename To>
struct Cast {
  template <typename From>
  static __device__ To of(From value) { return static_cast<To>(widened(value)); }
  static __device__ To of(To value) { return value; }
};

template <>
struct Cast<__half> {
  template <typename From>
  static __device__ __half of(From value) {
    return __float2half_rn(static_cast<float>(widened(value)));
  }
  static __device__ __half of(__half value) { return value; }
};

template <>
struct Cast<__nv_bfloat16> {
  template <typename From>
  static __device__ __nv_bfloat16 of(From value) {
    return __float2bfloat16_rn(static_cast<float>(widened(value)));
  }
  static __device__ __nv_bfloat16 of(__nv_bfloat16 value) { return value; }
};

template <typename T, int kLanes>
struct alignas(16) Lanes {
  T lane[kLanes];
};

template <typename To, typename From>
constexpr int kLanesOf = 16 / static_cast<int>(sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));

__device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// to[i] = from[i] for all i below count, by all threads of the grid's x axis.
template <typename To, typename From>
__device__ void cast_range(To* to, const From* from, int64_t count) {
  constexpr int kLanes = kLanesOf<To, From>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t done = 0;
  if (is_aligned(to) && is_aligned(from)) {
    const int64_t num_groups = count / kLanes;
#pragma unroll 1
    for (int64_t group = first; group < num_groups; group += stride) {
      const auto read = reinterpret_cast<const Lanes<From, kLanes>*>(from)[group];
      Lanes<To, kLanes> written;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        written.lane[i] = Cast<To>::of(read.lane[i]);
      }
      reinterpret_cast<Lanes<To, kLanes>*>(to)[group] = written;
    }
    done = num_groups * kLanes;
  }
#pragma unroll 1
  for (int64_t i = done + first; i < count; i += stride) {
    to[i] = Cast<To>::of(from[i]);
  }
}

template <typename Wire, typename Row>
__global__ void __launch_bounds__(kThreads) pack_kernel(
    const Header header, const int64_t* ids, const Row* rows, int64_t num_rows, int64_t num_elements,
    char* part, int64_t ids_at, int64_t rows_at) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kHeaderWords; ++i) { // indices known at compile time keep the header off the stack
      reinterpret_cast<int64_t*>(part)[i] = header.word[i];
    }
  }
  if (ids != nullptr) {
    cast_range(reinterpret_cast<int64_t*>(part + ids_at), ids, num_rows);
  }
  cast_range(reinterpret_cast<Wire*>(part + rows_at), rows, num_elements);
}

// Each y of the grid handles one rank.
template <typename Wire, typename Row>
__global__ void __launch_bounds__(kThreads) unpack_kernel(
    const char* parts, int64_t part_bytes, int64_t ids_at, int64_t rows_at, const Shards shards,
    int64_t num_columns, int64_t* ids, Row* rows) {
  const char* part = parts + blockIdx.y * part_bytes;
  const int64_t first_row = shards.first_row[blockIdx.y];
  const int64_t num_rows = shards.first_row[blockIdx.y + 1] - first_row;
  if (ids != nullptr) {
    cast_range(ids + first_row, reinterpret_cast<const int64_t*>(part + ids_at), num_rows);
  }
  cast_range(
      rows + first_row * num_columns, reinterpret_cast<const Wire*>(part + rows_at),
      num_rows * num_columns);
}

// Calls function(Wire(), Row()) with values of the two types; returns false for a number that is no type.
template <typename Function>
bool with_type(int type, const Function& function) {
  switch (type) {
    case kFloat16: function(__half()); return true;
    case kBFloat16: function(__nv_bfloat16()); return true;
    case kFloat32: function(float()); return true;
    case kFloat64: function(double()); return true;
    default: return false;
  }
}

template <typename Function>
bool with_types(int wire_type, int rows_type, const Function& function) {
  bool known = false;
  with_type(wire_type, [&](auto wire) {
    known = with_type(rows_type, [&](auto row) { function(wire, row); });
  });
  return known;
}

unsigned num_blocks(int64_t num_elements, int64_t limit) {
  const int64_t wanted = (num_elements + 8 * kThreads - 1) / (8 * kThreads);
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, limit));
}

} // namespace

cudaError_t launch_pack(
    const int64_t* header, const int64_t* ids, const void* rows, int64_t num_rows, int64_t num_columns,
    int rows_type, void* part, int64_t ids_at, int64_t rows_at, int wire_type, cudaStream_t stream) {
  Header words;
  std::copy_n(header, kHeaderWords, words.word);
  const int64_t num_elements = num_rows * num_columns;
  const dim3 grid(num_blocks(std::max(num_elements, num_rows), kMaxBlocks));
  const bool known = with_types(wire_type, rows_type, [&](auto wire, auto row) {
    using Wire = decltype(wire);
    using Row = decltype(row);
    pack_kernel<Wire, Row><<<grid, kThreads, 0, stream>>>(
        words, ids, static_cast<const Row*>(rows), num_rows, num_elements, static_cast<char*>(part), ids_at,
        rows_at);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

cudaError_t launch_unpack(
    const void* parts, int64_t part_bytes, int64_t ids_at, int64_t rows_at, const int64_t* shard_sizes,
    int64_t num_ranks, int64_t num_columns, int wire_type, int64_t* ids, void* rows, int rows_type,
    cudaStream_t stream) {
  int64_t first_row = 0;
  for (int64_t rank = 0; rank < num_ranks; rank += kRanksPerLaunch) {
    const int64_t count = std::min<int64_t>(kRanksPerLaunch, num_ranks - rank);
    Shards shards{};
    int64_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      shards.first_row[i] = first_row;
      first_row += shard_sizes[rank + i];
      largest = std::max(largest, shard_sizes[rank + i]);
    }
    shards.first_row[count] = first_row;
    if (largest == 0) {
      continue;
    }
    const int64_t limit = std::max<int64_t>(1, kMaxBlocks / count);
    const dim3 grid(num_blocks(std::max(largest * num_columns, largest), limit), static_cast<unsigned>(count));
    const char* first_part = static_cast<const char*>(parts) + rank * part_bytes;
    const bool known = with_types(wire_type, rows_type, [&](auto wire, auto row) {
      using Wire = decltype(wire);
      using Row = decltype(row);
      unpack_kernel<Wire, Row><<<grid, kThreads, 0, stream>>>(
          first_part, part_bytes, ids_at, rows_at, shards, num_columns, ids, static_cast<Row*>(rows));
    });
    if (!known) {
      return cudaErrorInvalidValue;
    }
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

} // namespace clipcore
