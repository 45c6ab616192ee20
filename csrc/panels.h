// Products of small matrices whose factors are in panels, and vector functions for them.
//
// C[m, n] = A[m, k] B[k, n] keeps a tile of C in registers and reads 2 W adjacent columns of B at a time. So a factor B is in
// panels [n / 2W][k][2W]; a factor A may have any strides, and may be transposed. All functions are inlined into functions that
// are compiled for a given processor (`target`) with vectors of width W.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

// Vectors are never passed between functions at run time: all that take or return them are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace clipcore {

// W floats, and as many integers, in a register; in memory they need no alignment.
template <int W>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * W), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

template <int W>
CLIPCORE_INLINE typename Lanes<W>::F load(const float* from) {
  return *reinterpret_cast<const typename Lanes<W>::F*>(from);
}

template <int W>
CLIPCORE_INLINE void store(float* to, const typename Lanes<W>::F& value) {
  *reinterpret_cast<typename Lanes<W>::F*>(to) = value;
}

// The numbers of W lanes from `first` on.
alignas(64) constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <int W>
CLIPCORE_INLINE void number_from(int32_t first, typename Lanes<W>::I& numbers) {
  numbers = *reinterpret_cast<const typename Lanes<W>::I*>(kLanes) + first;
}

// The values where all bits of the mask are set, else 0. With `?:` the compiler would select one by one.
template <int W>
CLIPCORE_INLINE typename Lanes<W>::F where(const typename Lanes<W>::I& mask, const typename Lanes<W>::F& values) {
  return reinterpret_cast<typename Lanes<W>::F>(reinterpret_cast<typename Lanes<W>::I>(values) & mask);
}

// e^x of arguments at most slightly above 0, to an ulp or two; 0 below the normal numbers. NaN stays NaN.
// The polynomial is that of the Cephes library.
template <int W>
CLIPCORE_INLINE typename Lanes<W>::F exponential(const typename Lanes<W>::F& x) {
  typedef typename Lanes<W>::F F;
  typedef typename Lanes<W>::I I;
  constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the last bits
  const F shifted = x * 1.44269504088896341f + kRound;
  const F whole = shifted - kRound;
  const F r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000 + 127) << 23;
  F power;
  std::memcpy(&power, &bits, sizeof(power));
  return where<W>(~(x < -87.0f), p * power);
}

// Write a tile of C, M rows and N vectors, or add to it.
template <int W, int M, int N, bool kAdds>
CLIPCORE_INLINE void multiply_tile(
    int64_t k,
    const float* a,
    int64_t a_row,
    int64_t a_column,
    const float* b,
    float* c,
    int64_t c_row) {
  typedef typename Lanes<W>::F F;
  F sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      sums[m][n] = kAdds ? load<W>(c + m * c_row + n * W) : F{};
  for (int64_t i = 0; i < k; i++) {
    F row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      row[n] = load<W>(b + i * 2 * W + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const float factor = a[m * a_row + i * a_column];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
        sums[m][n] += row[n] * factor;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      store<W>(c + m * c_row + n * W, sums[m][n]);
}

// C[m, n] (+)= A[m, k] B[k, n], with m a multiple of M and n one of W; the panels of B lie `panel` apart.
template <int W, int M, bool kAdds>
CLIPCORE_INLINE void multiply(
    int64_t m,
    int64_t n,
    int64_t k,
    const float* a,
    int64_t a_row,
    int64_t a_column,
    const float* b,
    int64_t panel,
    float* c,
    int64_t c_row) {
  for (int64_t j = 0; j < n; j += 2 * W, b += panel)
    for (int64_t i = 0; i < m; i += M)
      if (n - j >= 2 * W)
        multiply_tile<W, M, 2, kAdds>(k, a + i * a_row, a_row, a_column, b, c + i * c_row + j, c_row);
      else
        multiply_tile<W, M, 1, kAdds>(k, a + i * a_row, a_row, a_column, b, c + i * c_row + j, c_row);
}

// [L, K] -> a factor A: its rows, `wide` apart, scaled.
template <int W>
CLIPCORE_INLINE void copy_rows(
    const float* from, int64_t stride, int64_t length, int64_t size, int64_t wide, float factor, float* to) {
  for (int64_t i = 0; i < length; i++) {
    int64_t k = 0;
    for (; k + W <= size; k += W)
      store<W>(to + i * wide + k, load<W>(from + i * stride + k) * factor);
    for (; k < size; k++)
      to[i * wide + k] = from[i * stride + k] * factor;
  }
}

// [L, K] -> panels of its columns, [K / 2W][L][2W]: the factor B of a sum over tokens.
template <int W>
CLIPCORE_INLINE void copy_panels(
    const float* from, int64_t stride, int64_t length, int64_t size, float factor, float* to) {
  for (int64_t column = 0; column < size; column += 2 * W)
    copy_rows<W>(
        from + column, stride, length, std::min<int64_t>(2 * W, size - column), 2 * W, factor, to + column * length);
}

// Transpose W rows of W numbers in place: swap blocks of half the side, then of a quarter, and so on.
template <int W>
CLIPCORE_INLINE void transpose(typename Lanes<W>::F (&rows)[W]) {
  typedef typename Lanes<W>::I I;
  I lanes;
  number_from<W>(0, lanes);
#pragma GCC unroll 4
  for (int side = W / 2; side > 0; side /= 2) {
    const I is_right = (lanes & side) != 0;
    const I left = is_right ? lanes - side + W : lanes;
    const I right = is_right ? lanes + W : lanes + side;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if ((i & side) == 0) {
        const auto above = rows[i], below = rows[i + side];
        rows[i] = __builtin_shuffle(above, below, left);
        rows[i + side] = __builtin_shuffle(above, below, right);
      }
  }
}

// [L, K] -> panels of its transpose's columns, [L / 2W][K][2W]: the factor B of a sum over a head's columns.
template <int W>
CLIPCORE_INLINE void copy_transposed(
    const float* from, int64_t stride, int64_t length, int64_t size, float* to) {
  typedef typename Lanes<W>::F F;
  for (int64_t first = 0; first < length; first += W) {
    const int64_t some = std::min<int64_t>(W, length - first);
    const float* source = from + first * stride;
    float* panel = to + first / (2 * W) * (2 * W) * size + first % (2 * W);
    int64_t k = 0;
    for (; k + W <= size; k += W) {
      F rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        rows[i] = i < some ? load<W>(source + i * stride + k) : F{};
      transpose<W>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        store<W>(panel + (k + i) * 2 * W, rows[i]);
    }
    for (; k < size; k++)
      for (int64_t i = 0; i < some; i++)
        panel[k * 2 * W + i] = source[i * stride + k];
  }
}

} // namespace clipcore
