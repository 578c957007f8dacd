"""The playground tab: checkpoints side by side on one question."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from mm_agrae.errors import UserError
from mm_agrae.tasks.synthetic.task import LEVELS, SyntheticTask
from mm_agrae.view import playground_view as view
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import empty
from mm_agrae.view.playground import (
    MAX_CHECKPOINTS,
    MAX_NEW_TOKENS,
    MAX_QUESTION,
    MAX_SAMPLES,
    Ask,
    Column,
    Models,
    Run,
    in_words,
    read_picture,
)

from .style import area, error

LEVEL_NAMES = ["any level", *(f"level {level}" for level in LEVELS)]
FIRST = 4
"""The problem that is there at the start; the embedded checkpoints disagree about it."""
QUEUE = "model"
"""All questions wait in one queue: the processor is one."""


def _uploaded(payload: Any) -> str | None:
    """The path of the file as it came, for `read_picture` to look at.

    Gradio itself would open whatever came, and its error names no reason. That the file is one
    that was uploaded has been checked before.
    """
    if payload is not None and payload.path is None:
        raise gr.Error("Upload the picture as a file.", print_exception=False)
    return None if payload is None else payload.path


def build(settings: DemoSettings) -> None:
    """Everything inside the tab. Called within `gr.Blocks`."""
    if not settings.models and not settings.allow_model_paths:
        gr.HTML(area(empty("No checkpoint here. Name one: mm-agrae demo PATH")))
        return
    models = Models(settings.models, device=settings.device, allow_paths=settings.allow_model_paths)
    stops: dict[str, threading.Event] = {}
    first = list(settings.models)[:1]
    start = _draw(models, first, LEVEL_NAMES[0], index=FIRST)

    drawn = gr.State(start)
    finished = gr.State((), time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            names = gr.CheckboxGroup(
                list(settings.models),
                value=first,
                label=f"Checkpoints (one to {MAX_CHECKPOINTS})",
                elem_id="pg-models",
            )
            if settings.allow_model_paths:
                with gr.Row():
                    path = gr.Textbox(
                        label="Further checkpoint",
                        placeholder="folder or model id",
                        scale=3,
                        elem_id="pg-path",
                    )
                    add = gr.Button("Add", scale=1, min_width=80)
                added = gr.HTML()
            note = gr.HTML(_note(models, first), elem_id="pg-note")
            picture = gr.Image(
                value=start["picture"],
                format="png",
                sources=["upload", "clipboard"],
                height=260,
                label="Picture",
                buttons=[],
                elem_id="pg-picture",
            )
            picture.preprocess = _uploaded  # not a subclass: Gradio would write a .pyi for it
            with gr.Row():
                level = gr.Dropdown(LEVEL_NAMES, show_label=False, container=False, min_width=120)
                draw = gr.Button("Draw a problem", min_width=140, elem_id="pg-draw")
            question = gr.Textbox(
                start["question"],
                label="Question",
                lines=3,
                max_lines=8,
                max_length=MAX_QUESTION,
                elem_id="pg-question",
            )
            answer = gr.Textbox(
                start["answer"], label="Right answer, if you know it", elem_id="pg-answer"
            )
            samples = gr.Slider(1, MAX_SAMPLES, 4, step=1, label="Samples", elem_id="pg-samples")
            temperature = gr.Slider(
                0,
                2,
                1,
                step=0.1,
                label="Temperature (0: the likeliest, one sample)",
                elem_id="pg-temperature",
            )
            with gr.Accordion("More", open=False):
                length = gr.Slider(
                    16, MAX_NEW_TOKENS, 256, step=16, label="Tokens at most", elem_id="pg-length"
                )
                seed = gr.Number(0, precision=0, label="Seed: the same one, the same answers")
            with gr.Row():
                go = gr.Button("Answer", variant="primary", min_width=120, elem_id="pg-go")
                stop = gr.Button(
                    "Stop", variant="stop", interactive=False, min_width=120, elem_id="pg-stop"
                )
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(elem_id="pg-status")
            answers = gr.HTML(
                area(empty("Choose checkpoints and press Answer. Answers appear here as written.")),
                elem_id="pg-answers",
            )
            with gr.Row():
                which = gr.Dropdown(label="Tokens of", choices=[], elem_id="pg-which")
                by = gr.Radio(
                    [view.PROBABILITY, view.ENTROPY],
                    value=view.PROBABILITY,
                    label="Coloured by",
                    elem_id="pg-by",
                )
            tokens = gr.HTML(area(view.tokens(None, view.PROBABILITY)), elem_id="pg-tokens")

    def begin(request: gr.Request) -> tuple[Any, ...]:
        stops[str(request.session_hash)] = threading.Event()
        waiting = area(view.waiting("Waiting for its turn …"))
        return gr.update(interactive=False), gr.update(interactive=True), waiting

    def halt(request: gr.Request) -> Any:
        event = stops.get(str(request.session_hash))
        if event is None:
            return gr.skip()
        event.set()
        return area(view.waiting("Stopping …"))

    def leave(request: gr.Request) -> None:
        event = stops.pop(str(request.session_hash), None)
        if event is not None:
            event.set()

    def respond(
        names: list[str],
        picture: str | None,
        question: str,
        answer: str,
        samples: float,
        temperature: float,
        length: float,
        seed: float | None,
        drawn: dict[str, Any],
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        event = stops.setdefault(str(request.session_hash), threading.Event())
        empty_view = area(view.tokens(None, view.PROBABILITY))
        columns: tuple[Column, ...] = ()
        try:
            image = read_picture(picture, settings.max_upload_pixels) if picture else None
            same = question == drawn["question"]
            ask = Ask(
                question=question,
                picture=image,
                answer=answer,
                described=drawn["described"] if same else "",
                grading=drawn["grading"] if same and answer == drawn["answer"] else {},
                samples=int(samples),
                temperature=float(temperature),
                max_new_tokens=int(length),
                seed=int(seed or 0),
            )
            for columns in Run(models, names, ask, event).stream():
                said = area(view.waiting(in_words(columns)))
                shown = area(view.answers(columns, ask))
                yield said, shown, gr.skip(), gr.skip(), gr.skip()
        except UserError as problem:
            yield area(error(problem)), gr.skip(), (), gr.update(choices=[], value=None), empty_view
            return
        choices = _choices(columns)
        yield (
            gr.skip(),
            gr.skip(),
            columns,
            gr.update(choices=choices, value=choices[0] if choices else None),
            gr.skip(),
        )

    def end() -> tuple[Any, Any]:
        return gr.update(interactive=True), gr.update(interactive=False)

    def draw_another(names: list[str], level: str) -> tuple[Any, ...]:
        new = _draw(models, names, level)
        return new, new["picture"], new["question"], new["answer"]

    private: dict[str, Any] = {"api_visibility": "private"}
    quick: dict[str, Any] = private | {"queue": False, "show_progress": "hidden"}
    names.change(lambda chosen: _note(models, chosen), names, note, **quick)
    gr.on(
        [draw.click, level.input],
        draw_another,
        [names, level],
        [drawn, picture, question, answer],
        **quick,
    )
    asked = [names, picture, question, answer, samples, temperature, length, seed, drawn]
    go.click(begin, None, [go, stop, status], **quick).then(
        respond,
        asked,
        [status, answers, finished, which, tokens],
        concurrency_limit=1,
        concurrency_id=QUEUE,
        show_progress="minimal",
        show_progress_on=[status],
        **private,
    ).then(end, None, [go, stop], **quick)
    stop.click(halt, None, status, **quick)
    gr.on(
        [which.change, by.change],
        lambda columns, which, by: area(view.tokens(_chosen(columns, which), by)),
        [finished, which, by],
        tokens,
        **quick,
    )
    if settings.allow_model_paths:

        def add_path(path: str, choices: list[str]) -> tuple[Any, ...]:
            path = path.strip()
            if not path:
                return gr.skip(), gr.skip(), area(error("Name a folder or a model id."))
            known = list(dict.fromkeys([*settings.models, *choices, path]))
            return gr.update(choices=known, value=[*choices, path]), "", ""

        gr.on([add.click, path.submit], add_path, [path, names], [names, path, added], **quick)
    root = gr.context.Context.root_block
    assert root is not None
    root.unload(leave)


def _draw(
    models: Models, names: Sequence[str], level: str, index: int | None = None
) -> dict[str, Any]:
    """A problem of the test split; in words alone if no chosen checkpoint reads pictures."""
    levels = None if level == LEVEL_NAMES[0] else [LEVEL_NAMES.index(level)]
    drawn, described = (
        SyntheticTask("test", modality, levels=levels) for modality in ("image", "text")
    )
    index = random.randrange(len(drawn)) if index is None else index
    example = drawn[index]
    sighted = any(models.reads_pictures(name) for name in names) or not names
    return {
        "picture": example.images[0] if sighted else None,
        "question": example.question if sighted else described[index].question,
        "described": described[index].question,
        "answer": example.answer,
        "grading": dict(example.grading),
    }


def _note(models: Models, names: Sequence[str]) -> str:
    note = view.note_on_pictures({name: models.reads_pictures(name) for name in names})
    return area(note) if note else ""


def _choices(columns: Sequence[Column]) -> list[str]:
    return [
        f"{column.label}, sample {index}"
        for column in columns
        for index, trace in enumerate(column.traces, 1)
        if trace.tokens
    ]


def _chosen(columns: Sequence[Column], which: str | None) -> Any:
    traces = [trace for column in columns for trace in column.traces if trace.tokens]
    names = _choices(columns)
    return traces[names.index(which)] if which in names else None
