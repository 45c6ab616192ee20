"""The order of an epoch and the random numbers of a sample: functions of (seed, epoch, position), with no state.

The order is a keyed permutation of ``range(size)``, so that any batch of any epoch is computed on its own: a
generalised Feistel network over Z_a x Z_b, where a * b is just above ``size``; a result outside of the range is sent
through the network again until it falls inside ("cycle walking"), which keeps the map one to one.

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (both constructions). The mixing function
is the finaliser of splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# An odd constant of the generator below; any odd number works.
_INCREMENT = (_GOLDEN << 64) | 0xBF58476D1CE4E5B9


def hash64(values_N: np.ndarray, *key: int) -> np.ndarray:
    """Return 64 well-mixed bits for each of ``values_N`` (integers, [N]) under a key of integers mod 2^64: uint64 [N]."""
    return _hash(values_N, _key_word(*key))


def _hash(values_N: np.ndarray, word: int) -> np.ndarray:
    hashed_N = values_N.astype(np.uint64)
    _mix(hashed_N)
    hashed_N += np.uint64(word)
    _mix(hashed_N)
    return hashed_N


def _mix(x_N: np.ndarray) -> None:
    x_N ^= x_N >> np.uint64(30)
    x_N *= np.uint64(0xBF58476D1CE4E5B9)
    x_N ^= x_N >> np.uint64(27)
    x_N *= np.uint64(0x94D049BB133111EB)
    x_N ^= x_N >> np.uint64(31)


def _key_word(*key: int) -> int:
    """Return a key as one number, mixed in Python integers: ten times as fast as arrays for a single number."""
    word = 0
    for part in key:
        word = (word + part + _GOLDEN) & _MASK
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
        word ^= word >> 31
    return word


def permutation(positions_N: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the sample at each of ``positions_N`` in the order of an epoch.

    Args:
        positions_N: positions below ``size``, [N].
        size: number of samples, 1 to 2^62.

    Returns:
        Sample indices, int64 [N]; over all positions each index occurs exactly once.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    result_N = positions_N.astype(np.int64)
    assert len(result_N) == 0 or (result_N.min() >= 0 and result_N.max() < size)
    words = [_key_word(seed, epoch, i) for i in range(_ROUNDS)]
    walking = np.arange(len(result_N))
    while len(walking):
        result_N[walking] = _feistel(result_N[walking], a, b, words)
        walking = walking[result_N[walking] >= size]
    return result_N


def _feistel(x_N: np.ndarray, a: int, b: int, words: list[int]) -> np.ndarray:
    left_N, right_N = np.divmod(x_N, b)
    for word, next_word in zip(words[::2], words[1::2], strict=True):
        left_N = (left_N + (_hash(right_N, word) % np.uint64(a)).astype(np.int64)) % a
        right_N = (right_N + (_hash(left_N, next_word) % np.uint64(b)).astype(np.int64)) % b
    return left_N * b + right_N


class SampleRandom:
    """The random numbers of a sample in an epoch, independent of the worker or rank that draws them.

    One generator is set to a new state for each sample, at a third of the cost of a new generator.
    """

    def __init__(self) -> None:
        self._bits = np.random.PCG64(0)
        self._generator = np.random.Generator(self._bits)

    @staticmethod
    def states(indices_N: np.ndarray, seed: int, epoch: int) -> list[int]:
        """Return the 128 bits of each sample, to pass to ``at``."""
        high_N, low_N = hash64(indices_N, seed, epoch, 101), hash64(indices_N, seed, epoch, 102)
        return [h << 64 | w for h, w in zip(high_N.tolist(), low_N.tolist(), strict=True)]

    def at(self, state: int) -> np.random.Generator:
        """Return the generator of one sample; it is the same object each time, so use it before the next call."""
        self._bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": state, "inc": _INCREMENT},
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator
