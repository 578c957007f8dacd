"""Updates and rollouts of Qwen2.5-VL-3B and its text model on a fake CUDA device, counted.

    python tests/fake_cuda                 all cases: check them, print a Markdown table
    python tests/fake_cuda --write         and write what was counted to table.json
    python tests/fake_cuda full lora       some cases

The project's own code runs: Policy, Updater and HFEngine on micro-batches of real shapes. `stand_ins` names what does
not run and what takes its place, `reasons` why the host reads from the device where it does.
"""

import faulthandler
import os
import sys
from pathlib import Path

import device

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    faulthandler.enable()  # a fake device has no memory behind its pointers
    device.load()
    from mm_agrae.model.compat import prepare

    prepare()
    from cases import main

    main()
