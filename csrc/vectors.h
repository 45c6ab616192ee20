// What a file of loops over numbers needs so that the compiler makes vectors of them.

#pragma once

#define CLIPCORE_INLINE inline __attribute__((always_inline))

// On a function: its loops in the vectors that the processor has; elsewhere the same numbers one by one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLIPCORE_X86_VECTORS
#define CLIPCORE_VECTORS \
  __attribute__((optimize("O3", "fp-contract=off"), target_clones("avx512f", "avx2", "default")))
#else
#define CLIPCORE_VECTORS
#endif
