#pragma once

// The CUDA kernels of pack.cpp, launched without torch's headers.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace clipcore {

// Element types, with their numbers in c10::ScalarType.
enum ElementType : int { kFloat16 = 5, kFloat32 = 6, kFloat64 = 7, kBFloat16 = 15 };

constexpr int kHeaderWords = 8;

// Writes one rank's part: the header (eight words on the host), the ids (null for none) at byte ids_at, and the
// rows, cast to the wire's type, at byte rows_at. Part and offsets are multiples of 16 bytes; ids and rows are
// contiguous.
cudaError_t launch_pack(
    const int64_t* header, const int64_t* ids, const void* rows, int64_t num_rows, int64_t num_columns,
    int rows_type, void* part, int64_t ids_at, int64_t rows_at, int wire_type, cudaStream_t stream);

// Reads all ranks' parts, part_bytes apart, into ids (null for none) and rows without gaps, in rank order. It
// takes shard_sizes[r] rows of rank r (host memory, num_ranks numbers).
cudaError_t launch_unpack(
    const void* parts, int64_t part_bytes, int64_t ids_at, int64_t rows_at, const int64_t* shard_sizes,
    int64_t num_ranks, int64_t num_columns, int wire_type, int64_t* ids, void* rows, int rows_type,
    cudaStream_t stream);

} // namespace clipcore
