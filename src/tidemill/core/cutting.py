"""③ What a piece of a GPU is worth: the prices of the best way to cut GPUs into the shares that people ask for.

A GPU of which 190 milli are left is worth nothing if nobody asks for that little. How much of every remainder will be
used follows from the cutting-stock problem: serve the demand for shares with as few GPUs as possible. Its linear
relaxation prices each size of share in GPUs, and a remainder is worth the dearest set of shares that fits into it.

Source: P. Gilmore and R. Gomory, "A linear programming approach to the cutting-stock problem" (1961): a revised
simplex whose next cut comes from a knapsack. Everything is element-wise arithmetic, in the same order every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tidemill.units import MILLI

MOST_SIZES = 32
"""Sizes that are priced; rarer ones take the price of the set of shares that fills their room."""
_MOST_STEPS = 400
_TOLERANCE = 1e-9


def remainder_values(demand: Mapping[int, float]) -> NDArray[np.float64]:
    """How much of a GPU with that much left can be used for the shares in demand, in GPUs. Shape (1001,), rising.

    ``demand`` says how often a share of so many milli (1 to 999) is asked for; an empty one makes every remainder
    worthless and a whole GPU worth one.

    >>> values = remainder_values({810: 3.0, 470: 2.0, 320: 1.0})
    >>> [round(float(values[left]), 3) for left in (190, 320, 530, 810, 1000)]
    [0.0, 0.333, 0.5, 1.0, 1.0]
    """
    common = sorted(sorted(demand, key=lambda size: (-demand[size], size))[:MOST_SIZES], reverse=True)
    sizes = [size for size in common if demand[size] > 0]
    if not sizes:
        worthless: NDArray[np.float64] = (np.arange(MILLI + 1) == MILLI).astype(np.float64)
        return worthless
    wanted = np.array([demand[size] for size in sizes]) / sum(demand[size] for size in sizes)
    inverse = np.diag([1.0 / (MILLI // size) for size in sizes])
    used = (inverse * wanted).sum(axis=1)
    for _ in range(_MOST_STEPS):
        prices = inverse.sum(axis=0)
        best, cut = _dearest_cut(sizes, prices)
        if best[MILLI] <= 1.0 + _TOLERANCE:
            break
        column = (inverse * cut).sum(axis=1)
        ratios = np.where(column > _TOLERANCE, used / np.where(column > _TOLERANCE, column, 1.0), np.inf)
        leaving = int(np.argmin(ratios))
        inverse[leaving] /= column[leaving]
        used[leaving] /= column[leaving]
        for row in range(len(sizes)):
            if row != leaving:
                inverse[row] -= column[row] * inverse[leaving]
                used[row] -= column[row] * used[leaving]
    values: NDArray[np.float64] = np.minimum(best / best[MILLI], 1.0)
    return values


def _dearest_cut(sizes: list[int], prices: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The price of the dearest set of shares in every room (1001,), and the set for a whole GPU as counts (S,)."""
    best = np.zeros(MILLI + 1)
    steps: list[tuple[int, int, NDArray[np.bool_]]] = []
    for index, size in enumerate(sizes):
        if prices[index] <= _TOLERANCE:
            continue
        for copies in _bundles(MILLI // size):
            room = copies * size
            with_it = best[:-room] + copies * prices[index]
            is_better = with_it > best[room:] + _TOLERANCE
            best[room:] = np.where(is_better, with_it, best[room:])
            steps.append((index, copies, is_better))
    cut = np.zeros(len(sizes))
    left = MILLI
    for index, copies, is_better in reversed(steps):
        room = copies * sizes[index]
        if left >= room and is_better[left - room]:
            cut[index] += copies
            left -= room
    return best, cut


def _bundles(most: int) -> list[int]:
    """Numbers whose sums reach every count up to ``most`` and none above it.

    >>> _bundles(6), _bundles(1)
    ([1, 2, 3], [1])
    """
    edges = [0]
    while edges[-1] < most:
        edges.append(min(2 * edges[-1] + 1, most))
    return [after - before for before, after in pairwise(edges)]
