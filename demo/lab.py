"""The advantage lab: sliders on the left, what the rule makes of them on the right."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mm_agrae.view import lab
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import el

from .style import area


def build(settings: DemoSettings) -> None:
    """Everything inside the tab. Called within `gr.Blocks`."""
    start = lab.Setting()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            rule = gr.Dropdown(
                list(lab.rules()), value=start.rule, label="Rule", elem_id="lab-rule"
            )
            size = gr.Slider(
                2, 32, start.completions, step=1, label="G: completions", elem_id="lab-size"
            )
            right = gr.Slider(
                0,
                start.completions,
                start.right,
                step=1,
                label="Right completions (p = this / G)",
                elem_id="lab-right",
            )
            omega = gr.Slider(
                lab.MIN_OMEGA,
                lab.MAX_OMEGA,
                start.omega,
                step=0.02,
                label="ω: mean reward of the whole step",
                elem_id="lab-omega",
            )
            alpha = gr.Slider(
                0.05,
                1,
                start.alpha,
                step=0.05,
                label="α: up to this ω right completions are held back",
                elem_id="lab-alpha",
            )
            words = gr.HTML(_words(start), elem_id="lab-words")
        with gr.Column(scale=2, min_width=300):
            shown = gr.HTML(_shown(start), elem_id="lab-shown")

    def show(rule: str, size: float, right: float, omega: float, alpha: float) -> tuple[str, str]:
        setting = lab.Setting(rule, int(size), min(int(right), int(size)), omega, alpha)
        return _words(setting), _shown(setting)

    def resize(size: float, right: float) -> Any:
        return gr.update(maximum=int(size), value=min(int(right), int(size)))

    # A slider that is being moved must not be written to, or it would jump back under the hand.
    quick: dict[str, Any] = {
        "queue": False,
        "show_progress": "hidden",
        "trigger_mode": "always_last",
        "api_visibility": "private",
    }
    sliders = [size, right, omega, alpha]
    gr.on(
        [rule.change, *(slider.input for slider in sliders)],
        show,
        [rule, *sliders],
        [words, shown],
        **quick,
    )
    size.input(resize, [size, right], right, **quick)
    rule.change(
        lambda rule: gr.update(interactive=bool(lab.Setting(rule).options)), rule, alpha, **quick
    )


def _words(setting: lab.Setting) -> str:
    return area(el("div", lab.explanation(setting), class_="words"))


def _shown(setting: lab.Setting) -> str:
    return area(
        lab.plots(setting),
        el("h3", "A small softmax world: one step on this group"),
        el(
            "p",
            "Four answers that a policy may give; the group drew A and B. With a step size of 1 "
            "a logit moves by the advantages of its draws − ΣA · π (Theorem 1 of the paper).",
            class_="muted",
        ),
        lab.world_table(setting),
    )
