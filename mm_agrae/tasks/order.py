"""The order in which training visits the examples."""

from __future__ import annotations

import numpy as np


class DataOrder:
    """Indices into the training data, shuffled anew each epoch. Its whole state is `position`."""

    def __init__(self, rows: int, seed: int, shuffle: bool):
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.position = 0
        self._orders: dict[int, list[int]] = {}

    def next(self) -> int:
        row = self._at(self.position)
        self.position += 1
        return row

    def peek(self, count: int) -> list[int]:
        """The next `count` indices, without moving on."""
        return [self._at(self.position + offset) for offset in range(count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        if epoch not in self._orders:
            order = np.arange(self.rows)
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            # Two epochs at most: one that ends and the one that is looked at ahead.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = order.tolist()
        return self._orders[epoch][offset]
