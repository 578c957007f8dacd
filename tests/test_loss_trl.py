"""Our losses against TRL's own `GRPOTrainer._compute_loss`, on one real model and one batch.

Each case builds a GRPOTrainer and gives its loss function the tensors that ours gets, cut into two
micro-batches as gradient accumulation would. Losses and gradients of all parameters must agree.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("trl") is None:
    pytest.skip("trl is not installed (pip install mm-agrae[trl])", allow_module_level=True)

from mm_agrae.loss import Denominator, policy_loss, top_entropy_mask

VOCABULARY = 40
MAX_NEW_TOKENS = 12
LENGTHS = [7, 1, 5, 0, 9, 3, 9, 2]
PROMPT_LENGTHS = [4, 4, 2, 2, 4, 4, 3, 3]
MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen2 with a word-level tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        # Wide enough that log-probabilities differ from those of a uniform distribution.
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def build_trainer(checkpoint, tmp_path, **settings):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(LENGTHS) // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        num_generations=2,
        max_completion_length=MAX_NEW_TOKENS,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        **settings,
    )
    trainer = GRPOTrainer(
        model=str(checkpoint),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3"] * 4}),
    )
    trainer.model.train()
    # Set by `Trainer.train` before each accumulation window.
    trainer.current_gradient_accumulation_steps = MICRO_BATCHES
    return trainer


def batch(trainer, spread):
    """The inputs TRL's loss takes for a step. `spread` is the std of log ρ."""
    torch.manual_seed(1)
    rows, width = len(LENGTHS), max(LENGTHS)
    inputs = {
        "prompt_ids": torch.randint(2, VOCABULARY, (rows, max(PROMPT_LENGTHS))),
        "prompt_mask": (torch.arange(max(PROMPT_LENGTHS)) >= 4 - torch.tensor(PROMPT_LENGTHS)[:, None]).long(),
        "completion_ids": torch.randint(2, VOCABULARY, (rows, width)),
        "completion_mask": (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long(),
        "advantages": torch.randn(rows),
    }
    with torch.no_grad():
        logp, _ = log_probabilities(trainer, inputs)
    inputs["old_per_token_logps"] = logp + spread * torch.randn(logp.shape)
    inputs["ref_per_token_logps"] = logp + 0.3 * torch.randn(logp.shape)
    inputs["importance_sampling_ratio"] = 0.5 + torch.rand(logp.shape)
    return inputs


def log_probabilities(trainer, inputs):
    logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        inputs["completion_ids"].shape[1],
        compute_entropy=True,
    )
    return logp, entropy


def micro_batches(inputs):
    size = len(LENGTHS) // MICRO_BATCHES
    for start in range(0, len(LENGTHS), size):
        yield {key: value[start : start + size] for key, value in inputs.items()}


def gradients(trainer):
    parameters = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    return parameters


def compare(trainer, inputs, name, top_entropy=1.0, **settings):
    """Loss and gradient by TRL and by us; returns the sums of our statistics."""
    tokens = sum(LENGTHS)
    theirs = 0.0
    for part in micro_batches(inputs):
        loss = trainer._compute_loss(trainer.model, part | {"num_items_in_batch": torch.tensor(tokens)})
        loss.backward()
        theirs += loss.item()
    expected = gradients(trainer)

    ours, sums = 0.0, {}
    for part in micro_batches(inputs):
        logp, entropy = log_probabilities(trainer, part)
        result = policy_loss(
            name,
            logp_BT=logp,
            old_logp_BT=part.get("old_per_token_logps"),
            ref_logp_BT=part["ref_per_token_logps"],
            advantage_B=part["advantages"],
            mask_BT=part["completion_mask"],
            sampler_weight_BT=sampler_weight(trainer, part, entropy, top_entropy),
            entropy_BT=entropy,
            denominator=Denominator(len(LENGTHS), tokens, MAX_NEW_TOKENS),
            **settings,
        )
        result.loss.backward()
        ours += result.loss.item()
        sums = {key: sums.get(key, 0) + value.item() for key, value in result.sums.items()}
    assert abs(theirs) > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    actual = gradients(trainer)
    assert len(actual) == len(expected) > 10
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for wanted, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * scale)
    return sums


def sampler_weight(trainer, part, entropy, top_entropy):
    weight = part["importance_sampling_ratio"] if trainer.use_vllm else torch.ones(entropy.shape)
    return weight * top_entropy_mask(entropy, part["completion_mask"], top_entropy)


# Our name and clip, and how TRL is told the same. TRL's cispo takes the bound itself.
CASES = {
    "grpo": ({}, {"loss_type": "grpo", "epsilon": 0.2}),
    "dapo": ({}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dr_grpo": ({}, {"loss_type": "dr_grpo", "epsilon": 0.2}),
    "gspo": (
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": ({"clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
    "sapo": (
        {"options": {"tau_positive": 0.8, "tau_negative": 1.3}},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_off_policy_with_clipping_on_both_sides(name, checkpoint, tmp_path):
    clip, theirs = CASES[name]
    trainer = build_trainer(checkpoint, tmp_path, **theirs)
    sums = compare(trainer, batch(trainer, spread=0.5), name, **clip)
    assert sums["clip_high"] > 0 or name == "sapo"
    assert sums["clip_low"] > 0 or name in ("cispo", "sapo")


@pytest.mark.parametrize("name", CASES)
def test_on_policy(name, checkpoint, tmp_path):
    clip, theirs = CASES[name]
    trainer = build_trainer(checkpoint, tmp_path, **theirs)
    inputs = batch(trainer, spread=0.0)
    del inputs["old_per_token_logps"]
    sums = compare(trainer, inputs, name, **clip)
    assert sums["approx_kl"] == 0


@pytest.mark.parametrize("unbiased_kl", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_with_kl_and_sampler_weight(name, unbiased_kl, checkpoint, tmp_path):
    """TRL scales k3 by ρ unless told otherwise; ours is GRPO's plain k3 unless told otherwise."""
    clip, theirs = CASES[name]
    trainer = build_trainer(checkpoint, tmp_path, beta=0.3, use_bias_correction_kl=unbiased_kl, **theirs)
    # What TRL does for vLLM rollouts, which cannot be run here.
    trainer.use_vllm = True
    inputs = batch(trainer, spread=0.5)
    sums = compare(trainer, inputs, name, kl_coef=0.3, unbiased_kl=unbiased_kl, **clip)
    assert sums["ref_kl"] > 0


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_top_entropy_tokens(name, checkpoint, tmp_path):
    clip, theirs = CASES[name]
    trainer = build_trainer(
        checkpoint, tmp_path, beta=0.3, use_bias_correction_kl=False, top_entropy_quantile=0.3, **theirs
    )
    compare(trainer, batch(trainer, spread=0.5), name, top_entropy=0.3, kl_coef=0.3, **clip)


def test_trl_defaults_but_for_the_clip_of_dapo(checkpoint, tmp_path):
    """TRL's own defaults are `dapo` with a clip of 0.2 on both sides."""
    trainer = build_trainer(checkpoint, tmp_path)
    assert trainer.loss_type == "dapo"
    compare(trainer, batch(trainer, spread=0.5), "dapo", clip_high=0.2)


def test_entropy_bonus_of_equal_micro_batches(checkpoint, tmp_path):
    """TRL means the entropy per micro-batch, we over the step: equal where token counts are."""
    trainer = build_trainer(checkpoint, tmp_path, loss_type="dapo", entropy_coef=0.1)
    inputs = batch(trainer, spread=0.5)
    order = torch.tensor([4, 2, 5, 1, 0, 3, 6, 7])
    inputs = {key: value[order] for key, value in inputs.items()}
    counts = [int(part["completion_mask"].sum()) for part in micro_batches(inputs)]
    assert counts[0] == counts[1]
    compare(trainer, inputs, "dapo", clip_high=0.2, entropy_coef=0.1)
