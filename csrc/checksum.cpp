// CRC-32: bytes are the coefficients of a polynomial over two elements, the checksum is its remainder by zlib's polynomial P.
// Products without carries replace a block of bits that lies n bits ahead by a shorter one with the same remainder (Gopal et
// al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ, Intel 2009). 64 bytes are folded at once, since a
// processor multiplies several pairs independently. The last 16 bytes, and what is left over, go through a table.

#include "checksum.h"

#include <array>

#if defined(__x86_64__) && defined(__GNUC__)
#define CLIPCORE_X86_PRODUCTS
#include <immintrin.h>
#endif

namespace clipcore {
namespace {

// P without its highest power, with the lowest bit first, as are all polynomials here.
constexpr uint32_t kPolynomial = 0xEDB88320;

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t rest = i;
    for (int bit = 0; bit < 8; bit++)
      rest = (rest >> 1) ^ (rest & 1 ? kPolynomial : 0);
    table[i] = rest;
  }
  return table;
}

constexpr auto kTable = make_table();

uint32_t by_table(uint32_t state, const uint8_t* bytes, size_t size) {
  for (size_t i = 0; i < size; i++)
    state = (state >> 8) ^ kTable[(state ^ bytes[i]) & 0xFF];
  return state;
}

#ifdef CLIPCORE_X86_PRODUCTS
#define CLIPCORE_PRODUCTS __attribute__((target("pclmul,sse2")))

// Both halves of `folded`, moved ahead by the distance that the factors stand for, and added to the bits there.
CLIPCORE_PRODUCTS inline __m128i fold(__m128i folded, __m128i factors, __m128i ahead) {
  const __m128i low = _mm_clmulepi64_si128(folded, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(folded, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), ahead);
}

CLIPCORE_PRODUCTS inline __m128i load(const uint8_t* bytes) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

// As by_table, of at least 64 bytes; returns how many are done in `size`.
CLIPCORE_PRODUCTS uint32_t by_products(uint32_t state, const uint8_t* bytes, size_t& size) {
  // x^(n + 32) and x^(n - 32) modulo P, for the low and the high half: n is 512 bits, then 128.
  const __m128i far = _mm_set_epi64x(0x01C6E41596, 0x0154442BD4);
  const __m128i near = _mm_set_epi64x(0x00CCAA009E, 0x01751997D0);

  __m128i a = _mm_xor_si128(load(bytes), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i b = load(bytes + 16), c = load(bytes + 32), d = load(bytes + 48);
  size_t done = 64;
  for (; done + 64 <= size; done += 64) {
    a = fold(a, far, load(bytes + done));
    b = fold(b, far, load(bytes + done + 16));
    c = fold(c, far, load(bytes + done + 32));
    d = fold(d, far, load(bytes + done + 48));
  }
  const __m128i all = fold(fold(fold(a, near, b), near, c), near, d);

  alignas(16) uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), all);
  size = done;
  return by_table(0, rest, sizeof(rest));
}
#endif

} // namespace

uint32_t crc32(const uint8_t* bytes, size_t size) {
  uint32_t state = 0xFFFFFFFF;
#ifdef CLIPCORE_X86_PRODUCTS
  static const bool has_products = __builtin_cpu_supports("pclmul");
  if (has_products && size >= 64) {
    size_t done = size;
    state = by_products(state, bytes, done);
    bytes += done;
    size -= done;
  }
#endif
  return ~by_table(state, bytes, size);
}

} // namespace clipcore
