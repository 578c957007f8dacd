"""TRL's GRPOTrainer with our advantage rules.

    trainer = AGRAEGRPOTrainer(
        model, [accuracy, format], args=GRPOConfig(...), train_dataset=...,
        rule="agrae", settings={"alpha": 0.5}, success_from="accuracy",
    )
    trainer.train()

Everything but the advantages is TRL's: sampling, losses, logging, distribution. Needs TRL 1.16 (the extra `trl`).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather

from mm_agrae.adapters import SUCCESS_THRESHOLD, scale_warning, success_of
from mm_agrae.advantage import levels, needs
from mm_agrae.model import compat

compat.prepare()  # before TRL imports transformers' image processors

from trl import GRPOTrainer  # noqa: E402

logger = logging.getLogger(__name__)


class AGRAEGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages come from `mm_agrae.advantage`.

    Takes what GRPOTrainer takes, and by keyword:

    rule               a name of `mm_agrae.advantage.RULES`
    settings           those of the rule, such as {"alpha": 0.5}
    success_from       name of the reward function that tells correct completions from incorrect
                       ones, or several names: the first that has a value for a completion counts.
                       Not needed with one reward function, or if the rule does not use success
    success_threshold  a completion is correct if that function returns at least this

    The advantages, in the loss and in the logged table of completions, are computed over a whole generation batch (all
    processes) from the weighted sum of rewards that TRL logs. If a completion has no reward (every function returned
    None) or no success, its prompt gets the advantage 0 and does not count in ω. Logged besides TRL's metrics:
    agrae/omega, agrae/success, agrae/unscored_prompts.

    Raises ValueError for unknown rules and settings, for a `success_from` that is missing or not a reward function,
    and for TRL settings of its own advantage: scale_rewards, multi_objective_aggregation.
    """

    def __init__(
        self,
        *args: Any,
        rule: str = "agrae",
        settings: dict[str, Any] | None = None,
        success_from: str | Sequence[str] | None = None,
        success_threshold: float = SUCCESS_THRESHOLD,
        **kwargs: Any,
    ) -> None:
        self.rule, self.rule_settings = rule, dict(settings or {})
        self.uses_success = needs(rule, "success_PG", self.rule_settings)
        for given, what in (("entropy_PG", "entropies"), ("part_FPG", "reward parts")):
            if needs(rule, given, self.rule_settings):
                raise ValueError(
                    f"rule {rule!r} looks at {what}, which TRL does not hand on; use mm-agrae's own trainer"
                )
        super().__init__(*args, **kwargs)
        settled: Any = self.args
        _refuse_contradictions(settled)
        names = [success_from] if isinstance(success_from, str) else list(success_from or ())
        self.success_columns = _columns(names, self.reward_func_names, self.uses_success)
        self.success_threshold = success_threshold
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None
        self._warned = False
        if settled.steps_per_generation < settled.gradient_accumulation_steps:
            logger.warning(
                "steps_per_generation=%d is less than gradient_accumulation_steps=%d: the step's "
                "completions come in parts, and ω is the mean reward of one part",
                settled.steps_per_generation,
                settled.gradient_accumulation_steps,
            )

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """TRL's rewards [all completions, functions], kept for the advantages."""
        reward_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        lengths = [max(1, len(ids)) for ids in completion_ids_list]
        length_B = gather(torch.tensor(lengths, device=self.accelerator.device))
        self._gathered = (reward_BF, length_B)
        return reward_BF

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of this process, with our advantages."""
        output = super()._generate_and_score_completions(inputs)
        assert self._gathered is not None
        advantage_B = self._advantages(*self._gathered)
        self._gathered = None
        rows = len(inputs)
        first = self.accelerator.process_index * rows
        output["advantages"] = advantage_B[first : first + rows].to(output["advantages"])
        # TRL has logged its own advantages, on every process, and the log is a bounded deque.
        logged: Any = self._logs["advantages"]
        for _ in range(min(len(advantage_B), len(logged))):
            logged.pop()
        logged.extend(advantage_B.tolist())
        return output

    def _advantages(self, reward_BF: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Advantages [B] of the completions of all processes, which TRL orders by group."""
        model: Any = self.model
        training = model.training
        group = int((self.num_generations if training else self.num_generations_eval) or 0)
        weight_F = self.reward_weights.to(reward_BF.device)
        reward_PG = (reward_BF * weight_F).nansum(dim=1).view(-1, group)
        success_B = torch.full_like(reward_BF[:, 0], torch.nan)
        for column in reversed(self.success_columns):
            value_B = reward_BF[:, column]
            known_B = ~value_B.isnan()
            success_B = torch.where(known_B, success_of(value_B, self.success_threshold), success_B)
        success_PG = success_B.view(-1, group)
        unscored_B = reward_BF.isnan().all(dim=1) | (success_B.isnan() & self.uses_success)
        scored_P = ~unscored_B.view(-1, group).any(dim=1)
        advantage_PG = torch.zeros_like(reward_PG)
        metrics = self._metrics["train" if training else "eval"]
        metrics["agrae/unscored_prompts"].append(float((~scored_P).sum()))
        # A group of one completion, which evaluation may ask for, has no relative advantage.
        if group > 1 and scored_P.any():
            reward_PG = reward_PG[scored_P]
            result = levels(
                self.rule,
                reward_PG,
                success_PG[scored_P] if self.uses_success else None,
                length_B.view(-1, group)[scored_P],
                **self.rule_settings,
            )
            advantage_PG[scored_P] = result.advantage_PG.to(advantage_PG)
            metrics["agrae/omega"].append(result.omega)
            if self.uses_success:
                metrics["agrae/success"].append(float(success_PG[scored_P].mean()))
            warning = scale_warning(self.rule, self.rule_settings, reward_PG)
            if warning and not self._warned:
                self._warned = True
                logger.warning(warning)
        return advantage_PG.flatten()


def _refuse_contradictions(args: Any) -> None:
    if args.scale_rewards != "group":
        raise ValueError(
            f"scale_rewards={args.scale_rewards!r} belongs to TRL's own advantage, which the rule "
            "replaces; leave it out. For rewards that are not divided by their standard deviation, "
            "use settings={'base': 'dr_grpo'} with rule='agrae', or rule='dr_grpo'"
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} belongs to TRL's "
            "own advantage, which the rule replaces; leave it out: rules take the weighted sum"
        )


def _columns(names: list[str], functions: list[str], needed: bool) -> list[int]:
    """Positions of the reward functions that success is read from."""
    listed = ", ".join(functions)
    if not names and len(functions) == 1:
        return [0]
    if not names and needed:
        raise ValueError(
            "this rule needs to know which completions are correct: name the reward function that "
            f"tells by success_from=...; there are: {listed}"
        )
    for name in names:
        if functions.count(name) != 1:
            raise ValueError(f"success_from={name!r} is not the name of one reward function; there are: {listed}")
    return [functions.index(name) for name in names]
