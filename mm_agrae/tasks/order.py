"""In which order training visits the examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class DataOrder:
    """Indices into the training data, shuffled anew each epoch. Its whole state is `position`."""

    def __init__(self, rows: int, seed: int, shuffle: bool):
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.position = 0
        self._epoch = -1
        self._order: Sequence[int] = ()

    def next(self) -> int:
        epoch, offset = divmod(self.position, self.rows)
        if epoch != self._epoch:
            order = np.arange(self.rows)
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._epoch, self._order = epoch, order.tolist()
        self.position += 1
        return self._order[offset]
