"""The advantage rules as `algorithm.adv_estimator` of verl.

verl loads this module by itself if mm-agrae is installed (entry point group `verl.plugins`). Then

    algorithm.adv_estimator=agrae +algorithm.mm_agrae.alpha=0.5

trains with A-GRAE; `ESTIMATORS` lists the names, docs/adapters.md the settings. The functions
work without verl; only `register` imports it.
"""

import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_agrae.adapters import SUCCESS_THRESHOLD, scale_warning, success_of
from mm_agrae.advantage import RULES, accepted_settings, compute, needs

logger = logging.getLogger(__name__)

SECTION = "mm_agrae"
"""Settings are read from this section of verl's `algorithm`."""

ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    # verl never looks up the name "grpo" but calls its own function, and hands on no entropies.
    **{"mm_grpo" if name == "grpo" else name: (name, {}) for name in RULES if not needs(name, "entropy_PG", {})},
    "agrae_dr_grpo": ("agrae", {"base": "dr_grpo"}),
}
"""Name in verl -> our rule, and the settings that the name implies."""

_warned: list[str] = []


def token_advantages(
    estimator: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable] | None,
    config: Any = None,
) -> Tensor:
    """Advantages [B, T] of a batch as verl's driver holds it, by an estimator of `ESTIMATORS`.

    token_level_rewards [B, T]  a row's reward is their sum, wherever they stand
    response_mask [B, T]        1 for tokens of the model, 0 for padding and tool output
    index                       B prompt ids (verl's uid): rows with one id form a group
    config                      verl's `algorithm` config; settings come from its `mm_agrae`

    Raises ValueError, naming the uid, for groups of different sizes or of one row and for rewards
    that are not finite; and for unknown settings and settings that contradict each other.
    """
    rule, fixed = ESTIMATORS[estimator]
    settings, threshold = _settings(estimator, config)
    if response_mask.shape != token_level_rewards.shape:
        raise ValueError(
            f"response_mask has shape {list(response_mask.shape)}, but token_level_rewards has "
            f"{list(token_level_rewards.shape)}"
        )
    wide = torch.float64 if token_level_rewards.dtype == torch.float64 else torch.float32
    reward_B = token_level_rewards.sum(dim=-1, dtype=wide)
    groups = _groups(index, len(reward_B))
    rows_PG = torch.tensor(list(groups.values()), device=reward_B.device)
    reward_PG = reward_B[rows_PG]
    length_PG = (response_mask != 0).sum(dim=-1)[rows_PG]
    try:
        advantage_PG = compute(rule, reward_PG, success_of(reward_PG, threshold), length_PG, **fixed, **settings)
    except ValueError as error:
        raise ValueError(_with_uid(str(error), list(groups))) from None
    warning = scale_warning(rule, settings, reward_PG)
    if warning and not _warned:  # once a process: it would come at every step
        _warned.append(warning)
        logger.warning("%s (+algorithm.%s.omega_from=success)", warning, SECTION)
    advantage_B = torch.empty_like(reward_B)
    advantage_B[rows_PG] = advantage_PG.to(wide)
    return advantage_B[:, None] * response_mask


def register() -> list[str]:
    """Make the estimators known to verl; returns their names. Needs verl."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

    names = []
    for estimator in ESTIMATORS:
        # Names already registered by verl or another plug-in are not overwritten.
        name = f"mm_{estimator}" if estimator in ADV_ESTIMATOR_REGISTRY else estimator
        if name != estimator:
            logger.warning("verl has an estimator %s already; ours is %s", estimator, name)
        register_adv_est(name)(_verl_function(estimator))
        names.append(name)
    return names


def _verl_function(estimator: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Sequence[Hashable] | None = None,
        config: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        advantage_BT = token_advantages(estimator, token_level_rewards, response_mask, index, config)
        return advantage_BT, advantage_BT  # as for verl's GRPO, the return is the advantage

    return estimate


def _groups(index: Sequence[Hashable] | None, rows: int) -> dict[Hashable, list[int]]:
    """Rows of each uid, ordered by their first row. All groups have the same size."""
    if index is None:
        raise ValueError("the batch has no uid, so its rows cannot be grouped by prompt")
    if len(index) != rows:
        raise ValueError(f"{len(index)} uids were given for {rows} rows")
    if rows == 0:
        raise ValueError("the batch holds no rows")
    groups: dict[Hashable, list[int]] = {}
    for row, uid in enumerate(index):
        groups.setdefault(uid, []).append(row)
    usual = Counter(map(len, groups.values())).most_common(1)[0][0]
    for uid, members in groups.items():
        if (size := len(members)) != usual:
            raise ValueError(
                f"uid {uid!r} has {size} completion{'s' * (size != 1)}, other prompts have "
                f"{usual}: all groups of a step must have the same size. Completions were lost or "
                "added on the way; leave out whole prompts, not single completions"
            )
    return groups


def _settings(estimator: str, config: Any) -> tuple[dict[str, Any], float]:
    """The rule's settings and the success threshold, from verl's `algorithm` config."""
    rule, fixed = ESTIMATORS[estimator]
    config = {} if config is None else config
    section = {} if (found := config.get(SECTION)) is None else found
    if not isinstance(section, Mapping):
        raise ValueError(f"algorithm.{SECTION} must be a section of settings, not {section!r}")
    given = {str(key): value for key, value in section.items() if value is not None}
    valid = [name for name in accepted_settings(rule) if name not in fixed]
    valid.append("success_threshold")
    if unknown := [key for key in given if key not in valid]:
        raise ValueError(
            f"algorithm.{SECTION}.{unknown[0]}: the estimator {estimator!r} has no such setting; "
            f"valid: {', '.join(valid)}"
        )
    threshold = given.pop("success_threshold", None)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | None):
        name = f"algorithm.{SECTION}.success_threshold"
        raise ValueError(f"{name} must be a number, not {threshold!r}")
    standardises = rule != "dr_grpo" and (fixed | given).get("base") != "dr_grpo"
    if standardises and "eps" in valid and config.get("norm_adv_by_std_in_grpo", True) is False:
        raise ValueError(
            f"algorithm.norm_adv_by_std_in_grpo=False has no effect on {estimator!r}, which "
            "divides by the standard deviation; use adv_estimator=agrae_dr_grpo or dr_grpo, or "
            "leave the setting at True"
        )
    if threshold is None and config.get("use_kl_in_reward") and needs(rule, "success_PG", fixed | given):
        raise ValueError(
            "algorithm.use_kl_in_reward=True mixes a penalty into the rewards that success is "
            f"read from; set +algorithm.{SECTION}.success_threshold=0.5 if correct and incorrect "
            "completions still lie apart, or use the KL term of the loss"
        )
    return given, SUCCESS_THRESHOLD if threshold is None else float(threshold)


def _with_uid(message: str, uids: list[Hashable]) -> str:
    found = re.search(r"group (\d+)", message)
    return f"{message} (group {found[1]} is uid {uids[int(found[1])]!r})" if found else message


if importlib.util.find_spec("verl") is not None:
    # A verl plug-in registers itself when it is imported.
    try:
        register()
    except Exception as error:
        # verl silently drops a plug-in's exception and then knows no such estimator.
        logger.warning("mm-agrae could not register with this version of verl: %r", error)
        raise
