"""The model card (README.md) of a checkpoint or an export: front matter for the hub, then what made the model, what it
scored and how it is loaded, by the template `model_card.md`. Nothing asks the network, and no local path is named.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Template

from mm_agrae import advantage
from mm_agrae.config import Config, DataSource, rule_settings
from mm_agrae.errors import HUB_ID, RunFolderError
from mm_agrae.loss import loss_and_bounds
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult
from mm_agrae.run.versions import versions
from mm_agrae.tasks import TASKS

CARD_FILE = "README.md"
TEMPLATE = Template(Path(__file__).with_suffix(".md").read_text("utf-8"))

PAPERS = {"dapo": "2503.14476", "edge_released_code": "2507.21848", "diva_released_code": "2603.01106"}
"""Of rules whose docstring does not name their own first; A-GRAE's where it names none."""


def model_card(
    config: Config | None,
    policy: Policy,
    processing: Processing,
    state: dict[str, Any],
    run: Path,
    merged: bool = False,
) -> str:
    """The card's text. `config` is None for a model that no run has made; `state` holds the step and the versions of a
    checkpoint, the run folder `run` its evaluations. `merged`: LoRA is no longer apart from the weights."""
    from huggingface_hub import ModelCardData

    base, _ = model_and_adapter(config.model.path if config else processing.path)
    base_id, licence = _origin(base)
    lora = hasattr(policy.model, "peft_config")
    front = ModelCardData(
        base_model=base_id,
        datasets=sorted({*map(_hub_id, config.data.train)} - {""}) or None if config else None,
        library_name="peft" if lora and not merged else "transformers",
        pipeline_tag="image-text-to-text" if processing.is_multimodal else "text-generation",
        tags=["mm-agrae", "reinforcement-learning", "grpo", *([config.advantage.rule] if config else [])],
        **licence,
    )
    more: dict[str, Any] = {}
    if config:
        name, update, rule = config.advantage.rule, config.update, advantage.RULES[config.advantage.rule]
        parameters = inspect.signature(rule).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
        more = {
            "rule_settings": defaults | rule_settings(config),
            "bounds": loss_and_bounds(update.loss, update.clip_low, update.clip_high, update.loss_options)[1:],
            "paper": PAPERS.get(name, [*re.findall(r"\d{4}\.\d{5}", rule.__doc__ or ""), "2602.05548"][0]),
            "scores": list(_scores(RunFolder(run), state["step"])),
        }
    return TEMPLATE.render(
        card_data=front.to_yaml(), config=config, lora=lora, adapter=lora and not merged, state=state, hub_id=_hub_id,
        multimodal=processing.is_multimodal, base=base_id, folder=Path(base).name,
        versions=state.get("versions") or versions(), **more,
    ).encode(errors="replace").decode() + "\n"  # fmt: skip


def _origin(base: str) -> tuple[str | None, dict[str, Any]]:
    """The hub id of a model and what its card says of its licence, as far as files here tell."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    folder = Path(base)
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{folder.absolute()}/")
    name = "/".join(cached.groups()) if cached else base if HUB_ID.fullmatch(base) and not folder.exists() else None
    try:
        card = folder / CARD_FILE if folder.exists() else try_to_load_from_cache(base, CARD_FILE)
        said = ModelCard.load(str(card)).data.to_dict() if Path(str(card)).is_file() else {}
    except Exception:  # other people's YAML
        said = {}
    if name is None and "mm-agrae" in (said.get("tags") or ()):
        name = said.get("base_model")  # the run went on from a checkpoint or an export of ours
    return name, {key: said[key] for key in ("license", "license_name", "license_link") if key in said}


def _hub_id(source: DataSource) -> str:
    """The hub id of a data set, "" for one that is not from the hub."""
    entry, path = getattr(TASKS.get(source.task), "entry", None), str(source.options.get("path", ""))
    if entry is not None:
        return str(entry.hub)
    return path if source.task == "files" and HUB_ID.fullmatch(path) and not Path(path).exists() else ""


def _scores(run: RunFolder, step: int) -> Iterator[tuple[str, EvaluationResult | None, int, EvaluationResult]]:
    """(set, result before training, step, newest result up to `step`)."""
    found: dict[str, dict[int, EvaluationResult]] = {}
    with contextlib.suppress(RunFolderError):  # a damaged file must not keep a checkpoint from being written
        summary = run.read_summary()
        ends = {"before": 0, "after": summary.get("steps") if summary.get("finished") else None}
        for result in run.read_evaluations():
            at = ends.get(result.name, step_of(result.name) or None)
            if at is not None and at <= step:
                found.setdefault(result.label, {})[at] = result
    for label, results in found.items():
        yield label, results.get(0), *max(results.items())


def step_of(name: str) -> int:
    """The step of an evaluation called step_000010; 0 for any other name."""
    return int(name.removeprefix("step_")) if re.fullmatch(r"step_\d+", name) else 0
