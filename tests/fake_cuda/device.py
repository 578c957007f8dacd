"""A CUDA device for a CPU build of torch, on which fake tensors run.

`guard.cpp` registers what torch asks a device for beyond its kernels. FakeTensorMode then takes device "cuda": every
operator is dispatched, typed and shaped as on a GPU, and none is computed. The registration holds for a whole process,
so `load` belongs in one that does nothing else.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def load() -> None:
    """Make this process's torch take the device "cuda" for fake tensors. Call it before torch is imported."""
    ctypes.CDLL(str(_built()))  # first: torch asks once, while it is imported, what devices there are
    import torch.cuda.amp.common

    # Without these, a CPU build turns autocast on "cuda" off.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True


def _built() -> Path:
    """The compiled guard, made once for each version of torch."""
    torch_version = version("torch")
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm_agrae"
    library = cache / f"fake_cuda_{torch_version}_{key}.so"
    if not library.is_file():
        if (program := compiler()) is None:
            sys.exit("no C++ compiler (g++, or what CXX names) for a fake CUDA device")
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
        lib, include = folder / "lib", folder / "include"
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [program, "-std=c++20", "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(made),
             f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed",
             "-ltorch_cpu", "-lc10"],
            check=True,
        )  # fmt: skip
        made.replace(library)  # another process may build it at the same time
    return library
