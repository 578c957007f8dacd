"""Guided correction (EDGE-GRPO, arXiv 2507.21848): between scoring and advantages, in training alone.

An incorrect completion o takes a branch drawn by its place (seed, step, position, index) alone:

    reflect    o + cue, and the policy goes on writing
    answer     o + cue with the gold answer
    solution   the example's own solution in place of o; where there is none, the branch answer

All on token ids: o loses its end token, and nothing of it is tokenized again. Inserted tokens have no sampling
log-probability (NaN), so their importance weight is 1; with `train_on: added` they and all before them are not in the
loss. Advantages are made of the new rewards; success, p and ω stay those of what was sampled. A completion is left as
it is, and counted, if the new one would exceed `rollout.max_new_tokens` or the checker refuses the inserted answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mm_agrae.errors import ConfigError
from mm_agrae.grading.extraction import final_answer, from_boxes
from mm_agrae.model.processing import THINK, Processing
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout.engine import Engine, derive_seed
from mm_agrae.run.context import RunContext
from mm_agrae.tasks.variants import worked_solutions
from mm_agrae.types import Completion, Correction, Example, Group, Prompt

END_OF_THINKING = "</think>"


@dataclass(frozen=True, eq=False)
class _Draft:
    """A correction of a completion: what is kept of it, and what is inserted after that."""

    group: Group
    index: int
    drawn: str
    branch: str
    kept: tuple[int, ...]
    inserted: tuple[int, ...]
    room: int
    """Tokens that may follow; negative: the correction does not fit."""
    seed: int

    @property
    def ends(self) -> tuple[int, int]:
        """Tokens up to the insertion, and with it."""
        return len(self.kept), len(self.kept + self.inserted)

    @property
    def prompt(self) -> Prompt:
        """What the policy goes on from."""
        prompt, kinds = self.group.prompt, self.group.prompt.mm_token_type_ids
        ids = torch.cat([prompt.token_ids, torch.tensor(self.kept + self.inserted).to(prompt.token_ids)])
        kinds = kinds if kinds is None else torch.nn.functional.pad(kinds, (0, len(ids) - len(kinds)))
        return replace(prompt, token_ids=ids, mm_token_type_ids=kinds, room=self.room)

    def completion(self, processing: Processing, more: Completion | None, learns_from: int) -> Completion:
        """The corrected completion; `more` is what the policy wrote after the cue."""
        old = self.group.completions[self.index]
        more = more or Completion((), (), "", "stop", old.policy_version)
        ids = self.kept + self.inserted + more.token_ids[: self.room]
        forced = (math.nan,) * len(self.inserted)
        logprobs = old.logprobs[: len(self.kept)] + forced + more.logprobs[: self.room]
        reason = more.finish_reason if len(more.token_ids) <= self.room else "length"
        return Completion(ids, logprobs, processing.decode(ids), reason, old.policy_version, learns_from)


class Corrector:
    """Raises ConfigError if a text of the settings holds a control token."""

    def __init__(self, context: RunContext, processing: Processing):
        assert context.config.rollout.correct is not None
        self.config, self.settings = context.config, context.config.rollout.correct
        self.processes, self.stopwatch, self.processing = context.processes, context.stopwatch, processing
        self.cue = processing.encode(self.settings.reflect_cue)
        for name in ("reflect_cue", "answer_cue", "solution_text"):
            if not processing.encode(getattr(self.settings, name)):
                raise ConfigError(f"rollout.correct.{name} holds a control token of the model's; remove it")

    def correct(self, groups: Sequence[Group], step: int, engine: Engine, rewarder: Rewarder) -> None:
        """Correct incorrect completions of this rank's groups in place. Called by all ranks."""
        drafts = []
        for group in groups:
            group.corrections = {}
            for index, score in enumerate(group.scores):
                # A failed reward function has not found the completion to be incorrect.
                if not score.success and not score.error and (draft := self._draft(group, index, step)):
                    drafts.append(draft)
                    text = group.completions[index].text
                    group.corrections[index] = Correction(draft.drawn, "", score, text)
        fitting = [draft for draft in drafts if draft.inserted and draft.room >= (draft.branch == "reflect")]
        written = self._reflect([draft for draft in fitting if draft.branch == "reflect"], engine)
        fitting = [draft for draft in fitting if draft in written or draft.branch != "reflect"]
        added = self.settings.train_on == "added"
        made = [
            draft.completion(self.processing, written.get(draft), draft.ends[1] if added else 0) for draft in fitting
        ]
        with self.stopwatch("reward"):
            scores = rewarder.score([draft.group.prompt.example for draft in fitting], made)
        for draft, completion, score in zip(fitting, made, scores, strict=True):
            group, index = draft.group, draft.index
            if score.success or draft.branch == "reflect":
                first, last = (len(self.processing.decode(completion.token_ids[:end])) for end in draft.ends)
                assert group.corrections is not None
                group.corrections[index] = replace(group.corrections[index], branch=draft.branch, forced=(first, last))
                group.completions[index], group.scores[index] = completion, score

    def _draft(self, group: Group, index: int, step: int) -> _Draft | None:
        """The correction that is drawn for a completion; None for none."""
        place = (self.config.train.seed, "correct", step, group.position, index)
        point = derive_seed(*place, "branch") / 2**63
        for drawn in ("reflect", "answer", "solution"):
            point -= getattr(self.settings, drawn)
            if point < 0:
                break
        else:
            return None
        example, old = group.prompt.example, group.completions[index]
        kept, end = old.token_ids, self.processing.end_id
        if kept and kept[-1] in self.processing.eos_ids:
            kept, end = kept[:-1], kept[-1]
        solutions = worked_solutions(example) if drawn == "solution" else []
        branch = "answer" if drawn == "solution" and not solutions else drawn
        if branch == "reflect":
            inserted = self.cue
        else:
            text = self._ending(example, old.text)
            if branch == "solution":
                chosen = solutions[derive_seed(*place, "solution") % len(solutions)]
                kept, text = (), self._solution(example, chosen)
            inserted = self.processing.encode(text)
            inserted = inserted and (*inserted, end)
        rollout = self.config.rollout
        room = rollout.max_new_tokens - len(kept) - len(inserted)
        if branch == "reflect":
            room = min(room, self.settings.reflect_tokens)
        return _Draft(group, index, drawn, branch, kept, inserted, room, derive_seed(*place, "reflect"))

    def _reflect(self, drafts: Sequence[_Draft], engine: Engine) -> dict[_Draft, Completion]:
        """What the policy writes after the cue; nothing where a server refused to go on."""
        if not any(self.processes.gather([bool(drafts)], "guided correction")):
            return {}
        rollout = self.config.rollout
        limit = min(self.settings.reflect_tokens, rollout.max_new_tokens)
        sampling = rollout.model_copy(update={"max_new_tokens": limit})
        with self.stopwatch("rollout"):
            seeds = [draft.seed for draft in drafts]
            groups = engine.generate([draft.prompt for draft in drafts], 1, sampling, seeds)
        return {draft: group[0] for draft, group in zip(drafts, groups, strict=True) if group}

    def _solution(self, example: Example, solution: str) -> str:
        text = self._filled(self.settings.solution_text.replace("{solution}", solution), example)
        shown = f"{THINK}\n{text}" if self.processing.opens_thinking else text
        ends = END_OF_THINKING in shown or THINK not in shown
        boxed = from_boxes(shown.rpartition(END_OF_THINKING)[2]) is not None
        return text if ends and boxed else text + self._ending(example, shown)

    def _ending(self, example: Example, text: str) -> str:
        """What states the gold answer after `text`."""
        is_open = text.rfind(THINK) > text.rfind(END_OF_THINKING)
        return (f"\n{END_OF_THINKING}" if is_open else "") + self._filled(self.settings.answer_cue, example)

    def _filled(self, text: str, example: Example) -> str:
        gold = final_answer(example.answer)
        return text.replace("{boxed}", rf"\boxed{{{gold}}}").replace("{answer}", gold)
