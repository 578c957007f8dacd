"""Mends one common broken install before transformers' image processors are imported.

A CPU build of torch next to the default torchvision wheel leaves torchvision's compiled library
unloadable; importing torchvision then fails with "operator torchvision::nms does not exist".
None of its operators is used here, so declaring their schemas is enough.
"""

from __future__ import annotations


def prepare() -> None:
    """Make `import torchvision` safe. Call before importing transformers' vision classes."""
    import importlib.util
    import sys

    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision
    except (RuntimeError, AttributeError):
        for name in [module for module in sys.modules if module.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                library.define(schema)
        _kept_alive.append(library)
        import torchvision  # noqa: F401


_kept_alive: list[object] = []
"""A torch Library takes its operators along when it is collected."""
