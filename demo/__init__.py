"""The demo: Gradio pages. What they show is made in `mm_agrae.view`."""
