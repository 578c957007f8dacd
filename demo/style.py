"""The demo's look: our own markup lives in `.agrae` and follows Gradio's light or dark mode."""

from __future__ import annotations

from mm_agrae.view.page import Html, css_inside, el

SCOPE = "agrae"

_EXTRA = """
.agrae { color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  sans-serif; min-width: 0; }
.agrae * { box-sizing: border-box; }
.agrae.agrae h3 { margin: 0 0 6px; font-size: 16px; color: var(--text); }
.agrae.agrae p { margin: 0 0 8px; }
.agrae .error { padding: 10px 14px; border: 1px solid var(--wrong); border-radius: 8px;
  color: var(--wrong); background: var(--card); overflow-wrap: anywhere; }
.agrae .answers { display: grid; gap: 12px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(205px, 100%), 1fr)); }
.agrae .answers .card { margin: 0; gap: 8px; }
.agrae .trace { border-top: 1px solid var(--edge); padding-top: 8px; }
.agrae .trace .head { display: flex; justify-content: space-between; gap: 8px; font-size: 13px;
  color: var(--muted); }
.agrae .caption { font-size: 12px; color: var(--muted); margin: 6px 0 2px; }
.agrae pre { color: var(--text); border: 0; }
.agrae pre.thought { max-height: 220px; color: var(--text); opacity: 1; }
.agrae .writing pre { display: flex; flex-direction: column-reverse; }
.agrae .final { padding: 8px 10px; border-left: 3px solid var(--c0); background: var(--code);
  border-radius: 0 6px 6px 0; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 220px; overflow: auto; }
.agrae .writing .final::after { content: "▍"; color: var(--c0); }
.agrae .agreement { display: grid; grid-template-columns: minmax(0, auto) minmax(40px, 1fr) auto;
  gap: 4px 10px; align-items: center; font-size: 14px; }
.agrae .agreement span { overflow-wrap: anywhere; }
.agrae progress { appearance: none; width: 100%; height: 8px; border: 0; border-radius: 4px;
  overflow: hidden; background: var(--edge); }
.agrae progress::-webkit-progress-bar { background: var(--edge); }
.agrae progress::-webkit-progress-value { background: var(--c0); }
.agrae progress::-moz-progress-bar { background: var(--c0); }
.agrae.agrae :is(table, thead, tbody, tr, th, td) { border: 0 solid var(--edge);
  color: var(--text); background: none; }
.agrae.agrae :is(th, td) { padding: 5px 10px; border-bottom-width: 1px; }
.agrae.agrae tbody tr:last-child > * { border-bottom-width: 0; }
.agrae.agrae thead th { color: var(--muted); }
.agrae.agrae td :is(.right, b.right) { color: var(--right); }
.agrae.agrae td b.wrong { color: var(--wrong); }
.agrae .tokens { font: 14px/1.9 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px; border-radius: 6px;
  background: var(--card); border: 1px solid var(--edge); max-height: 420px; overflow: auto; }
.agrae .tokens span, .agrae .key span { border-radius: 3px; padding: 2px 0;
  background: color-mix(in srgb, var(--heat) var(--share), transparent); }
.agrae .tokens span:hover { outline: 1px solid var(--text); }
.agrae .key { display: flex; flex-wrap: wrap; gap: 4px 6px; font-size: 13px; margin-bottom: 8px; }
.agrae .key span { padding: 1px 8px; }
.agrae .probability { --heat: var(--c1); } .agrae .entropy { --heat: var(--c4); }
.agrae .h0 { --share: 0%; } .agrae .h1 { --share: 10%; } .agrae .h2 { --share: 20%; }
.agrae .h3 { --share: 31%; } .agrae .h4 { --share: 43%; } .agrae .h5 { --share: 56%; }
.agrae .words { max-width: 70ch; }
.agrae .tokens ~ .scroll td:last-child { white-space: normal; min-width: 180px; }
.agrae figcaption span { display: inline-block; }
body:not(.dark) [role="tab"][aria-selected="true"] { color: #2563d8; }
#pg-note:not(:has(.agrae)) { display: none; }
footer { display: none !important; }
"""


def head() -> str:
    """For `launch(head=…)`: as it is, where Gradio's own `css` would rewrite the selectors."""
    return f"<style>{css_inside(f'.{SCOPE}', '.dark')}{_EXTRA}</style>"


def area(*children: object) -> Html:
    """Our markup for a gr.HTML. Text is escaped by `page.el`."""
    return el("div", *children, class_=SCOPE)


def error(message: object) -> Html:
    return el("p", message, class_="error", role="alert")
