"""What people look at: reports and the demo's contents.

In: run folders and checkpoints. Out: HTML without scripts, all text escaped. Begin with `page.py`,
the elements, `components.py`, made of them, and `report.py`, a page made of both. Demo pages
(`demo/`) take what they show from `demo_pages.py`, `playground_view.py` and `lab.py`.
"""
