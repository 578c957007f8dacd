"""The advantage lab: sliders for a group and its step, and what a rule makes of them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mm_agrae.view import lab
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import el, note

from .elements import area, html


class LabTab:
    """Needs no model and no run."""

    def __init__(self, settings: DemoSettings) -> None:
        start = lab.Setting()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._choose(start)
                self.words = html("lab-words", _words(start))
            with gr.Column(scale=2, min_width=300):
                self.figures = html("lab-figures", _figures(start))
        # A slider must not be written to while it is being moved: it would jump under the cursor.
        quick: dict[str, Any] = {
            "queue": False,
            "show_progress": "hidden",
            "trigger_mode": "always_last",
            "api_visibility": "private",
        }
        sliders = [self.size, self.correct, self.omega, self.alpha]
        gr.on(
            [self.rule.change, *(slider.input for slider in sliders)],
            _show,
            [self.rule, *sliders],
            [self.words, self.figures],
            **quick,
        )
        self.size.input(_resize, [self.size, self.correct], self.correct, **quick)
        self.rule.change(
            lambda rule: gr.update(interactive=bool(lab.Setting(rule).options)), self.rule, self.alpha, **quick
        )

    def _choose(self, start: lab.Setting) -> None:
        self.rule = gr.Dropdown(list(lab.rules()), value=start.rule, label="Rule", elem_id="lab-rule")
        self.size = gr.Slider(2, 32, start.completions, step=1, label="G: completions", elem_id="lab-size")
        self.correct = gr.Slider(
            0,
            start.completions,
            start.correct,
            step=1,
            label="Correct completions (p = this / G)",
            elem_id="lab-correct",
        )
        self.omega = gr.Slider(
            lab.MIN_OMEGA,
            lab.MAX_OMEGA,
            start.omega,
            step=0.02,
            label="ω: mean reward of the step",
            elem_id="lab-omega",
        )
        self.alpha = gr.Slider(
            0.05,
            1,
            start.alpha,
            step=0.05,
            label="α: below this ω correct completions are held back",
            elem_id="lab-alpha",
        )


def _show(rule: str, size: float, correct: float, omega: float, alpha: float) -> tuple[str, str]:
    setting = lab.Setting(rule, int(size), min(int(correct), int(size)), omega, alpha)
    return _words(setting), _figures(setting)


def _resize(size: float, correct: float) -> Any:
    return gr.update(maximum=int(size), value=min(int(correct), int(size)))


def _words(setting: lab.Setting) -> str:
    return area(el("div", lab.explanation(setting), class_="words"))


def _figures(setting: lab.Setting) -> str:
    return area(
        lab.plots(setting),
        el("h3", "A small softmax world: one step on this group"),
        note(
            "Four outcomes that a policy may sample; the group sampled A and B. With a step size "
            "of 1 a logit changes by the advantages of its samples − ΣA · π (Theorem 1 of the "
            "paper)."
        ),
        lab.world_table(setting),
    )
