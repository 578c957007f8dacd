"""What the tabs are made of: areas for our own markup, and lists of cards with pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr

from mm_agrae.view.demo_pages import CardPage
from mm_agrae.view.page import SCOPE, Html, el, stylesheet

NOTHING = Html("")


def head() -> str:
    """Styles for `launch(head=…)`; Gradio's own `css` would rewrite the selectors."""
    own = files(__package__).joinpath("demo.css").read_text(encoding="utf-8")
    return f"<style>{stylesheet('components.css')}{own}</style>"


def area(*children: object) -> Html:
    """Our markup for a gr.HTML, in the styles of `components.css`. Text is escaped by `el`."""
    return el("div", *children, class_=SCOPE)


def error(message: object) -> Html:
    return el("p", message, class_="error", role="alert")


def html(elem_id: str | None = None, value: str | None = None) -> gr.HTML:
    """A place for `area`, without Gradio's own styles or scripts."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, js_on_load=None)


class CardList:
    """Cards one page at a time: a filter with counts, the cards, and buttons to turn pages.

    Handlers get `number`, the page shown, and a turn: -1, +1, or 0 to begin at the first page.
    """

    def __init__(self, prefix: str, filters: Mapping[str, str], label: str) -> None:
        """`filters`: name -> what the filter is called on the screen."""
        self.prefix, self.filters = prefix, filters
        self.filter = gr.Radio(self._choices({}), value=next(iter(filters)), label=label, elem_id=f"{prefix}-filter")
        self.number = gr.State(0)
        self.first, self._previous, self._next = gr.State(0), gr.State(-1), gr.State(1)

    def cards(self, what: str) -> None:
        """Place the cards and the buttons below them."""
        self.body = html(f"{self.prefix}-cards")
        with gr.Row():
            self.back = gr.Button(f"← Previous {what}", interactive=False, elem_id=f"{self.prefix}-back")
            self.onward = gr.Button(f"Next {what} →", interactive=False, elem_id=f"{self.prefix}-next")
        self.outputs = [self.body, self.filter, self.number, self.back, self.onward]

    def connect(self, handler: Any, inputs: Sequence[Any], more: Sequence[Any] = (), **options: Any) -> None:
        """Call `handler(*inputs, number, turn)` for the buttons, then scroll to the first card.

        It returns values for `more` and `outputs`.
        """
        scroll = f"() => {{ document.getElementById('{self.prefix}-cards').scrollIntoView() }}"
        for button, turn in ((self.back, self._previous), (self.onward, self._next)):
            asked = [*inputs, self.number, turn]
            click = button.click(handler, asked, [*more, *self.outputs], **options)
            click.then(None, js=scroll)

    def show(self, page: CardPage, chosen: str) -> list[Any]:
        """Values of `outputs`."""
        return [
            area(page.body) if page.body else "",
            gr.Radio(choices=self._choices(page.counts), value=chosen),
            page.number,
            gr.Button(interactive=page.number > 0),
            gr.Button(interactive=page.has_next),
        ]

    def message(self, body: Html = NOTHING, chosen: str = "") -> list[Any]:
        """Values of `outputs` when there are no cards."""
        return self.show(CardPage(body), chosen or next(iter(self.filters)))

    def _choices(self, counts: Mapping[str, int]) -> list[tuple[str, str]]:
        return [
            (f"{words} ({counts[name]:,})" if name in counts else words, name) for name, words in self.filters.items()
        ]


def turned(number: int, turn: int) -> int:
    """The page after a turn, see `CardList`."""
    return number + turn if turn else 0
