"""The order in which training visits the examples."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class DataOrder:
    """Indices into the training data, shuffled anew each epoch. Its whole state is `position`.

    With `difficulty`, one number a row, each epoch visits rows by rising difficulty; the shuffle is among equal ones.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool, difficulty: Sequence[float] = ()):
        self.rows, self.seed, self.shuffle, self.difficulty = rows, seed, shuffle, np.array(difficulty)
        self.position = 0
        # The epoch that ends and the one that is looked at ahead.
        self._epoch = lru_cache(maxsize=2)(self._order)

    def next(self) -> int:
        row = self._at(self.position)
        self.position += 1
        return row

    def peek(self, count: int) -> list[int]:
        """The next `count` indices, without moving on."""
        return [self._at(self.position + offset) for offset in range(count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        return self._epoch(epoch)[offset]

    def _order(self, epoch: int) -> list[int]:
        order = np.arange(self.rows)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        if self.difficulty.size:
            order = order[np.argsort(self.difficulty[order], kind="stable")]
        return order.tolist()
