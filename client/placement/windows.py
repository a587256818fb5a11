"""Sliding minima: the one operation that every search here spends its time in."""

from __future__ import annotations

import numpy as np

from client.placement.arrays import Floats, Ints


class Windows:
    """For each row and each end: the least of `values[row, first[row, end] : end]`, infinite for an empty window.

    A sparse table: minima over 1, 2, 4... neighbours, of which two cover any window. B log B a row instead of B^2.
    """

    def __init__(self, first: Ints) -> None:
        """`first`: [B + 1] for windows that all rows share, or [rows, B + 1]."""
        ends = np.arange(first.shape[-1])
        length = ends - first
        self._empty = length <= 0
        self._level = np.where(self._empty, 0, np.floor(np.log2(np.maximum(length, 1)))).astype(np.int64)
        self._left = np.where(self._empty, 0, first)
        self._right = np.where(self._empty, 0, ends - (1 << self._level))
        self._levels = int(self._level.max()) + 1

    def least(self, values: Floats) -> Floats:
        """[rows, B + 1] of starts to [rows, B + 1] of ends."""
        table = np.empty((self._levels, *values.shape))
        table[0] = values
        for level in range(1, self._levels):
            half = 1 << (level - 1)
            table[level] = table[level - 1]
            np.minimum(table[level - 1][:, :-half], table[level - 1][:, half:], out=table[level][:, :-half])
        rows = np.arange(len(values))[:, None]
        found = np.minimum(table[self._level, rows, self._left], table[self._level, rows, self._right])
        found[np.broadcast_to(self._empty, found.shape)] = np.inf
        return found
