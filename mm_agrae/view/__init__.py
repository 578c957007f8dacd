"""What people look at: run folders -> HTML and plots, for the report and the demo.

In: run folders and checkpoints. Out: markup without scripts, every text escaped. Begin with
`page.py`, what pages are made of, and `report.py`, one made of it.
"""
