"""Prompts and completions -> padded tensors and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm_agrae.types import Completion, MicroBatch, Prompt


@dataclass
class PaddedBatch:
    """Model inputs of B sequences padded to S tokens; pictures apart from their sizes."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mm_token_type_ids: torch.Tensor
    image_grid_thw: torch.Tensor | None


def pad_sequences(
    prompts: Sequence[Prompt],
    completions: Sequence[torch.Tensor] | None,
    *,
    pad_id: int,
    side: str,
    device: torch.device,
) -> PaddedBatch:
    """Pad prompts (each followed by its completion, if given) on the "left" or "right".

    Generation needs left padding, the update right padding; both start from the one set of
    tensors that processing made.
    """
    rows, kinds = [], []
    for index, prompt in enumerate(prompts):
        ids = prompt.token_ids
        kind = prompt.mm_token_type_ids
        kind = torch.zeros_like(ids) if kind is None else kind.to(ids.dtype)
        if completions is not None:
            ids = torch.cat([ids, completions[index].to(ids.dtype)])
            kind = torch.nn.functional.pad(kind, (0, len(ids) - len(kind)))
        rows.append(ids)
        kinds.append(kind)
    longest = max(len(row) for row in rows)
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    mm_token_type_ids = torch.zeros(shape, dtype=torch.int32)
    for index, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        input_ids[index, place] = row
        attention_mask[index, place] = 1
        mm_token_type_ids[index, place] = kind.to(torch.int32)
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return PaddedBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        mm_token_type_ids=mm_token_type_ids.to(device),
        image_grid_thw=torch.cat(grids).to(device) if grids else None,
    )


@dataclass(frozen=True)
class Row:
    """One completion on its way into the update. `prompt` is an index into the rank's prompts."""

    prompt: int
    completion: Completion
    advantage: float


def micro_batch(prompts: Sequence[Prompt], rows: Sequence[Row], device: torch.device) -> MicroBatch:
    """Rows, those of a prompt adjacent, as padded tensors."""
    used = sorted({row.prompt for row in rows})
    longest = max(1, *(len(row.completion.token_ids) for row in rows))
    token_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest)
    logp_BT = torch.zeros(len(rows), longest)
    for index, row in enumerate(rows):
        length = len(row.completion.token_ids)
        token_BT[index, :length] = torch.tensor(row.completion.token_ids, dtype=torch.long)
        mask_BT[index, :length] = 1
        logp_BT[index, :length] = torch.tensor(row.completion.logprobs)
    return MicroBatch(
        prompts=[prompts[index] for index in used],
        prompt_index_B=torch.tensor([used.index(row.prompt) for row in rows]),
        token_BT=token_BT.to(device),
        mask_BT=mask_BT.to(device),
        advantage_B=torch.tensor([row.advantage for row in rows]).to(device),
        sampling_logp_BT=logp_BT.to(device),
    )
