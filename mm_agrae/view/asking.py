"""A checkpoint that answers questions, as the playground does, in a notebook: `mm_agrae.load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from mm_agrae.errors import UserError
from mm_agrae.run import checkpoint
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.playground import Question, SideBySide, Trace, read_image
from mm_agrae.view.playground_checkpoints import CheckpointCache


class Model:
    """A checkpoint, loaded at the first question. `path` is what a run folder or a shipped name was found to mean."""

    def __init__(self, name: str | Path, *, device: str = "auto") -> None:
        self.path = checkpoint.of(str(name))
        self._checkpoints = CheckpointCache({self.path: self.path}, device=device)

    def ask(self, question: str, image: str | Path | Image.Image | None = None, **options: Any) -> Trace:
        """The greedy answer. Its `text` is the whole completion, `thought` and `answer` its two halves, `final` the
        answer extracted from it, `tokens` its tokens with their probabilities. Options and errors: see `sample`.
        """
        return self.sample(question, image, count=1, temperature=0.0, **options)[0]

    def sample(
        self, question: str, image: str | Path | Image.Image | None = None, *, count: int = 8, answer: str = "",
        temperature: float = 1.0, max_new_tokens: int = 256, seed: int = 0,
    ) -> tuple[Trace, ...]:  # fmt: skip
        """`count` sampled answers (up to 16). With a gold `answer` each knows by `success` whether it is correct.

        Raises UserError, saying why, for what cannot be asked, and for a checkpoint that cannot be loaded.
        """
        if isinstance(image, str | Path):
            image = read_image(str(image), DemoSettings.max_upload_pixels)
        asked = Question(
            question, image, answer, samples=count, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
        )
        *_, (given,) = SideBySide(self._checkpoints, [self.path], asked).stream()
        if given.state == "failed":
            raise UserError(given.message)
        return given.traces
