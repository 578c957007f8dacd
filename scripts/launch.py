"""accelerate's launcher or torchrun, without a traceback of their own below the error of a process that they started.

python scripts/launch.py accelerate launch … | torchrun …

The status is that of the process that failed first. Ctrl-C on a terminal reaches every process by itself; the launcher
does not pass it on a second time, and waits until they have saved.
"""

import importlib
import signal
import subprocess
import sys
from argparse import ArgumentParser

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}

torchruns_parser = run.get_args_parser


def parser() -> ArgumentParser:
    """torchrun's, which accelerate uses too, with another default."""
    made = torchruns_parser()
    made.set_defaults(signals_to_handle="SIGTERM,SIGHUP,SIGQUIT")
    return made


def main() -> int:
    sys.argv = sys.argv[1:]
    signal.signal(signal.SIGINT, lambda *_: None)  # SIG_IGN would be inherited by the processes
    run.get_args_parser = parser
    try:
        importlib.import_module(LAUNCHERS[sys.argv[0]]).main()
        return 0
    except ChildFailedError as error:
        status = min(error.failures.values(), key=lambda failure: failure.timestamp).exitcode
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except SignalException as error:
        status = -int(error.sigval)
    return status if status >= 0 else 128 - status  # ended by a signal


if __name__ == "__main__":
    sys.exit(main())
