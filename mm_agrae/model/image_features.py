"""Image features, each distinct picture through the vision tower once.

Prompts with the same picture hold the same tensor of pixels (`Processing` sees to it), which is
what pictures are told apart by.

- A frozen tower gives the same features for good: they are kept while the pixels are alive.
- A tower that learns gives other features after every optimiser step. Within one, a picture that
  several micro-batches need is encoded by the first. All but the last get a copy of the features
  without history, which collects its gradient; the last gets the features themselves, and hands
  all of the gradient on to the tower, in its own backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mm_agrae.types import MicroBatch, Prompt

Features = list[torch.Tensor]
"""One [tokens, hidden size] for each picture of a prompt."""


@dataclass
class _Open:
    """Features that later micro-batches need as well, and what earlier ones got for them."""

    features: Features
    copies: list[Features] = field(default_factory=list)


class Pictures:
    """Features for the prompts of a policy. `frozen` says that its vision tower does not learn."""

    def __init__(self, frozen: bool):
        self.frozen = frozen
        self._kept: Any = WeakTensorKeyDictionary()
        self._uses: Counter[int] = Counter()
        self._open: dict[int, _Open] = {}

    def plan(self, batches: Iterable[MicroBatch]) -> None:
        """Announce the micro-batches of one optimiser step, each run once, in any order.

        Raises RuntimeError if gradient of the last announced is still on its way to the tower.
        """
        if self._open:
            raise RuntimeError(f"{len(self._open)} pictures wait for a micro-batch that never ran")
        self._uses.clear()
        if self.frozen:
            return
        for batch in batches:
            self._uses.update({_key(prompt) for prompt in _pictured(batch.prompts)})

    def features(
        self, prompts: Sequence[Prompt], encode: Callable[[list[Prompt]], list[Features]]
    ) -> Features:
        """Features of all pictures of `prompts` in order; `encode` runs the tower."""
        distinct = {_key(prompt): prompt for prompt in _pictured(prompts)}
        learning = torch.is_grad_enabled() and not self.frozen
        found: dict[int, Features] = {}
        for key, prompt in distinct.items():
            if self.frozen and prompt.pixel_values in self._kept:
                found[key] = self._kept[prompt.pixel_values]
            elif learning and key in self._open:
                found[key] = self._open[key].features
        new = {key: prompt for key, prompt in distinct.items() if key not in found}
        # What goes through the tower together must go back through it together.
        alone = [[key] for key in new if learning and self._uses[key] > 1]
        rest = [key for key in new if [key] not in alone]
        with torch.set_grad_enabled(learning):
            for keys in [*alone, rest] if rest else alone:
                found.update(zip(keys, encode([new[key] for key in keys]), strict=True))
        if self.frozen:
            self._kept.update({prompt.pixel_values: found[key] for key, prompt in new.items()})
        elif learning:
            found = {key: self._passed_on(key, features) for key, features in found.items()}
        return [each for prompt in _pictured(prompts) for each in found[_key(prompt)]]

    def _passed_on(self, key: int, features: Features) -> Features:
        """What this micro-batch gets for the picture, so that no gradient is lost or doubled."""
        self._uses[key] -= 1
        if self._uses[key] > 0:
            copy = [each.detach().requires_grad_() for each in features]
            self._open.setdefault(key, _Open(features)).copies.append(copy)
            return copy
        earlier = self._open.pop(key, None)
        for index, each in enumerate(features if earlier else ()):
            each.register_hook(_add_gradients([copy[index] for copy in earlier.copies]))  # type: ignore[union-attr]
        return features


def _add_gradients(copies: Features) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(gradient: torch.Tensor) -> torch.Tensor:
        for copy in copies:
            if copy.grad is not None:
                gradient = gradient + copy.grad
        return gradient

    return add


def _pictured(prompts: Iterable[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.pixel_values is not None]


def _key(prompt: Prompt) -> int:
    return id(prompt.pixel_values)
