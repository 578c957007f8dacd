"""Policy losses: from log-probabilities and advantages of a micro-batch to a scalar to minimise.

Pure functions of tensors, without state. Per token, with the ratio ρ of new to old policy,

    loss_t = surrogate(ρ_t, A) · sampler weight + kl_coef · k3_t

and the loss of an optimiser step is the weighted sum of loss_t over all its tokens, minus the
entropy bonus. Each loss is one line of `LOSSES`:

| name    | ratio          | surrogate                   | weight of a token         | clip      |
|---------|----------------|-----------------------------|---------------------------|-----------|
| grpo    | per token      | −min(ρA, clip(ρ)A)          | 1 / (N · own length)      | .2, .2    |
| dapo    | per token      | −min(ρA, clip(ρ)A)          | 1 / tokens of the step    | .2, .28   |
| dr_grpo | per token      | −min(ρA, clip(ρ)A)          | 1 / (N · max_new_tokens)  | .2, .2    |
| gspo    | per completion | −min(ρA, clip(ρ)A)          | 1 / (N · own length)      | 3e-4, 4e-4|
| cispo   | per token      | −detach(clip(ρ)) · A · logπ | 1 / tokens of the step    | none, 4   |
| sapo    | per token      | −4/τ · σ(τ(ρ − 1)) · A      | 1 / (N · own length)      | none      |
| clip_cov| per token      | as grpo, some tokens 0      | 1 / tokens of the step    | .2, .2    |
| kl_cov  | per token      | −ρA, some + c·abs(log ρ)    | 1 / tokens of the step    | none      |

N is the number of completions of the step; clip(ρ) bounds ρ to [1 − low, 1 + high]. The last three have `options` of
their own, the keyword arguments of their surrogates.

    B   rows of a micro-batch (one row per completion)
    T   completion tokens, right-padded

Arguments of `policy_loss`:

    logp_BT            log-probabilities (nats) of the sampled tokens, with gradient
    advantage_B        one per completion
    mask_BT            1 on completion tokens, 0 on padding, whose other values do not matter
    old_logp_BT        log-probabilities before this rollout's updates; None means on-policy,
                       where ρ = exp(logp − detach(logp)) is 1 and its gradient that of logp
    clip_low/high      distance of the bounds of ρ from 1; None means the loss's default
    ref_logp_BT        log-probabilities under the reference policy, needed if kl_coef > 0. The
                       penalty is k3 = exp(ref − logp) − (ref − logp) − 1 (GRPO, arXiv
                       2402.03300, Eq. 4), weighted per token as the loss is
    unbiased_kl        multiply k3 by ρ, so that its gradient is that of the KL divergence
                       (DeepSeek-V3.2, arXiv 2512.02556; the default of TRL, not of GRPO)
    entropy_BT         entropies (nats) of the distributions sampled from, needed if
                       entropy_coef > 0: the bonus is entropy_coef · mean over the step's tokens
    sampler_weight_BT  see `sampler_weight`; scales the surrogate, not the KL penalty
    options            the loss's own, the keyword arguments of its surrogate, such as {"tau_positive": 1.0}

The denominators count the whole optimiser step, over all ranks and micro-batches (`Denominator`), so the losses of the
micro-batches ADD UP to that of the step, however it is cut. (Not under top_entropy_mask, clip_cov and kl_cov: they
choose tokens within each micro-batch, as TRL and verl do.) Sum over micro-batches and ranks; where gradients are
averaged over ranks (DDP, FSDP), multiply by the number of ranks.

Equal to TRL 1.16 (`tests/test_loss_trl.py`), with these correspondences:

* TRL's `cispo` takes the upper bound itself (epsilon_high = 1 + clip_high) and never a lower one;
  its gspo is loss_type="grpo" with importance_sampling_level="sequence".
* With several optimiser steps per rollout TRL divides `dapo` and `cispo` by the mean number of
  tokens of these steps; the denominator here is that of the step itself.
* TRL averages `grpo` and the entropy bonus per micro-batch, then over micro-batches: the same only
  if all hold as many completions, or for the bonus tokens.
* TRL multiplies k3 by ρ unless use_bias_correction_kl=False: `unbiased_kl` here.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Denominator:
    """Totals of one optimiser step, over all ranks and micro-batches.

    completions     completions, including those without signal or without tokens
    tokens          their completion tokens
    max_new_tokens  the sampling limit, in tokens; the constant of `dr_grpo`
    """

    completions: int
    tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.completions < 1 or self.max_new_tokens < 1 or self.tokens < 0:
            raise ValueError(f"{self}: completions and max_new_tokens must be at least 1, tokens at least 0")


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch (a scalar with gradient) and detached statistics.

    `sums` are sums over the micro-batch's tokens that add up over micro-batches and ranks; a mean
    is a sum divided by the sum "tokens":

        tokens                 completion tokens
        clip_low, clip_high    tokens whose ratio was clipped to the bound (with effect)
        approx_kl              ρ − 1 − log ρ per token (nats), an estimate of KL(old ‖ new)
        ref_kl                 k3 (nats), if ref_logp_BT is given
        entropy                nats, if entropy_BT is given

    `ratio_max` is the largest ρ (0 without tokens); over micro-batches take the maximum.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    ratio_max: Tensor


def policy_loss(
    name: str,
    *,
    logp_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    denominator: Denominator,
    old_logp_BT: Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    ref_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    unbiased_kl: bool = False,
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    sampler_weight_BT: Tensor | None = None,
    options: Mapping[str, float] | None = None,
) -> LossOutput:
    """What one micro-batch adds to the loss `name` of an optimiser step.

    The arguments are described at the top of the module. Raises ValueError for an unknown name,
    shapes that disagree, a negative clip, an unknown option, or a coefficient without the values it needs.
    """
    kind, low, high = loss_and_bounds(name, clip_low, clip_high, options or {})
    _check(
        logp_BT, advantage_B, kl_coef, entropy_coef, mask_BT=mask_BT, old_logp_BT=old_logp_BT,
        ref_logp_BT=ref_logp_BT, entropy_BT=entropy_BT, sampler_weight_BT=sampler_weight_BT,
    )  # fmt: skip
    dtype = torch.float64 if logp_BT.dtype == torch.float64 else torch.float32
    padding_BT = ~mask_BT.bool()

    def kept(value_BT: Tensor) -> Tensor:
        """0 on padding, whatever it holds: no value and no gradient comes from there."""
        return value_BT.to(dtype).masked_fill(padding_BT, 0)

    length_B1 = kept(torch.ones_like(logp_BT)).sum(dim=1, keepdim=True).clamp(min=1)
    logp_BT = kept(logp_BT)
    old_logp_BT = logp_BT.detach() if old_logp_BT is None else kept(old_logp_BT)
    # Bounded because a negative advantage leaves large ratios unclipped, and exp overflows.
    log_ratio_BT = (logp_BT - old_logp_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = torch.exp(kind.log_ratio(log_ratio_BT, length_B1))
    tokens = _Tokens(ratio_BT, advantage_B.to(dtype)[:, None], logp_BT, ~padding_BT)
    token_loss_BT, clipped_low_BT, clipped_high_BT = kind.surrogate(tokens, low, high, **(options or {}))
    if sampler_weight_BT is not None:
        token_loss_BT = token_loss_BT * kept(sampler_weight_BT.detach())
    sums = {
        "tokens": ~padding_BT,
        "clip_low": clipped_low_BT,
        "clip_high": clipped_high_BT,
        "approx_kl": torch.exp(log_ratio_BT) - 1 - log_ratio_BT,
    }
    if ref_logp_BT is not None:
        kl_BT = k3(logp_BT, kept(ref_logp_BT))
        sums["ref_kl"] = kl_BT
        if kl_coef:
            token_loss_BT = token_loss_BT + kl_coef * (ratio_BT * kl_BT if unbiased_kl else kl_BT)

    loss = (kept(token_loss_BT) * kind.token_weight(length_B1, denominator)).sum()
    if entropy_BT is not None:
        sums["entropy"] = entropy_BT
        if entropy_coef:
            loss = loss - entropy_coef * (kept(entropy_BT).sum() / max(denominator.tokens, 1))

    kept_ratio_BT = kept(ratio_BT.detach())
    return LossOutput(
        loss=loss,
        sums={key: kept(x.detach()).sum() for key, x in sums.items()},
        ratio_max=kept_ratio_BT.max() if kept_ratio_BT.numel() else kept_ratio_BT.sum(),
    )


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """k3 = exp(d) − d − 1 with d = ref − logp: an estimate of KL(policy ‖ reference), ≥ 0."""
    difference_BT = (ref_logp_BT - logp_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(difference_BT) - difference_BT - 1


@dataclass(frozen=True)
class SamplerWeight:
    """Importance weights for tokens sampled from another distribution, and statistics.

    `sums` add up over micro-batches and ranks; a mean is a sum divided by "tokens":

        mismatch_abs   |log π_old − log π_sampler| (nats)
        mismatch_kl    k3 (nats), an estimate of KL(π_sampler ‖ π_old)
        mismatch_cut   tokens whose weight was cut to the limit, or set to 0
        weight         the weight itself
    """

    weight_BT: Tensor
    sums: dict[str, Tensor]


def sampler_weight(
    old_logp_BT: Tensor,
    sampling_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: str = "token",
    limit: float = 2.0,
    beyond: str = "truncate",
) -> SamplerWeight:
    """π_old / π_sampler, bounded: corrects for an engine whose log-probs differ from the model's.

    Truncated importance sampling. `level` "token" weighs each token by its own ratio; "sequence"
    all tokens of a completion by the product of theirs, which is unbiased but of high variance.
    `beyond` "truncate" gives min(ratio, limit); "mask" gives 0 above the limit and below 1/limit,
    and the ratio in between. A token that was not sampled (NaN) has weight 1, or in a sequence that of its sampled
    tokens. The values on padding do not matter.

    Raises ValueError for an unknown level or mode, or a limit below 1.
    """
    if level not in ("token", "sequence") or beyond not in ("truncate", "mask") or limit < 1:
        raise ValueError(
            f"level = {level!r} must be token or sequence, beyond = {beyond!r} truncate or mask, "
            f"limit = {limit} at least 1"
        )
    padding_BT = ~mask_BT.bool()
    gap_BT = (old_logp_BT - sampling_logp_BT).detach().masked_fill(padding_BT | sampling_logp_BT.isnan(), 0)
    log_ratio_BT = gap_BT
    if level == "sequence":
        log_ratio_BT = gap_BT.sum(dim=1, keepdim=True).expand_as(gap_BT)
    ratio_BT = torch.exp(log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    cut_BT = ratio_BT > limit
    if beyond == "mask":
        cut_BT = cut_BT | (ratio_BT < 1 / limit)
    weight_BT = torch.where(cut_BT, 0.0 if beyond == "mask" else limit, ratio_BT)
    sums = {
        "mismatch_abs": gap_BT.abs(),
        "mismatch_kl": k3(torch.zeros_like(gap_BT), gap_BT),
        "mismatch_cut": cut_BT & ~padding_BT,
        "weight": weight_BT.masked_fill(padding_BT, 0),
    }
    return SamplerWeight(weight_BT, {name: value.sum() for name, value in sums.items()})


def top_entropy_mask(entropy_BT: Tensor, mask_BT: Tensor, share: float) -> Tensor:
    """1 on the `share` of the tokens with the highest entropy, else 0 (arXiv 2506.01939): a `sampler_weight_BT`.

    The others then have no surrogate, but count in the denominators, the KL penalty and the entropy bonus.
    """
    inside_BT = mask_BT.bool()
    if not inside_BT.any():
        return torch.zeros_like(entropy_BT)
    least = torch.quantile(entropy_BT.detach()[inside_BT].float(), 1 - share)
    return (inside_BT & (entropy_BT >= least)).to(entropy_BT.dtype)


def _token_log_ratio(log_ratio_BT: Tensor, length_B1: Tensor) -> Tensor:
    return log_ratio_BT


def _completion_log_ratio(log_ratio_BT: Tensor, length_B1: Tensor) -> Tensor:
    """GSPO: (π/π_old)^(1/length), the same for all tokens of a completion (Eq. 7)."""
    return (log_ratio_BT.sum(dim=1, keepdim=True) / length_B1).expand_as(log_ratio_BT)


class _Tokens(NamedTuple):
    """What a surrogate is made of: ρ and log π of the new policy [B, T], A [B, 1], and which tokens are no padding."""

    ratio: Tensor
    advantage: Tensor
    logp: Tensor
    inside: Tensor


_Surrogate = tuple[Tensor, Tensor, Tensor]
"""Loss of each token, whether its ratio was clipped to the lower bound, and to the upper."""


def _clipped(t: _Tokens, low: float, high: float) -> _Surrogate:
    """PPO: −min(ρA, clip(ρ)A). A clipped token has no gradient."""
    loss = -torch.minimum(t.ratio * t.advantage, t.ratio.clamp(low, high) * t.advantage)
    return loss, (t.ratio < low) & (t.advantage < 0), (t.ratio > high) & (t.advantage > 0)


def _clipped_weight(t: _Tokens, low: float, high: float) -> _Surrogate:
    """CISPO: −detach(clip(ρ)) · A · log π. Every token has a gradient, of bounded weight."""
    loss = -t.ratio.clamp(low, high).detach() * t.advantage * t.logp
    return loss, t.ratio < low, t.ratio > high


def _soft_gate(
    t: _Tokens, low: float, high: float, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> _Surrogate:
    """SAPO: −4/τ · σ(τ(ρ − 1)) · A, a smooth gate for the clip, with one τ for A > 0 and one for the others."""
    tau = torch.where(t.advantage > 0, tau_positive, tau_negative)
    never = torch.zeros_like(t.inside)
    return -4 / tau * torch.sigmoid(tau * (t.ratio - 1)) * t.advantage, never, never


def _clip_cov(
    t: _Tokens, low: float, high: float, *, share: float = 2e-4, least: float = 1.0, most: float = 5.0
) -> _Surrogate:
    """Clip-Cov: as `_clipped`, and a random `share` of all tokens, of covariance between `least` and `most`, are 0."""
    loss, clipped_low, clipped_high = _clipped(t, low, high)
    covariance = _covariance(t)
    eligible = (covariance > least) & (covariance < most) & t.inside & ~clipped_low & ~clipped_high
    found = eligible.flatten().nonzero()[:, 0]
    found = found[torch.randperm(len(found))[: _count(share, t)].to(found.device)]
    return loss * torch.ones_like(loss).flatten().index_fill(0, found, 0).view_as(loss), clipped_low, clipped_high


def _kl_cov(t: _Tokens, low: float, high: float, *, share: float = 2e-4, coef: float = 1.0) -> _Surrogate:
    """KL-Cov: −ρA, and + coef · |log ρ| on the `share` of all tokens with the largest covariance."""
    covariance = _covariance(t).masked_fill(~t.inside, -torch.inf).flatten()
    chosen = covariance.topk(min(_count(share, t), len(covariance))).indices
    penalty = torch.zeros_like(covariance).index_fill(0, chosen, coef).view_as(t.ratio) * t.ratio.log().abs()
    never = torch.zeros_like(t.inside)
    return penalty - t.ratio * t.advantage, never, never


def _covariance(t: _Tokens) -> Tensor:
    """What each token adds to the covariance of A and log π over the tokens of the micro-batch (arXiv 2505.22617)."""
    values = (t.advantage.expand_as(t.logp), t.logp.detach())
    by_advantage, by_logp = (x - (x * t.inside).sum() / t.inside.sum().clamp(min=1) for x in values)
    return by_advantage * by_logp


def _count(share: float, t: _Tokens) -> int:
    return max(1, int(share * t.inside.sum()))


def _mean_of_completion_means(length_B1: Tensor, step: Denominator) -> Tensor | float:
    return 1 / (step.completions * length_B1)


def _mean_of_tokens(length_B1: Tensor, step: Denominator) -> Tensor | float:
    return 1 / max(step.tokens, 1)


def _sum_over_constant(length_B1: Tensor, step: Denominator) -> Tensor | float:
    return 1 / (step.completions * step.max_new_tokens)


@dataclass(frozen=True)
class Loss:
    """One loss: its default clip, and which ratio, surrogate and token weight it takes."""

    clip_low: float | None  # None: it takes no clip
    clip_high: float | None
    log_ratio: Callable[[Tensor, Tensor], Tensor]
    surrogate: Callable[..., _Surrogate]
    token_weight: Callable[[Tensor, Denominator], Tensor | float]


LOSSES: dict[str, Loss] = {
    # GRPO, arXiv 2402.03300, Eq. 3: the mean over completions of the means over their tokens.
    "grpo": Loss(0.2, 0.2, _token_log_ratio, _clipped, _mean_of_completion_means),
    # DAPO, arXiv 2503.14476, Eq. 8: one mean over all tokens, and a higher upper clip.
    "dapo": Loss(0.2, 0.28, _token_log_ratio, _clipped, _mean_of_tokens),
    # Dr. GRPO, arXiv 2503.20783: a constant, as dividing by the own length is biased.
    "dr_grpo": Loss(0.2, 0.2, _token_log_ratio, _clipped, _sum_over_constant),
    # GSPO, arXiv 2507.18071, Eq. 5; the clip of its Section 5.1.
    "gspo": Loss(3e-4, 4e-4, _completion_log_ratio, _clipped, _mean_of_completion_means),
    # CISPO, arXiv 2506.13585, which sets no lower bound (low ≥ 1 is none, ratios being
    # positive); ρ ≤ 5 is the upper one that TRL's manual recommends, after arXiv 2510.13786.
    "cispo": Loss(1.0, 4.0, _token_log_ratio, _clipped_weight, _mean_of_tokens),
    # SAPO, arXiv 2511.20347, with the temperatures of TRL's manual.
    "sapo": Loss(None, None, _token_log_ratio, _soft_gate, _mean_of_completion_means),
    # Clip-Cov and KL-Cov, arXiv 2505.22617, with verl's defaults.
    "clip_cov": Loss(0.2, 0.2, _token_log_ratio, _clip_cov, _mean_of_tokens),
    "kl_cov": Loss(None, None, _token_log_ratio, _kl_cov, _mean_of_tokens),
}


def loss_and_bounds(
    name: str, clip_low: float | None, clip_high: float | None, options: Mapping[str, Any]
) -> tuple[Loss, float, float]:
    """The loss, and the least and the largest ρ that is not clipped. Raises ValueError as `policy_loss`."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; valid: {', '.join(LOSSES)}")
    kind = LOSSES[name]
    known = [p.name for p in inspect.signature(kind.surrogate).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"loss {name!r} has no option {key!r}; it has {', '.join(known) or 'none'}")
        if not value > 0:
            raise ValueError(f"option {key} of loss {name!r} must be above 0, but it is {value}")
    if kind.clip_low is None or kind.clip_high is None:
        if (clip_low, clip_high) != (None, None):
            raise ValueError(f"loss {name!r} has no clip; leave clip_low and clip_high out")
        return kind, 0.0, math.inf
    clip_low = kind.clip_low if clip_low is None else clip_low
    clip_high = kind.clip_high if clip_high is None else clip_high
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low = {clip_low} and clip_high = {clip_high} must not be negative")
    return kind, 1 - clip_low, 1 + clip_high


def _check(
    logp_BT: Tensor, advantage_B: Tensor, kl_coef: float, entropy_coef: float, **tensors: Tensor | None
) -> None:
    if kl_coef and tensors["ref_logp_BT"] is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logp_BT")
    if entropy_coef and tensors["entropy_BT"] is None:
        raise ValueError(f"entropy_coef = {entropy_coef} needs entropy_BT")
    shape = logp_BT.shape
    if len(shape) != 2:
        raise ValueError(f"logp_BT must be [B, T]; its shape is {list(shape)}")
    for name, tensor in {**tensors, "advantage_B": advantage_B}.items():
        expected = shape[:1] if name == "advantage_B" else shape
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but logp_BT has {list(shape)}")
