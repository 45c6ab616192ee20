// Bicubic resizing of 8-bit RGB pictures, equal to Pillow's to the bit.

#pragma once

#include <cstdint>

namespace clipcore {

// pixels: interleaved RGB, `height` rows of `width` pixels, `row_bytes` apart. planes: uint8 [3, out_height, out_width].
// All sides are at least 1. columns_first: which of the two passes is the first, whose rounding the other sees.
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
