// Attributes that let the compiler vectorise a file's loops over numbers.

#pragma once

#define CLIPCORE_INLINE inline __attribute__((always_inline))

// On a function: vectorise its loops, for the processor that is found at run time. Without support the same numbers are
// computed one by one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLIPCORE_X86_VECTORS
#define CLIPCORE_VECTORS \
  __attribute__((optimize("O3", "fp-contract=off"), target_clones("avx512f", "avx2", "default")))
#else
#define CLIPCORE_VECTORS
#endif
