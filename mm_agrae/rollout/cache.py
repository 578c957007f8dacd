"""The rollout cache: groups that are sampled but not learnt from yet, for a run that is killed.

After a checkpoint the completions and scores of the next step are written to a file before the
update; a run resumed from that very checkpoint reads them instead of sampling again. The file is
safetensors: token ids and log-probabilities as tensors, the rest as JSON in its header.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mm_agrae.run.files import write_atomic
from mm_agrae.types import Completion, Group, Prompt, Score

_TENSORS = ("token_ids", "logprobs")
_DATA_STATE = ("data_position", "rows_skipped")


@dataclass(frozen=True)
class CachedGroup:
    """A group without its prompt, of which the `row` in the data and `prompt_ids` are stored."""

    position: int
    row: int
    prompt_ids: list[int]
    completions: list[Completion]
    scores: list[Score]
    resample_round: int

    def with_prompt(self, prompt: Prompt) -> Group:
        return Group(self.position, prompt, self.completions, self.scores, self.resample_round)


def write(
    path: Path,
    checkpoint: str,
    groups: Sequence[Group],
    rows: Sequence[int],
    data_state: dict[str, int],
) -> None:
    """Store the groups of the step after `checkpoint` (its id), whose prompts are `rows` of the
    data, and the data cursor after them. Raises RunFolderError."""
    from safetensors.torch import save

    every = [completion for group in groups for completion in group.completions]
    header = {
        "checkpoint": checkpoint,
        "data_state": data_state,
        "groups": [
            {
                "position": group.position,
                "row": row,
                "prompt_ids": group.prompt.token_ids.tolist(),
                "resample_round": group.resample_round,
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
    write_atomic(path, save(tensors, {"rollouts": json.dumps(header)}))


def read(path: Path, checkpoint: str) -> tuple[list[CachedGroup], dict[str, int]] | None:
    """What `write` stored after the checkpoint of this id; None if there is nothing of it."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["rollouts"])
            token_ids, logprobs = (file.get_tensor(name).tolist() for name in _TENSORS)
        if not checkpoint or header["checkpoint"] != checkpoint:
            return None
        ids, values = iter(token_ids), iter(logprobs)
        groups = [_group(group, ids, values) for group in header["groups"]]
        return groups, {name: int(header["data_state"][name]) for name in _DATA_STATE}
    except Exception:  # not whole, or not ours: sampling again costs only time
        return None


def _group(values: dict[str, Any], ids: Iterator[int], logprobs: Iterator[float]) -> CachedGroup:
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
    return CachedGroup(
        values["position"],
        values["row"],
        values["prompt_ids"],
        completions,
        scores,
        values["resample_round"],
    )
