"""What the demo may show and to whom: the settings that the whole app is built from."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mm_agrae.config.shipped import found, shipped
from mm_agrae.errors import ConfigError, no_model
from mm_agrae.view.runs import find_runs

DATA = shipped("data")
EMBEDDED = {
    "base": DATA / "warm_start" / "vl",
    "GRPO": DATA / "trained" / "vl_grpo",
    "A-GRAE": DATA / "trained" / "vl_agrae",
    "base (text)": DATA / "warm_start" / "text",
    "GRPO (text)": DATA / "trained" / "text_grpo",
    "A-GRAE (text)": DATA / "trained" / "text_agrae",
}
"""Checkpoints that come with the package, by their display names."""
EXAMPLE_RUNS = (DATA / "example_run", DATA / "example_run_text")


def embedded_models() -> dict[str, str]:
    """Name -> folder of those that exist."""
    return {name: str(path) for name, path in EMBEDDED.items() if (path / "config.json").is_file()}


def embedded_runs() -> tuple[Path, ...]:
    """The small runs that come with the package and exist."""
    return tuple(run for run in EXAMPLE_RUNS if (run / "config.yaml").is_file())


@dataclass(frozen=True)
class DemoSettings:
    """models: name -> checkpoint folder or model id. runs: the run folders that may be read.

    `allow_model_paths` lets visitors name further models; `share` opens Gradio's public tunnel.
    `max_upload_mb` and `max_upload_pixels` limit one image, `max_waiting` the number of queued
    requests. `port` 0 means the first free one from 7860.
    """

    models: Mapping[str, str] = field(default_factory=embedded_models)
    runs: tuple[Path, ...] = field(default_factory=embedded_runs)
    allow_model_paths: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    share: bool = False
    open_browser: bool = False
    max_upload_mb: float = 8.0
    max_upload_pixels: int = 16_000_000
    max_waiting: int = 32
    device: str = "auto"


def settings_for(paths: Sequence[str], **options: object) -> DemoSettings:
    """Settings for the command line's paths: run folders, checkpoints, or model ids.

    Run folders, and folders of run folders, are shown in the explorer, and the newest checkpoint
    of a run folder, if any, in the playground; anything else is a model. What is named here comes
    before what is embedded. Raises ConfigError for a path with neither a run nor a checkpoint.
    """
    paths = [found(path) for path in paths]
    for path in paths:
        if reason := no_model(path):
            raise ConfigError(f"demo: {path} is not a run folder, a checkpoint or a model id: {reason}")
    from mm_agrae.run import checkpoint

    embedded = embedded_models()
    models: dict[str, str] = {}
    runs: list[Path] = []
    for path in paths:
        folder = Path(path)
        if (folder / "config.yaml").is_file():
            runs.append(folder)
            newest = checkpoint.newest(folder / "checkpoints")
            if newest is not None:
                models[_free_name(folder.resolve().name, models | embedded)] = str(newest)
        elif find_runs([folder]):
            runs.append(folder)
        elif folder.exists() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(f"demo: {path} holds neither a run (config.yaml) nor a checkpoint (config.json)")
        else:
            models[_free_name(folder.resolve().name, models | embedded)] = path
    all_runs = (*runs, *embedded_runs())
    return DemoSettings(models=models | embedded, runs=all_runs, **options)  # type: ignore[arg-type]


def require_address(host: str, port: int) -> None:
    """Raise ConfigError if the demo cannot listen there."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"demo: --port is {port}; it must be from 1 to 65535, or left out for a free one")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()
    except OSError as error:
        raise ConfigError(
            f"demo: cannot listen on {host}, port {port or 'any'} ({error.strerror}); give another --port, or none "
            "for a free one, and a --host of this machine (127.0.0.1: for itself alone, 0.0.0.0: for others too)"
        ) from None


def _free_name(name: str, taken: Mapping[str, str]) -> str:
    """`name`, with a number appended if it is taken."""
    numbers = (f"{name} ({number})" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(free for free in numbers if free not in taken)
