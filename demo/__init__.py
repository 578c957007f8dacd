"""The demo: one Gradio app over the package. What it computes stands in `mm_agrae`."""
