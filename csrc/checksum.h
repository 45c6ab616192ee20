// CRC-32 as zlib computes it, at the speed of memory.

#pragma once

#include <cstddef>
#include <cstdint>

namespace clipcore {

// The CRC-32 of `size` bytes, by zlib's polynomial and conventions.
uint32_t crc32(const uint8_t* bytes, size_t size);

} // namespace clipcore
