// Bicubic resizing of 8-bit RGB pictures, equal to Pillow's to the bit.

#pragma once

#include <cstdint>

namespace clipcore {

// pixels: interleaved RGB, `height` rows of `width` pixels, `row_bytes` apart. planes: uint8 [3, out_height, out_width].
// All sides are at least 1. columns_first: whether the pass along columns is the first. The second pass
// sees the rounding of the first.
void resample_bicubic(
    const uint8_t* pixels,
    int64_t row_bytes,
    int width,
    int height,
    uint8_t* planes,
    int out_width,
    int out_height,
    bool columns_first);

} // namespace clipcore
