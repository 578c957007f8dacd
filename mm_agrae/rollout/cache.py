"""The rollout cache: groups that are sampled but not learnt from yet, for a run that is killed.

After a checkpoint the completions and scores of the next step are written to a file before the
update; a run resumed from that very checkpoint reads them instead of sampling again. The file is
safetensors: token ids and log-probabilities as tensors, the rest as JSON in its header.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from mm_agrae.run.files import write_atomic
from mm_agrae.types import Completion, Correction, Group, Score

_TENSORS = ("token_ids", "logprobs")
_CORRECTIONS = TypeAdapter(dict[int, Correction] | None)


def write(
    path: Path, checkpoint: str, groups: Sequence[Group], draws: Sequence[Sequence[float]], data_state: dict[str, Any]
) -> None:
    """Store the groups of the step after `checkpoint` (its id), what was drawn for each (`tasks.variants.Draw`), and
    the state of the data after them. Raises RunFolderError."""
    from safetensors.torch import save

    every = [completion for group in groups for completion in group.completions]
    header = {
        "checkpoint": checkpoint,
        "data_state": data_state,
        "groups": [
            {
                "position": group.position,
                "draw": draw,
                "problem": group.problem,
                "prompt_ids": group.prompt.token_ids.tolist(),
                "resample_round": group.resample_round,
                "completions": [
                    {
                        "length": len(completion.token_ids),
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "policy_version": completion.policy_version,
                        "learns_from": completion.learns_from,
                    }
                    for completion in group.completions
                ],
                "scores": [asdict(score) for score in group.scores],
                "corrections": _CORRECTIONS.dump_python(group.corrections),
            }
            for group, draw in zip(groups, draws, strict=True)
        ],
    }
    tensors = {
        "token_ids": torch.tensor([i for c in every for i in c.token_ids], dtype=torch.int32),
        "logprobs": torch.tensor([x for c in every for x in c.logprobs], dtype=torch.float64),
    }
    write_atomic(path, save(tensors, {"rollouts": json.dumps(header)}))


def read(
    path: Path, checkpoint: str
) -> tuple[list[tuple[list[Any], list[int], dict[str, Any]]], dict[str, Any]] | None:
    """What `write` stored after the checkpoint of this id, and the state of the data.

    A group is given as what was drawn, the token ids of its prompt, and all of `Group` but
    the prompt. None if the file holds nothing of this checkpoint.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["rollouts"])
            ids, logprobs = (iter(file.get_tensor(name).tolist()) for name in _TENSORS)
        if not checkpoint or header["checkpoint"] != checkpoint:
            return None
        groups = [(group["draw"], group["prompt_ids"], _group(group, ids, logprobs)) for group in header["groups"]]
        return groups, header["data_state"]
    except Exception:  # not whole, or not ours: sampling again costs only time
        return None


def _group(stored: dict[str, Any], ids: Iterator[int], logprobs: Iterator[float]) -> dict[str, Any]:
    completions = []
    for each in stored["completions"]:
        length = each.pop("length")
        own = tuple(islice(ids, length))
        completions.append(Completion(own, tuple(islice(logprobs, length)), **each))
    return {
        "position": stored["position"],
        "completions": completions,
        "scores": [Score(**score) for score in stored["scores"]],
        "resample_round": stored["resample_round"],
        "problem": stored["problem"],
        "corrections": _CORRECTIONS.validate_python(stored["corrections"]),
    }
