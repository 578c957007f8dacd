"""The order in which training visits the examples."""

from functools import lru_cache

import numpy as np


class DataOrder:
    """Indices into the training data, shuffled anew each epoch. Its whole state is `position`."""

    def __init__(self, rows: int, seed: int, shuffle: bool):
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.position = 0

    def next(self) -> int:
        row = self._at(self.position)
        self.position += 1
        return row

    def peek(self, count: int) -> list[int]:
        """The next `count` indices, without moving on."""
        return [self._at(self.position + offset) for offset in range(count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        return _order(self.rows, self.seed, epoch)[offset] if self.shuffle else offset


@lru_cache(maxsize=2)  # the epoch that ends and the one that is looked at ahead
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    order = np.arange(rows)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order.tolist()
