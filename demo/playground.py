"""The playground tab: checkpoints side by side on one question."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from mm_agrae.errors import UserError
from mm_agrae.tasks.synthetic.task import LEVELS
from mm_agrae.view import playground_view as view
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import empty
from mm_agrae.view.playground import (
    MAX_CHECKPOINTS,
    MAX_NEW_TOKENS,
    MAX_QUESTION,
    MAX_SAMPLES,
    CheckpointTraces,
    Problem,
    SideBySide,
    Trace,
    read_image,
)
from mm_agrae.view.playground_checkpoints import CheckpointCache

from .elements import area, error, html

LEVEL_NAMES = ["any level", *(f"level {level}" for level in LEVELS)]
FIRST = 0
"""The problem shown first: the first of the test split, whatever the checkpoints make of it."""
QUEUE = "model"
"""All questions wait in one queue, since they share one processor."""
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
HINT = "Choose checkpoints and press Generate. Completions appear here as they are written."
QUICK: dict[str, Any] = PRIVATE | {"queue": False, "show_progress": "hidden"}


class _Asking(threading.Event):
    """One press of Generate: set once it shall stop, and `stale` once something else is to be asked."""

    stale = False


class PlaygroundTab:
    """Generates with the models of `settings`."""

    def __init__(self, settings: DemoSettings) -> None:
        if not settings.models and not settings.allow_model_paths:
            html(value=area(empty("No checkpoint here. Name one: mm-agrae demo PATH")))
            return
        self.settings = settings
        self.checkpoints = CheckpointCache(
            settings.models, device=settings.device, allow_paths=settings.allow_model_paths
        )
        self.stops: dict[str, _Asking] = {}
        chosen = list(settings.models)[:1]
        start = Problem.sample(None, self._any_reads_images(chosen), FIRST)
        self.problem = gr.State(start)
        self.finished = gr.State((), time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._choose_checkpoints(chosen)
                self._choose_question(start)
                self._choose_sampling()
            with gr.Column(scale=3, min_width=300):
                self._place_completions()
        self._connect_form()
        self._connect_generation()

    def _choose_checkpoints(self, chosen: Sequence[str]) -> None:
        self.names = gr.CheckboxGroup(
            list(self.settings.models),
            value=list(chosen),
            label=f"Checkpoints (one to {MAX_CHECKPOINTS})",
            elem_id="pg-models",
        )
        if self.settings.allow_model_paths:
            with gr.Row():
                self.path = gr.Textbox(
                    label="Further checkpoint", placeholder="folder or model id", scale=3, elem_id="pg-path"
                )
                self.add = gr.Button("Add", scale=1, min_width=80)
            self.added = html()
        self.note = html("pg-note", self._note(chosen))

    def _choose_question(self, start: Problem) -> None:
        self.image = gr.Image(
            value=start.image,
            format="png",
            sources=["upload", "clipboard"],
            height=180,
            label="Image",
            buttons=[],
            elem_id="pg-image",
        )
        # Not a subclass: Gradio would write a .pyi for it.
        self.image.preprocess = _uploaded  # type: ignore[method-assign]
        with gr.Row():
            self.level = gr.Dropdown(LEVEL_NAMES, show_label=False, container=False, min_width=120)
            self.another = gr.Button("Another problem", min_width=140, elem_id="pg-another")
        self.text = gr.Textbox(
            start.text, label="Question", lines=2, max_lines=4, max_length=MAX_QUESTION, elem_id="pg-question"
        )
        self.answer = gr.Textbox(start.answer, label="Correct answer, if known", elem_id="pg-answer")
        with gr.Row():  # above the settings, to be in sight without scrolling
            self.go = gr.Button("Generate", variant="primary", min_width=120, elem_id="pg-go")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=120, elem_id="pg-stop")

    def _choose_sampling(self) -> None:
        self.samples = gr.Slider(1, MAX_SAMPLES, 4, step=1, label="Samples", elem_id="pg-samples")
        self.temperature = gr.Slider(
            0, 2, 1, step=0.1, label="Temperature (0: greedy, one sample)", elem_id="pg-temperature"
        )
        with gr.Accordion("More", open=False):
            self.length = gr.Slider(16, MAX_NEW_TOKENS, 256, step=16, label="Token limit", elem_id="pg-length")
            self.seed = gr.Number(0, precision=0, label="Seed (the same one repeats the samples)")

    def _place_completions(self) -> None:
        self.status = html("pg-status")
        self.traces = html("pg-traces", area(empty(HINT)))
        with gr.Row():
            self.which = gr.Dropdown(label="Tokens of", choices=[], elem_id="pg-which")
            self.by = gr.Radio(
                [view.PROBABILITY, view.ENTROPY], value=view.PROBABILITY, label="Coloured by", elem_id="pg-by"
            )
        self.tokens = html("pg-tokens", area(view.tokens(None, view.PROBABILITY)))

    def _connect_form(self) -> None:
        self.names.change(self._note, self.names, self.note, **QUICK)
        gr.on(
            [self.another.click, self.level.input],
            self.sample_problem,
            [self.names, self.level],
            [self.problem, self.image, self.text, self.answer],
            **QUICK,
        )
        if self.settings.allow_model_paths:
            gr.on(
                [self.add.click, self.path.submit],
                self.add_path,
                [self.path, self.names],
                [self.names, self.path, self.added],
                **QUICK,
            )

    def _connect_generation(self) -> None:
        sampling = [self.samples, self.temperature, self.length, self.seed]
        answers = [self.status, self.traces, self.finished, self.which, self.tokens]
        new = [self.another.click, self.level.input, self.image.upload, self.image.clear]
        gr.on(new, self.clear, None, answers, **QUICK)
        begun = self.go.click(self.begin, None, [self.go, self.stop, self.status], **QUICK)
        begun.then(
            self.generate,
            [self.names, self.image, self.text, self.answer, *sampling, self.problem],
            answers,
            concurrency_limit=1,
            concurrency_id=QUEUE,
            show_progress="minimal",
            show_progress_on=[self.status],
            **PRIVATE,
        ).then(
            lambda: (gr.update(interactive=True), gr.update(interactive=False)), None, [self.go, self.stop], **QUICK
        )
        self.stop.click(self.halt, None, self.status, **QUICK)
        gr.on(
            [self.which.change, self.by.change],
            lambda shown, which, by: area(view.tokens(_choices(shown).get(which), by)),
            [self.finished, self.which, self.by],
            self.tokens,
            **QUICK,
        )
        root = gr.context.Context.root_block
        assert root is not None
        root.unload(self.leave)

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        self.stops[str(request.session_hash)] = _Asking()
        waiting = area(view.waiting("Waiting for its turn …"))
        return gr.update(interactive=False), gr.update(interactive=True), waiting

    def halt(self, request: gr.Request) -> Any:
        event = self.stops.get(str(request.session_hash))
        if event is None:
            return gr.skip()
        event.set()
        return area(view.waiting("Stopping …"))

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """The values that `generate` fills, empty: its answers are to another problem. It stops if it is at work."""
        if asking := self.stops.get(str(request.session_hash)):
            asking.stale = True
            asking.set()
        return _nothing()

    def leave(self, request: gr.Request) -> None:
        event = self.stops.pop(str(request.session_hash), None)
        if event is not None:
            event.set()

    def generate(
        self,
        names: list[str],
        image: str | None,
        text: str,
        answer: str,
        samples: float,
        temperature: float,
        length: float,
        seed: float | None,
        problem: Problem,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Values of status, traces, finished, which and tokens, as the completions grow."""
        event = self.stops.setdefault(str(request.session_hash), _Asking())
        shown: tuple[CheckpointTraces, ...] = ()
        same = gr.skip()
        try:
            question = problem.question(
                text,
                answer,
                read_image(image, self.settings.max_upload_pixels) if image else None,
                samples=int(samples),
                temperature=float(temperature),
                max_new_tokens=int(length),
                seed=int(seed or 0),
            )
            for shown in SideBySide(self.checkpoints, names, question, event).stream():
                if event.stale:
                    continue
                status = area(view.waiting(view.progress_line(shown)))
                yield status, area(view.traces(shown, question)), same, same, same
        except UserError as trouble:
            yield area(error(trouble)), *_nothing()[1:]
            return
        if event.stale:
            yield _nothing()
            return
        choices = list(_choices(shown))
        chosen = gr.update(choices=choices, value=choices[0] if choices else None)
        yield same, same, shown, chosen, same

    def sample_problem(self, names: list[str], level: str) -> tuple[Any, ...]:
        number = LEVEL_NAMES.index(level) or None
        new = Problem.sample(number, self._any_reads_images(names))
        return new, new.image, new.text, new.answer

    def add_path(self, path: str, chosen: list[str]) -> tuple[Any, ...]:
        path = path.strip()
        if not path:
            return gr.skip(), gr.skip(), area(error("Name a folder or a model id."))
        known = list(dict.fromkeys([*self.settings.models, *chosen, path]))
        return gr.update(choices=known, value=[*chosen, path]), "", ""

    def _any_reads_images(self, names: Sequence[str]) -> bool:
        return not names or any(map(self.checkpoints.reads_images, names))

    def _note(self, names: Sequence[str]) -> str:
        note = view.note_on_images({name: self.checkpoints.reads_images(name) for name in names})
        return area(note) if note else ""


def _nothing() -> tuple[Any, ...]:
    """Values of status, traces, finished, which and tokens before anything was asked."""
    none = gr.update(choices=[], value=None)
    return "", area(empty(HINT)), (), none, area(view.tokens(None, view.PROBABILITY))


def _uploaded(payload: Any) -> str | None:
    """The path of the uploaded file, which `read_image` opens.

    Gradio would open the file itself, and its errors give no reason. It has already checked that
    the file was uploaded.
    """
    if payload is not None and payload.path is None:
        raise gr.Error("Upload the image as a file.", print_exception=False)
    return None if payload is None else payload.path


def _choices(shown: Sequence[CheckpointTraces]) -> dict[str | None, Trace]:
    """Name on the screen -> trace, of those whose tokens can be shown."""
    return {
        f"{traces.label}, sample {index}": trace
        for traces in shown
        for index, trace in enumerate(traces.traces, 1)
        if trace.tokens
    }
