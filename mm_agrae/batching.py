"""Prompts and completions -> padded tensors, micro-batches, and the plan of an update.

What must be the same on all ranks (advantages, loss denominators, the number of micro-batches) is worked out from the
gathered numbers of the whole step, so that one process and N processes compute the same gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from mm_agrae import advantage
from mm_agrae.advantage import AdvantageLevels
from mm_agrae.config.objective import rule_settings
from mm_agrae.config.schema import Config, UpdateSection
from mm_agrae.loss import Denominator
from mm_agrae.types import Completion, Group, GroupSummary, MicroBatch, Prompt


@dataclass
class PaddedBatch:
    """Model inputs of B sequences padded to S tokens, without the pixels of their images."""

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

    Generation needs left padding, the update right padding; both start from the tensors that `Processing` made once.
    """
    rows, kinds = [], []
    for index, prompt in enumerate(prompts):
        ids, kind = prompt.token_ids, prompt.mm_token_type_ids
        kind = torch.zeros_like(ids) if kind is None else kind.to(ids.dtype)
        if completions is not None:
            ids = torch.cat([ids, completions[index].to(ids.dtype)])
            kind = torch.nn.functional.pad(kind, (0, len(ids) - len(kind)))
        rows.append(ids)
        kinds.append(kind)
    ones = [torch.ones_like(ids) for ids in rows]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return PaddedBatch(
        input_ids=pad_sequence(rows, True, pad_id, side).to(device, torch.long),
        attention_mask=pad_sequence(ones, True, 0, side).to(device, torch.long),
        mm_token_type_ids=pad_sequence(kinds, True, 0, side).to(device, torch.int32),
        image_grid_thw=torch.cat(grids).to(device) if grids else None,
    )


@dataclass(frozen=True)
class UpdateRow:
    """One completion of the update. `prompt` is an index into this rank's prompts."""

    prompt: int
    completion: Completion
    advantage: float


def micro_batch(prompts: Sequence[Prompt], rows: Sequence[UpdateRow], device: torch.device) -> MicroBatch:
    """Rows, those of a prompt adjacent, as padded tensors."""
    used = sorted({row.prompt for row in rows})
    completions = [row.completion for row in rows]
    length_B = torch.tensor([len(completion.token_ids) for completion in completions])
    inside_BT = torch.arange(max(1, int(length_B.max()))) < length_B[:, None]
    token_BT = torch.zeros(inside_BT.shape, dtype=torch.long)
    token_BT[inside_BT] = torch.tensor([t for each in completions for t in each.token_ids])
    logp_BT = torch.zeros(inside_BT.shape)
    logp_BT[inside_BT] = torch.tensor([logp for each in completions for logp in each.logprobs])
    first_B1 = torch.tensor([[completion.learns_from] for completion in completions])
    learning_BT = inside_BT & (torch.arange(inside_BT.shape[1]) >= first_B1)
    return MicroBatch(
        prompts=[prompts[index] for index in used],
        prompt_index_B=torch.tensor([used.index(row.prompt) for row in rows]),
        token_BT=token_BT.to(device),
        mask_BT=learning_BT.float().to(device),
        advantage_B=torch.tensor([row.advantage for row in rows]).to(device),
        sampling_logp_BT=logp_BT.to(device),
        length_B=length_B,
    )


def idle_batch(prompts: Sequence[Prompt], device: torch.device) -> MicroBatch:
    """A row of padding, for a rank without completions: forward and backward passes are collective."""
    batch = micro_batch(prompts, [UpdateRow(0, Completion((0,), (0.0,), "", "stop", 0), 0.0)], device)
    return replace(batch, mask_BT=batch.mask_BT * 0, length_B=batch.length_B * 0)


def split_by_tokens(
    prompt_length_P: Sequence[int], prompt_index_B: Sequence[int], length_B: Sequence[int], budget: int
) -> list[list[int]]:
    """Rows of each micro-batch so that prompts and completions stay within `budget` tokens.

    Rows of one prompt are adjacent and share it. A group is cut only if it exceeds the budget by
    itself; a single completion that does is a micro-batch of its own.
    """
    batches: list[list[int]] = [[]]
    room = budget
    for index, group in itertools.groupby(range(len(length_B)), lambda b: prompt_index_B[b]):
        rows, prompt = list(group), prompt_length_P[index]
        whole = prompt + sum(length_B[row] for row in rows)
        if whole > room and batches[-1]:
            batches.append([])
            room = budget
        room -= prompt
        for position, row in enumerate(rows):
            if length_B[row] > room and position:
                batches.append([])
                room = budget - prompt
            batches[-1].append(row)
            room -= length_B[row]
    return [batch for batch in batches if batch]


@dataclass(frozen=True)
class StepTable:
    """Numbers of every completion of the step, over all ranks, ordered by position.

    Rewards and success are there as the completions stand, and as they were sampled, before guided correction.
    """

    groups: list[GroupSummary]
    reward_PG: torch.Tensor
    success_PG: torch.Tensor
    reward_before_PG: torch.Tensor
    success_before_PG: torch.Tensor
    length_PG: torch.Tensor
    learning_PG: torch.Tensor
    entropy_PG: torch.Tensor

    @classmethod
    def of(cls, groups: Iterable[GroupSummary]) -> StepTable:
        groups = sorted(groups, key=lambda group: group.position)
        names = ("rewards", "success", "rewards_before", "success_before", "lengths", "learning", "entropies")
        columns = ([getattr(each, name) for each in groups] for name in names)
        return cls(groups, *(torch.tensor(column, dtype=torch.float64) for column in columns))

    def advantages(self, config: Config) -> AdvantageLevels:
        """Advantages of the whole step by the rule that the config names."""
        weights = config.reward.parts | ({"overlong": 1.0} if config.reward.overlong else {})
        weights = {name: weight for name, weight in weights.items() if weight}
        return advantage.levels(
            config.advantage.rule,
            self.reward_PG,
            self.success_PG,
            self.length_PG,
            entropy_PG=self.entropy_PG,
            problem_P=[group.problem for group in self.groups],
            difficulty_P=[group.difficulty for group in self.groups],
            part_FPG=[[[part.get(name, math.nan) for part in g.parts] for g in self.groups] for name in weights]
            or None,
            weight_F=list(weights.values()) or None,
            before_PG=(self.reward_before_PG, self.success_before_PG),
            **rule_settings(config),
        )


@dataclass(frozen=True)
class MiniBatch:
    """This rank's share of one optimiser step."""

    denominator: Denominator
    batches: list[MicroBatch]


def plan_update(
    groups: Sequence[Group],
    table: StepTable,
    advantage_PG: torch.Tensor,
    config: Config,
    *,
    rank: int,
    world: int,
    device: torch.device,
) -> list[MiniBatch]:
    """The mini-batches of a rollout, equal in number and in micro-batches on every rank.

    `groups` are this rank's: those at positions p with p mod world = rank. Completions without a
    gradient (advantage 0, and neither KL nor entropy in the loss) are left out but count in the
    denominator: the gradient is the same, the work less. Tokens that are not learnt do not count: those
    before `Completion.learns_from` and, as in TRL, of truncated completions under `update.mask_truncated`.
    A micro-batch holds at most `update.micro_batch_completions` completions or, if
    `update.micro_batch_tokens` is set, so many tokens of prompts and completions; a group is cut only if
    it does not fit in one.
    """
    update = config.update
    # KL and entropy give every completion a gradient, also one without advantage; the top of the entropies is of all.
    wanted_PG = (advantage_PG != 0) | (update.kl_coef > 0) | update.entropy_bonus | (update.top_entropy < 1)
    left_out_PG = torch.tensor([group.truncated for group in table.groups]) & update.mask_truncated
    wanted_PG &= ~left_out_PG
    wanted_PG &= table.learning_PG > 0
    prompts = update.mini_batch_prompts or len(table.groups)
    own_prompts = [group.prompt for group in groups]
    local = {group.position: index for index, group in enumerate(groups)}
    plan = []
    for start in range(0, len(table.groups), prompts):
        block = range(start, start + prompts)
        cells_by_rank: list[list[tuple[int, int]]] = [[] for _ in range(world)]
        for p, g in itertools.product(block, range(advantage_PG.shape[1])):
            if wanted_PG[p, g]:
                cells_by_rank[p % world].append((p, g))
        # Every rank works out the cuts of all, so that they agree on the number of micro-batches.
        cuts = [_cut(cells, table, update) if cells else [] for cells in cells_by_rank]
        rows = [
            UpdateRow(local[p], groups[local[p]].completions[g], float(advantage_PG[p, g]))
            for p, g in cells_by_rank[rank]
        ]
        batches = [micro_batch(own_prompts, [rows[i] for i in part], device) for part in cuts[rank]]
        for _ in range(max(1, *map(len, cuts)) - len(batches)):
            batches.append(idle_batch(own_prompts, device))
        denominator = Denominator(
            completions=prompts * advantage_PG.shape[1],
            tokens=int(table.learning_PG[block].masked_fill(left_out_PG[block], 0).sum()),
            max_new_tokens=config.rollout.max_new_tokens,
        )
        plan.append(MiniBatch(denominator, batches))
    return plan


def _cut(cells: Sequence[tuple[int, int]], table: StepTable, update: UpdateSection) -> list[list[int]]:
    """Indices into `cells`, (group, completion) pairs, of each micro-batch."""
    group_of = [p for p, _ in cells]
    if update.micro_batch_tokens is None:
        free = [0] * len(table.groups)
        return split_by_tokens(free, group_of, [1] * len(cells), update.micro_batch_completions)
    prompt_lengths = [group.prompt_length for group in table.groups]
    lengths = [table.groups[p].lengths[g] for p, g in cells]
    return split_by_tokens(prompt_lengths, group_of, lengths, update.micro_batch_tokens)
