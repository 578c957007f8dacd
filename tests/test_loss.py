import math

import pytest
import torch

from mm_agrae.loss import LOSSES, Denominator, policy_loss, sampler_weight, top_entropy_mask

LENGTHS = [7, 1, 5, 9, 3, 9, 2, 4]
MAX_NEW_TOKENS = 12
STEP = Denominator(completions=len(LENGTHS), tokens=sum(LENGTHS), max_new_tokens=MAX_NEW_TOKENS)


def random_step(seed=0, lengths=LENGTHS, spread=0.5, dtype=torch.float64):
    """Ragged log-probabilities with ratios on both sides of every loss's clip."""
    torch.manual_seed(seed)
    shape = (len(lengths), max(lengths, default=0))
    logp = -torch.rand(shape, dtype=dtype) * 3
    return {
        "logp_BT": logp.requires_grad_(),
        "old_logp_BT": logp.detach() + spread * torch.randn(shape, dtype=dtype),
        "ref_logp_BT": logp.detach() + spread * torch.randn(shape, dtype=dtype),
        "entropy_BT": torch.rand(shape, dtype=dtype).requires_grad_(),
        "sampler_weight_BT": 0.5 + torch.rand(shape, dtype=dtype),
        "advantage_B": torch.randn(len(lengths), dtype=dtype),
        "mask_BT": torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None],
    }


def rows(step, index):
    """The micro-batch of these rows, padded no further than its longest."""
    width = int(step["mask_BT"][index].sum(1).max()) if len(index) else 0
    return {k: v[index] if v.dim() == 1 else v[index][:, :width] for k, v in step.items()}


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


# ------------------------------------------------------------------- against the equations


def test_grpo_dapo_dr_grpo_by_hand():
    """Two completions, of 1 and 2 tokens, each term worked out in plain numbers."""
    ratio = [[1.5], [0.5, 1.1]]
    a = [2.0, -1.0]
    # min(1.5·2, 1.2·2); min(.5·−1, .8·−1) and min(1.1·−1, 1.1·−1)
    terms = [[2.4], [-0.8, -1.1]]
    common = {
        "logp_BT": torch.tensor([[1.5, 9.0], [0.5, 1.1]], dtype=torch.float64).log(),
        "old_logp_BT": torch.zeros(2, 2).double(),
        "advantage_B": torch.tensor(a).double(),
        "mask_BT": torch.tensor([[1, 0], [1, 1]]),
        "denominator": Denominator(completions=2, tokens=3, max_new_tokens=5),
    }
    expected = {
        "grpo": -(terms[0][0] / 1 + sum(terms[1]) / 2) / 2,
        "dapo": -(min(1.5 * 2, 1.28 * 2) + sum(terms[1])) / 3,
        "dr_grpo": -(terms[0][0] + sum(terms[1])) / (2 * 5),
        "cispo": -(
            1.5 * 2 * math.log(1.5) - 0.5 * math.log(0.5) - 1.1 * math.log(1.1)
        ) / 3,
    }  # fmt: skip
    s = math.sqrt(ratio[1][0] * ratio[1][1])
    expected["gspo"] = -(1.0004 * 2 - max(s, 0.9997)) / 2
    for name, value in expected.items():
        assert float(policy_loss(name, **common).loss) == pytest.approx(value, rel=1e-12), name
    wide = policy_loss("gspo", **common, clip_low=1.0, clip_high=9.0)
    assert float(wide.loss) == pytest.approx(-(1.5 * 2 - s) / 2, rel=1e-12)
    tight = policy_loss("cispo", **common, clip_low=0.2, clip_high=0.2)
    value = 1.2 * 2 * math.log(1.5) - 0.8 * math.log(0.5) - 1.1 * math.log(1.1)
    assert float(tight.loss) == pytest.approx(-value / 3, rel=1e-12)


def test_clipped_tokens_have_no_gradient_but_in_cispo():
    logp = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0]]).double().log().requires_grad_()
    common = {
        "logp_BT": logp,
        "old_logp_BT": torch.zeros(2, 3).double(),
        "advantage_B": torch.tensor([1.0, -1.0]).double(),
        "mask_BT": torch.ones(2, 3),
        "denominator": Denominator(2, 6, 3),
    }
    for name in ("grpo", "dapo", "dr_grpo"):
        result = policy_loss(name, **common)
        (slope,) = gradient(result.loss, logp)
        assert (slope != 0).tolist() == [[False, True, True], [True, False, True]]
        assert (result.sums["clip_high"], result.sums["clip_low"]) == (1, 1)
    result = policy_loss("cispo", **common, clip_low=0.2, clip_high=0.2)
    (slope,) = gradient(result.loss, logp)
    torch.testing.assert_close(slope * -6, torch.tensor([[1.2, 0.8, 1.0], [-1.2, -0.8, -1.0]]).double())
    assert (result.sums["clip_high"], result.sums["clip_low"]) == (2, 2)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_on_policy_gradient_is_the_policy_gradient(name):
    """Without old log-probs ρ = 1 and ∇loss = −Σ weight · A · ∇log π for every loss."""
    step = random_step()
    common = {k: step[k] for k in ("logp_BT", "advantage_B", "mask_BT")}
    result = policy_loss(name, **common, denominator=STEP)
    (slope,) = gradient(result.loss, step["logp_BT"])
    length = torch.tensor(LENGTHS).double()[:, None]
    weight = {
        "grpo": 1 / (8 * length), "gspo": 1 / (8 * length), "dapo": 1 / 40 + 0 * length,
        "cispo": 1 / 40 + 0 * length, "dr_grpo": 1 / (8 * 12) + 0 * length,
    }[name]  # fmt: skip
    expected = -weight * step["advantage_B"][:, None] * step["mask_BT"]
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-15)

    given = policy_loss(name, **common, old_logp_BT=step["logp_BT"].detach(), denominator=STEP)
    assert torch.equal(gradient(given.loss, step["logp_BT"])[0], slope)
    assert result.sums["tokens"] == 40
    assert result.sums["approx_kl"] == result.sums["clip_low"] == result.sums["clip_high"] == 0
    assert result.ratio_max == 1


def test_kl_penalty_is_k3_and_its_gradient():
    step = random_step()
    logp, ref, mask = step["logp_BT"], step["ref_logp_BT"], step["mask_BT"]
    common = {"advantage_B": torch.zeros(8).double(), "mask_BT": mask, "denominator": STEP}
    result = policy_loss("dapo", logp_BT=logp, ref_logp_BT=ref, kl_coef=0.3, **common)
    k3 = (torch.exp(ref - logp) - (ref - logp) - 1)[mask]
    assert (k3 >= 0).all()
    torch.testing.assert_close(result.loss, 0.3 * k3.mean())
    torch.testing.assert_close(result.sums["ref_kl"], k3.sum().detach())
    (slope,) = gradient(result.loss, logp)
    torch.testing.assert_close(slope, 0.3 / 40 * (1 - torch.exp(ref - logp)).detach() * mask)

    unbiased = policy_loss("dapo", logp_BT=logp, ref_logp_BT=ref, kl_coef=0.3, unbiased_kl=True, **common)
    torch.testing.assert_close(unbiased.loss, result.loss)
    (slope,) = gradient(unbiased.loss, logp)
    torch.testing.assert_close(slope, 0.3 / 40 * (logp - ref).detach() * mask)


def test_unbiased_kl_has_the_gradient_of_the_kl_divergence():
    """The mean of its gradient over the whole vocabulary is ∇KL(π ‖ π_ref) in closed form."""
    torch.manual_seed(0)
    logits = torch.randn(6).double().requires_grad_()
    ref = torch.log_softmax(torch.randn(6).double(), 0)
    exact = torch.log_softmax(logits, 0)
    (expected,) = gradient((exact.exp() * (exact - ref)).sum(), logits)

    def estimate(unbiased):
        logp, mean = torch.log_softmax(logits, 0), 0
        for token in range(6):
            result = policy_loss(
                "dapo",
                logp_BT=logp[token].reshape(1, 1),
                ref_logp_BT=ref[token].reshape(1, 1),
                advantage_B=torch.zeros(1).double(),
                mask_BT=torch.ones(1, 1),
                denominator=Denominator(1, 1, 1),
                kl_coef=1.0,
                unbiased_kl=unbiased,
            )
            mean = mean + logp[token].exp().detach() * result.loss
        return gradient(mean, logits)[0]

    torch.testing.assert_close(estimate(True), expected)
    assert (estimate(False) - expected).abs().max() > 0.01


def test_entropy_bonus_is_a_mean_over_tokens_whatever_the_loss():
    step = random_step()
    mean = step["entropy_BT"][step["mask_BT"]].mean()
    common = {k: step[k] for k in ("logp_BT", "advantage_B", "mask_BT", "entropy_BT")}
    for name in LOSSES:
        torch.manual_seed(0)  # clip_cov draws
        plain = policy_loss(name, **common, denominator=STEP)
        torch.manual_seed(0)
        bonus = policy_loss(name, **common, denominator=STEP, entropy_coef=0.2)
        torch.testing.assert_close(bonus.loss, plain.loss - 0.2 * mean)
        torch.testing.assert_close(plain.sums["entropy"], mean.detach() * 40)


def test_sampler_weight_scales_the_surrogate_alone():
    step = random_step()
    common = {k: step[k] for k in ("logp_BT", "old_logp_BT", "ref_logp_BT", "mask_BT")}
    common |= {"denominator": STEP, "kl_coef": 0.1, "advantage_B": step["advantage_B"]}
    half = torch.full_like(step["logp_BT"], 0.5).detach().requires_grad_()
    weighted = policy_loss("dapo", **common, sampler_weight_BT=half)
    plain = policy_loss("dapo", **common)
    kl = 0.1 * plain.sums["ref_kl"] / 40
    torch.testing.assert_close(weighted.loss - kl, 0.5 * (plain.loss - kl))
    assert gradient(weighted.loss, half) == (None,)


OLD = torch.tensor([[0.0, 1.0, -1.0, 900.0], [0.1, -0.2, 5.0, 5.0]])
OLD_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("settings", "expected", "cut"),
    [
        ({}, [[1.0, 2.0, math.exp(-1), 2.0], [math.exp(0.1), math.exp(-0.2)]], 2),
        ({"limit": 3.0}, [[1.0, math.e, math.exp(-1), 3.0], [math.exp(0.1), math.exp(-0.2)]], 1),
        ({"beyond": "mask"}, [[1.0, 0.0, 0.0, 0.0], [math.exp(0.1), math.exp(-0.2)]], 3),
        ({"level": "sequence"}, [[2.0] * 4, [math.exp(-0.1)] * 2], 4),
        ({"level": "sequence", "beyond": "mask"}, [[0.0] * 4, [math.exp(-0.1)] * 2], 4),
    ],
)
def test_sampler_weight(settings, expected, cut):
    found = sampler_weight(OLD, torch.zeros(2, 4), OLD_MASK, **settings)
    for row, values in enumerate(expected):
        torch.testing.assert_close(found.weight_BT[row, : len(values)], torch.tensor(values))
    assert int(found.sums["mismatch_cut"]) == cut
    torch.testing.assert_close(found.sums["mismatch_abs"], torch.tensor(902.3))
    torch.testing.assert_close(found.sums["weight"], torch.tensor(sum(map(sum, expected))))


def test_mismatch_kl_is_that_of_the_sampler_to_the_model():
    """Over all tokens, weighted by the sampler, k3 is the exact KL divergence."""
    torch.manual_seed(0)
    sampler, model = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    count = 50_000
    token = torch.multinomial(sampler.exp(), count, replacement=True)[None]
    found = sampler_weight(model[token[0]][None], sampler[token[0]][None], torch.ones(1, count))
    exact = float((sampler.exp() * (sampler - model)).sum())
    assert float(found.sums["mismatch_kl"]) / count == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    "settings", [{"level": "word"}, {"beyond": "drop"}, {"limit": 0.5}], ids=lambda s: next(iter(s))
)
def test_sampler_weight_refuses(settings):
    with pytest.raises(ValueError, match="must be token or sequence"):
        sampler_weight(OLD, OLD, OLD_MASK, **settings)


# ------------------------------------------------------------- losses that choose tokens


def covariances(step):
    """Of A and log π over the tokens, in plain numbers, by (row, token)."""
    cells = step["mask_BT"].nonzero().tolist()
    a = {(b, t): float(step["advantage_B"][b]) for b, t in cells}
    logp = {(b, t): step["logp_BT"][b, t].item() for b, t in cells}
    mean_a, mean_logp = (sum(x.values()) / len(cells) for x in (a, logp))
    return {cell: (a[cell] - mean_a) * (logp[cell] - mean_logp) for cell in a}


def test_kl_cov_penalises_the_tokens_of_the_largest_covariance():
    step = random_step()
    common = {k: step[k] for k in ("logp_BT", "old_logp_BT", "advantage_B", "mask_BT")}
    result = policy_loss("kl_cov", **common, denominator=STEP, options={"share": 0.1, "coef": 0.7})
    found = covariances(step)
    chosen = sorted(found, key=found.get)[-4:]  # a tenth of 40 tokens
    log_ratio = step["logp_BT"] - step["old_logp_BT"]
    expected = -(log_ratio.exp() * step["advantage_B"][:, None])[step["mask_BT"]].sum()
    expected = expected + 0.7 * sum(log_ratio[cell].abs() for cell in chosen)
    torch.testing.assert_close(result.loss, expected / 40)
    torch.testing.assert_close(*gradient(result.loss, step["logp_BT"]), *gradient(expected / 40, step["logp_BT"]))


def test_clip_cov_leaves_out_tokens_of_large_covariance_at_random():
    step = random_step()
    common = {k: step[k] for k in ("logp_BT", "old_logp_BT", "advantage_B", "mask_BT")} | {"denominator": STEP}
    plain = policy_loss("dapo", **common, clip_high=0.2)
    (whole,) = gradient(plain.loss, step["logp_BT"])
    found = covariances(step)
    eligible = {cell for cell, value in found.items() if 0.2 < value < 2 and whole[cell] != 0}
    assert len(eligible) > 4
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        options = {"share": 0.1, "least": 0.2, "most": 2.0}
        result = policy_loss("clip_cov", **common, options=options)
        (slope,) = gradient(result.loss, step["logp_BT"])
        dropped = {tuple(cell) for cell in ((whole != 0) & (slope == 0)).nonzero().tolist()}
        assert len(dropped) == 4
        assert dropped <= eligible
        kept = slope != 0
        assert torch.equal(slope[kept], whole[kept])
        seen |= dropped
    assert len(seen) > 4
    # None is in the range: the loss is the clipped one.
    nothing = policy_loss("clip_cov", **common, options={"least": 100.0, "most": 101.0})
    torch.testing.assert_close(nothing.loss, plain.loss)


def test_sapo_gates_by_temperatures():
    step = random_step()
    common = {k: step[k] for k in ("logp_BT", "old_logp_BT", "advantage_B", "mask_BT")} | {"denominator": STEP}
    result = policy_loss("sapo", **common, options={"tau_positive": 0.5, "tau_negative": 2.0})
    ratio = (step["logp_BT"] - step["old_logp_BT"]).exp().detach()
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        a = float(step["advantage_B"][b])
        tau = 0.5 if a > 0 else 2.0
        gates = [4 / tau / (1 + math.exp(-tau * (float(ratio[b, t]) - 1))) for t in range(length)]
        expected -= a * sum(gates) / length / 8
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)


def test_the_top_entropy_tokens():
    entropy = torch.tensor([[0.1, 0.9, 0.5, 9.0], [0.3, 0.8, math.nan, math.nan]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    top = top_entropy_mask(entropy, mask, 0.4)
    assert top.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert top_entropy_mask(entropy, mask, 1.0).tolist() == mask.tolist()
    assert not top_entropy_mask(entropy, mask * 0, 0.4).any()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sapo", {"options": {"tau": 1.0}}, r"no option 'tau'; it has tau_positive, tau_negative"),
        ("grpo", {"options": {"share": 1.0}}, r"no option 'share'; it has none"),
        ("kl_cov", {"options": {"share": 0.0}}, r"option share of loss 'kl_cov' must be above 0, but it is 0.0"),
        ("sapo", {"clip_high": 0.2}, r"'sapo' has no clip"),
    ],
)
def test_options_are_checked(name, settings, message):
    step = random_step()
    with pytest.raises(ValueError, match=message):
        policy_loss(
            name, logp_BT=step["logp_BT"], advantage_B=step["advantage_B"], mask_BT=step["mask_BT"], denominator=STEP,
            **settings,
        )  # fmt: skip


# --------------------------------------------------------------------- denominators, padding


def clip(name, low, high):
    """The clip as settings, where the loss takes one."""
    return {} if LOSSES[name].clip_low is None else {"clip_low": low, "clip_high": high}


# These two choose their tokens within a micro-batch.
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("clip_cov", "kl_cov")])
@pytest.mark.parametrize(
    "cut", [[[i] for i in range(8)], [[0, 1, 2, 3], [4, 5, 6, 7]], [[6, 1], [7, 0, 3], [], [5, 2, 4]]]
)
def test_micro_batches_add_up_to_the_step(name, cut):
    """1×8, 8×1, ragged cuts in any order, an idle rank: one loss, one gradient, one statistic."""
    step = random_step()
    options = {"denominator": STEP, "kl_coef": 0.1, "entropy_coef": 0.01}
    options |= clip(name, 0.1, 0.2)  # gspo's own would leave no gradient here
    whole = policy_loss(name, **step, **options)
    inputs = step["logp_BT"], step["entropy_BT"]
    expected = gradient(whole.loss, *inputs)
    parts = [policy_loss(name, **rows(step, index), **options) for index in cut]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-14)
    for actual, wanted in zip(gradient(total, *inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
    for key, wanted in whole.sums.items():
        torch.testing.assert_close(sum(p.sums[key] for p in parts), wanted, rtol=1e-12, atol=0)
    assert max(p.ratio_max for p in parts) == whole.ratio_max
    assert (whole.sums["clip_low"] > 0) == (whole.sums["clip_high"] > 0) == (name != "sapo")


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_at_padding_does_not_matter(name):
    step = random_step()
    options = {"denominator": STEP, "kl_coef": 0.1, "entropy_coef": 0.01}
    options |= clip(name, 1.0, 9.0)  # every completion has a gradient
    torch.manual_seed(0)
    expected = policy_loss(name, **step, **options)
    wanted = gradient(expected.loss, step["logp_BT"], step["entropy_BT"])
    for junk in (math.nan, math.inf, -math.inf, 1e30):
        spoilt = {
            key: value.detach().masked_fill(~step["mask_BT"], junk).requires_grad_()
            if key.endswith("_BT") and key != "mask_BT"
            else value
            for key, value in step.items()
        }
        torch.manual_seed(0)
        actual = policy_loss(name, **spoilt, **options)
        assert torch.equal(actual.loss, expected.loss)
        assert actual.sums == expected.sums
        assert actual.ratio_max == expected.ratio_max
        slopes = gradient(actual.loss, spoilt["logp_BT"], spoilt["entropy_BT"])
        for slope, want in zip(slopes, wanted, strict=True):
            assert torch.equal(slope, want)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("lengths", [[0, 3, 0], [0, 0], [0], []])
def test_completions_without_tokens(name, lengths):
    """They give no loss and no NaN, but count among the completions."""
    step = random_step(lengths=lengths)
    denominator = Denominator(completions=3, tokens=sum(lengths), max_new_tokens=12)
    options = {"denominator": denominator, "kl_coef": 0.1, "entropy_coef": 0.01}
    result = policy_loss(name, **step, **options)
    (slope,) = gradient(result.loss, step["logp_BT"])
    assert torch.isfinite(slope).all()
    assert result.sums["tokens"] == sum(lengths)
    if sum(lengths):
        alone = policy_loss(name, **rows(step, [1]), **options)
        torch.testing.assert_close(result.loss, alone.loss, rtol=1e-12, atol=0)
    else:
        assert result.loss == 0
        assert all(value == 0 for value in result.sums.values())
        assert result.ratio_max == 0


@pytest.mark.parametrize("name", LOSSES)
def test_absurd_ratios_stay_finite(name):
    step = random_step(dtype=torch.float32)
    for shift in (1e4, -1e4):
        far = step | {"old_logp_BT": step["old_logp_BT"] + shift}
        result = policy_loss(name, **far, denominator=STEP, kl_coef=0.1)
        assert torch.isfinite(result.loss)
        assert all(torch.isfinite(value) for value in result.sums.values())
        assert torch.isfinite(gradient(result.loss, step["logp_BT"])[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_worked_out_in_float32(dtype):
    step = {
        key: value.detach().to(dtype) if value.is_floating_point() else value for key, value in random_step().items()
    }
    step["logp_BT"].requires_grad_()
    result = policy_loss("gspo", **step, denominator=STEP, kl_coef=0.1, entropy_coef=0.01)
    assert result.loss.dtype == torch.float32
    exact = {key: value.detach().double() if value.is_floating_point() else value for key, value in step.items()}
    expected = policy_loss("gspo", **exact, denominator=STEP, kl_coef=0.1, entropy_coef=0.01)
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert gradient(result.loss, step["logp_BT"])[0].dtype == dtype


def test_statistics():
    step = random_step()
    mask = step["mask_BT"]
    log_ratio = (step["logp_BT"] - step["old_logp_BT"]).detach()[mask]
    a = step["advantage_B"][:, None].expand(mask.shape)[mask]
    ratio = log_ratio.exp()
    result = policy_loss("dapo", **step, denominator=STEP)
    assert result.sums["tokens"] == 40
    assert result.sums["clip_low"] == ((ratio < 0.8) & (a < 0)).sum() > 0
    assert result.sums["clip_high"] == ((ratio > 1.28) & (a > 0)).sum() > 0
    torch.testing.assert_close(result.sums["approx_kl"], (ratio - 1 - log_ratio).sum())
    torch.testing.assert_close(result.ratio_max, ratio.max())
    assert not any(value.requires_grad for value in result.sums.values())

    by_completion = [part.mean().exp() for part in log_ratio.split(LENGTHS)]
    result = policy_loss("gspo", **step, denominator=STEP)
    torch.testing.assert_close(result.ratio_max, max(by_completion))


# ---------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"unknown loss 'ppo'; valid: grpo, dapo", {"name": "ppo"}),
        (r"mask_BT has shape \[8, 8\], but logp_BT has \[8, 9\]", {"mask_BT": torch.ones(8, 8)}),
        (r"old_logp_BT has shape", {"old_logp_BT": torch.ones(8, 1)}),
        (r"ref_logp_BT has shape", {"ref_logp_BT": torch.ones(9)}),
        (r"entropy_BT has shape", {"entropy_BT": torch.ones(1, 9)}),
        (r"sampler_weight_BT has shape", {"sampler_weight_BT": torch.ones(8)}),
        (r"advantage_B has shape \[8, 1\]", {"advantage_B": torch.ones(8, 1)}),
        (r"logp_BT must be \[B, T\]; its shape is \[8\]", {"logp_BT": torch.ones(8)}),
        (r"must not be negative", {"clip_low": -0.1}),
        (r"must not be negative", {"clip_high": -0.1}),
        (r"kl_coef = 0.1 needs ref_logp_BT", {"kl_coef": 0.1, "ref_logp_BT": None}),
        (r"entropy_coef = 0.1 needs entropy_BT", {"entropy_coef": 0.1, "entropy_BT": None}),
    ],
)
def test_bad_arguments_are_named(message, change):
    with pytest.raises(ValueError, match=message):
        policy_loss(**({"name": "grpo", "denominator": STEP} | random_step() | change))


@pytest.mark.parametrize("counts", [(0, 5, 5), (1, -1, 5), (1, 5, 0)])
def test_impossible_denominators_are_refused(counts):
    with pytest.raises(ValueError, match="at least"):
        Denominator(*counts)
