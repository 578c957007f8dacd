"""Rollouts of a step whose update has not been written yet, kept for a run that is killed.

After a checkpoint the completions and scores of the next step go into a file before they are
learnt from; a run resumed from that very checkpoint takes them up instead of sampling again. The
file is safetensors: token ids and log-probabilities as tensors, the rest as JSON in its header.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mm_agrae.run.records import write_atomic
from mm_agrae.types import Completion, Group, Score


@dataclass(frozen=True)
class KeptGroup:
    """A group without its prompt, of which `row` in the data and `prompt_ids` are kept."""

    position: int
    row: int
    prompt_ids: list[int]
    completions: list[Completion]
    scores: list[Score]
    draw: int


def write(
    path: Path,
    checkpoint: str,
    groups: Sequence[Group],
    rows: Sequence[int],
    place: dict[str, int],
) -> None:
    """Keep the groups of the step after `checkpoint` (its id), whose prompts are `rows` of the
    data, and where the data then stand. Raises RunFolderError."""
    from safetensors.torch import save

    every = [completion for group in groups for completion in group.completions]
    head = {
        "checkpoint": checkpoint,
        "place": place,
        "groups": [
            {
                "position": group.position,
                "row": row,
                "prompt_ids": group.prompt.token_ids.tolist(),
                "draw": group.resample_round,
                "completions": [
                    {
                        "length": len(completion.token_ids),
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "policy_version": completion.policy_version,
                    }
                    for completion in group.completions
                ],
                "scores": [asdict(score) for score in group.scores],
            }
            for group, row in zip(groups, rows, strict=True)
        ],
    }
    tensors = {
        "token_ids": torch.tensor([i for c in every for i in c.token_ids], dtype=torch.int32),
        "logprobs": torch.tensor([x for c in every for x in c.logprobs], dtype=torch.float64),
    }
    write_atomic(path, save(tensors, {"unfinished": json.dumps(head)}))


def read(path: Path, checkpoint: str) -> tuple[list[KeptGroup], dict[str, int]] | None:
    """What `write` kept after the checkpoint of this id; None if there is nothing of the kind."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads(file.metadata()["unfinished"])
            token_ids, logprobs = (file.get_tensor(name).tolist() for name in _TENSORS)
        if not checkpoint or head["checkpoint"] != checkpoint:
            return None
        ids, values = iter(token_ids), iter(logprobs)
        groups = [_group(group, ids, values) for group in head["groups"]]
        return groups, {name: int(head["place"][name]) for name in _PLACE}
    except Exception:  # a file that is not whole or not ours: sampling again costs only time
        return None


_TENSORS = ("token_ids", "logprobs")
_PLACE = ("data_position", "rows_skipped")


def _group(values: dict[str, Any], ids: Any, logprobs: Any) -> KeptGroup:
    completions = [
        Completion(
            token_ids=tuple(itertools.islice(ids, each["length"])),
            logprobs=tuple(itertools.islice(logprobs, each["length"])),
            text=each["text"],
            finish_reason=each["finish_reason"],
            policy_version=each["policy_version"],
        )
        for each in values["completions"]
    ]
    scores = [Score(**score) for score in values["scores"]]
    return KeptGroup(
        values["position"], values["row"], values["prompt_ids"], completions, scores, values["draw"]
    )
