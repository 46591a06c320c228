"""A shuffled order that is computed, not stored: a keyed permutation of 0..n-1, any entry in constant time and memory."""

from __future__ import annotations

import numpy as np

ROUNDS = 6


class Permutation:
    """k -> p(k), a bijection of 0..`count`-1 drawn by `key`: a Feistel network over the next even power of two, walked back
    into range. Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"."""

    def __init__(self, count: int, key: int):
        self.count = count
        self._half = max(1, -(-(count - 1).bit_length() // 2))
        self._keys = [mix(key, k) for k in range(ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """indices (N,) integers in 0..count-1 -> their images (N,) int64."""
        found = self._encrypt(indices.astype(np.uint64))
        while (outside := found >= self.count).any():
            found[outside] = self._encrypt(found[outside])
        return found.astype(np.int64)

    def _encrypt(self, v: np.ndarray) -> np.ndarray:
        half, low = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = v >> half, v & low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ np.uint64(key)) & low)
        return left << half | right


def mix(*values: int) -> int:
    """A 64-bit number that depends on every one of `values` and on their order."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _mixed(state ^ np.uint64(value % 2**64))
    return int(state[0])


def _mixed(v: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014): one step for each entry, modulo 2^64."""
    v = v + np.uint64(0x9E3779B97F4A7C15)
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))
