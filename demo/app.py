"""The app: four tabs over one `DemoSettings`. By default it listens on this machine only.

`python app.py` serves what comes with the package. A Space starts it so, with this folder alone (README.md).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: this folder is the package
    __package__ = "mm_agrae_demo"
    _spec = importlib.util.spec_from_file_location(__package__, Path(__file__).with_name("__init__.py"))
    assert _spec is not None
    sys.modules[__package__] = importlib.util.module_from_spec(_spec)

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from mm_agrae.view.demo_settings import DemoSettings, settings_for

from . import elements
from .evaluations import EvaluationsTab
from .explorer import ExplorerTab
from .lab import LabTab
from .playground import PlaygroundTab

TABS = {"Playground": PlaygroundTab, "Runs": ExplorerTab, "Compare": EvaluationsTab, "Advantage lab": LabTab}
SYSTEM_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
"""The reader's own fonts: the page loads nothing from other servers."""


def build(settings: DemoSettings) -> gr.Blocks:
    """The whole app, not yet listening."""
    with gr.Blocks(title="mm-agrae", analytics_enabled=False, delete_cache=(3600, 6 * 3600)) as app:
        gr.Markdown("# mm-agrae: see it think")
        for name, tab in TABS.items():
            with gr.Tab(name, id=name):
                tab(settings)
    app.queue(max_size=settings.max_waiting, api_open=False)
    return app


def launch(settings: DemoSettings, *, block: bool = True) -> gr.Blocks:
    """Serve the app, with `block` until interrupted, and return it with its `local_url`.

    The server refuses uploads above `max_upload_mb`. Gradio's list of readable paths stays empty:
    images of runs are embedded in the page.
    """
    app = build(settings)
    app.launch(
        server_name=settings.host,
        server_port=settings.port or None,
        share=settings.share,
        inbrowser=settings.open_browser,
        prevent_thread_lock=not block,
        max_file_size=int(settings.max_upload_mb * 2**20),
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        quiet=not block,
        **_look(),
    )
    return app


def _look() -> dict[str, Any]:
    theme = gr.themes.Default(
        primary_hue="blue", font=SYSTEM_FONT, font_mono=("ui-monospace", "Menlo", "monospace")
    ).set(  # Gradio's own greys and blues have too little contrast
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
    )
    return {"theme": theme, "head": elements.head()}


if __name__ == "__main__":
    server = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "0"))
    launch(settings_for([], host=server[0], port=server[1]))  # a Space sets the host
