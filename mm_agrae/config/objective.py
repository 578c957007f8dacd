"""The advantage rule and the loss of a config: checks, and settings of the rule that follow from other sections.

torch is imported when it is needed: reading a config must not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_agrae.errors import nearest

if TYPE_CHECKING:
    from mm_agrae.config.schema import AdvantageSection, Config, UpdateSection


def check_rule(section: AdvantageSection) -> None:
    """Raise ValueError for an unknown rule, and for a setting that it does not take or that is out of range."""
    from mm_agrae import advantage

    if section.rule not in advantage.RULES:
        raise ValueError(f"advantage.rule is {section.rule!r}; {nearest(section.rule, advantage.RULES)}")
    accepted = advantage.accepted_settings(section.rule)
    everywhere = {key for rule in advantage.RULES for key in advantage.accepted_settings(rule)}
    for key in section.settings:
        if key not in everywhere:
            names = ["rule", "entropy_from", *accepted]
            raise ValueError(f"advantage.{key}: unknown setting; {nearest(key, names)}")
        if key not in accepted:
            takes = ", ".join(accepted) or "no settings"
            raise ValueError(
                f"advantage.{key} has no effect under rule {section.rule!r}, which takes {takes}; "
                "remove it or choose another rule"
            )
    try:
        advantage.check_settings(section.rule, section.settings)
    except ValueError as error:
        raise ValueError(str(error).replace("advantage setting ", "advantage.")) from None


def check_loss(section: UpdateSection) -> None:
    """Raise ValueError for an unknown loss, and for a clip or an option that it does not take."""
    from mm_agrae.loss import LOSSES, loss_and_bounds

    if section.loss not in LOSSES:
        raise ValueError(f"update.loss: {section.loss!r} is not valid; {nearest(section.loss, LOSSES)}")
    try:
        loss_and_bounds(section.loss, section.clip_low, section.clip_high, section.loss_options)
    except ValueError as error:
        raise ValueError(f"update: {error}") from None


def rule_settings(config: Config) -> dict[str, Any]:
    """The rule's settings. If not set, `reward_range` is what the rewards can span and `width` the token limit."""
    from mm_agrae import advantage

    weights = sum(abs(weight) for weight in config.reward.parts.values())
    overlong = config.reward.overlong.penalty if config.reward.overlong else 0.0
    follows = {"reward_range": weights + overlong or 1.0, "width": config.rollout.max_new_tokens}
    accepted = advantage.accepted_settings(config.advantage.rule)
    return {name: value for name, value in follows.items() if name in accepted} | config.advantage.settings


def try_rule(config: Config) -> None:
    """Raise ValueError for settings that the rule cannot use with this many completions, such as a k above G."""
    from mm_agrae import advantage

    size = config.rollout.completions_per_prompt
    reward_PG, ones_PG = [[0.0] * (size - 1) + [1.0]], [[1.0] * size]
    length_PG = [[config.rollout.max_new_tokens] * size]
    more: dict[str, Any] = {"entropy_PG": ones_PG, "part_FPG": [reward_PG]}
    settings = rule_settings(config)
    try:
        advantage.levels(config.advantage.rule, reward_PG, reward_PG, length_PG, **more, **settings)
    except ValueError as error:
        raise ValueError(str(error).replace("advantage setting ", "advantage.")) from None
    if config.advantage.entropy_from and not uses_entropy(config):
        raise ValueError(
            f"advantage.entropy_from has no effect under rule {config.advantage.rule!r}, which looks at no entropy; "
            "remove it or choose another rule"
        )


def uses_entropy(config: Config) -> bool:
    """Whether the rule looks at the entropy of completions."""
    from mm_agrae import advantage

    return advantage.needs(config.advantage.rule, "entropy_PG", rule_settings(config))
