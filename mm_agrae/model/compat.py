"""Works around one common broken install before transformers' image processors are imported.

A CPU build of torch next to the default torchvision wheel leaves torchvision's compiled library unloadable; importing
torchvision then fails with "operator torchvision::nms does not exist". None of its operators is used here, so
declaring their schemas is enough. The default wheels of torchaudio and torchcodec, which vLLM installs and
transformers imports where it finds them, fail in the same way; neither is used, so they are treated as not installed.
"""

import importlib.util
import sys


def prepare() -> None:
    """Make `import torchvision` safe. Call before importing transformers' vision classes."""
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

        for name in ("torchaudio", "torchcodec"):
            _hide_if_broken(name)


def _hide_if_broken(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        return
    except (OSError, RuntimeError):
        for module in [known for known in sys.modules if known.split(".")[0] == name]:
            del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]  # as if not installed


_kept_alive: list[object] = []
"""A torch Library unregisters its operators when it is garbage-collected."""
