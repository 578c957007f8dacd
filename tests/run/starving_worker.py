"""`mm-agrae ARGUMENTS` in a process whose memory ends in a stage: STARVED is "update" (of step 2) or "loading",
ROOM the bytes that are left."""

import os
import resource
import sys
from pathlib import Path

from mm_agrae import cli, trainer
from mm_agrae.model.compat import prepare
from mm_agrae.step import Updater

ROOM = int(os.environ["ROOM"])
backward, policy = Updater.backward, trainer.Policy


def starve() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


def in_update(self, *args, **kwargs):
    if self.policy.version == 1:
        starve()
    return backward(self, *args, **kwargs)


def in_loading(*args, **kwargs):
    starve()
    return policy(*args, **kwargs)


if __name__ == "__main__":
    prepare()
    if os.environ["STARVED"] == "update":
        Updater.backward = in_update
    else:
        trainer.Policy = in_loading
    sys.exit(cli.main(sys.argv[1:]))
