// Bicubic resizing as Pillow defines it: a = -1/2, the kernel widened by the reduction, along rows and then along columns or
// the other way round, each pass rounded to 8 bits. Coefficients are integer multiples of 2^-22, so sums are integers and the
// order of summation is free. Many pixels are summed at once: several rows in one pass, several columns in the other.
// clipcore/data/resample.py checks that the installed Pillow gives the same bits, and uses Pillow if it does not.

#include "resample.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace clipcore {
namespace {

constexpr int kBits = 22;
constexpr int kLanes = 32; // pixels that are summed at once

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0)
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0)
    return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// For each output position: the first source, the number of sources, and their coefficients, `most` apart.
struct Taps {
  int most = 0;
  std::vector<int> first, count;
  std::vector<int32_t> weights;
};

Taps make_taps(int size, int out_size) {
  const double scale = static_cast<double>(size) / out_size;
  const double widening = std::max(scale, 1.0), support = 2.0 * widening;
  Taps taps;
  taps.most = static_cast<int>(std::ceil(support)) * 2 + 1;
  taps.first.resize(out_size);
  taps.count.resize(out_size);
  taps.weights.assign(static_cast<size_t>(out_size) * taps.most, 0);
  std::vector<double> exact(taps.most);
  for (int i = 0; i < out_size; i++) {
    const double center = (i + 0.5) * scale, inverse = 1.0 / widening;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int count = std::min(static_cast<int>(center + support + 0.5), size) - first;
    double sum = 0.0;
    for (int k = 0; k < count; k++) {
      exact[k] = bicubic((k + first - center + 0.5) * inverse);
      sum += exact[k];
    }
    for (int k = 0; k < count; k++) {
      const double weight = (sum != 0.0 ? exact[k] / sum : exact[k]) * (1 << kBits);
      taps.weights[static_cast<size_t>(i) * taps.most + k] =
          static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    taps.first[i] = first;
    taps.count[i] = count;
  }
  return taps;
}

// `lanes` adjacent output bytes: the weighted sums of `count` groups of bytes that are `stride` apart.
CLIPCORE_INLINE void sum_lanes(
    const uint8_t* source,
    int64_t stride,
    const int32_t* weights,
    int count,
    int lanes,
    uint8_t* result) {
  int32_t sums[kLanes];
  for (int i = 0; i < lanes; i++)
    sums[i] = 1 << (kBits - 1);
  for (int k = 0; k < count; k++)
    for (int i = 0; i < lanes; i++)
      sums[i] += source[k * stride + i] * weights[k];
  for (int i = 0; i < lanes; i++)
    result[i] = static_cast<uint8_t>(std::min(std::max(sums[i] >> kBits, 0), 255));
}

// Along rows: interleaved pixels [height, width, 3] to planes [3, height, out_width].
CLIPCORE_VECTORS void along_rows(
    const uint8_t* pixels,
    int64_t row_bytes,
    int width,
    int height,
    const Taps& taps,
    uint8_t* planes,
    int out_width) {
  // A transposed block of rows, so that lanes are adjacent: [width, 3, kLanes].
  std::vector<uint8_t> turned(static_cast<size_t>(width) * 3 * kLanes, 0);
  alignas(32) uint8_t result[kLanes];
  for (int top = 0; top < height; top += kLanes) {
    const int rows = std::min(kLanes, height - top);
    for (int r = 0; r < rows; r++) {
      const uint8_t* row = pixels + (top + r) * row_bytes;
      for (int j = 0; j < 3 * width; j++)
        turned[static_cast<size_t>(j) * kLanes + r] = row[j];
    }
    for (int c = 0; c < 3; c++) {
      uint8_t* plane = planes + (static_cast<size_t>(c) * height + top) * out_width;
      for (int x = 0; x < out_width; x++) {
        const uint8_t* source = turned.data() + (static_cast<size_t>(taps.first[x]) * 3 + c) * kLanes;
        const int32_t* weights = taps.weights.data() + static_cast<size_t>(x) * taps.most;
        sum_lanes(source, 3 * kLanes, weights, taps.count[x], kLanes, result);
        for (int r = 0; r < rows; r++)
          plane[static_cast<size_t>(r) * out_width + x] = result[r];
      }
    }
  }
}

// Along columns: `height` rows of `width` bytes, `row_bytes` apart, to out_height rows of as many bytes, contiguous.
CLIPCORE_VECTORS void along_columns(
    const uint8_t* rows, int64_t row_bytes, int width, const Taps& taps, uint8_t* out, int out_height) {
  for (int y = 0; y < out_height; y++) {
    const uint8_t* source = rows + taps.first[y] * row_bytes;
    const int32_t* weights = taps.weights.data() + static_cast<size_t>(y) * taps.most;
    uint8_t* result = out + static_cast<size_t>(y) * width;
    int x = 0;
    for (; x + kLanes <= width; x += kLanes)
      sum_lanes(source + x, row_bytes, weights, taps.count[y], kLanes, result + x);
    if (x < width)
      sum_lanes(source + x, row_bytes, weights, taps.count[y], width - x, result + x);
  }
}

} // namespace

void resample_bicubic(
    const uint8_t* pixels,
    int64_t row_bytes,
    int width,
    int height,
    uint8_t* planes,
    int out_width,
    int out_height,
    bool columns_first) {
  const Taps across = make_taps(width, out_width), down = make_taps(height, out_height);
  if (columns_first) {
    // Along columns, the three colours of a row need no special care: they are bytes like any others.
    std::vector<uint8_t> between(static_cast<size_t>(out_height) * 3 * width);
    along_columns(pixels, row_bytes, 3 * width, down, between.data(), out_height);
    along_rows(between.data(), 3 * width, width, out_height, across, planes, out_width);
    return;
  }
  const size_t plane = static_cast<size_t>(height) * out_width;
  std::vector<uint8_t> between(3 * plane);
  along_rows(pixels, row_bytes, width, height, across, between.data(), out_width);
  for (int c = 0; c < 3; c++) {
    uint8_t* out = planes + static_cast<size_t>(c) * out_height * out_width;
    along_columns(between.data() + c * plane, out_width, out_width, down, out, out_height);
  }
}

} // namespace clipcore
