"""The demo: Gradio pages. What they show is made in `mm_agrae.view`.

From Python or a notebook, `mm_agrae_demo.launch("runs/quickstart")` serves it until its result is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr


def launch(*paths: str, block: bool = False, **options: Any) -> gr.Blocks:
    """Serve run folders and checkpoints as `mm-agrae demo PATH …` does; with `block` until interrupted.

    options: fields of `mm_agrae.view.demo_settings.DemoSettings`, such as port=7860. Raises ConfigError for a path
    that holds neither a run nor a checkpoint, and for a host and port that cannot be had.
    """
    from mm_agrae.view.demo_settings import require_address, settings_for

    from .app import launch as serve

    settings = settings_for(paths, **options)
    require_address(settings.host, settings.port)
    return serve(settings, block=block)
