import os
import tempfile

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mm_agrae.model.compat import prepare

prepare()

_tracked = tempfile.TemporaryDirectory()  # trackio reads it when it is imported, and keeps runs of earlier tests
os.environ["TRACKIO_DIR"] = _tracked.name
SLOW = os.environ.get("MM_AGRAE_SLOW", "0") != "0"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and not SLOW:
            item.add_marker(pytest.mark.skip(reason="takes long; set MM_AGRAE_SLOW=1"))
