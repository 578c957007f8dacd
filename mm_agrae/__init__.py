"""mm-agrae: group-relative policy optimisation with A-GRAE for vision-language and text models.

Importing this package loads nothing heavy; import the module of the stage you need.
"""

__version__ = "0.2.0"
