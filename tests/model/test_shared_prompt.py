"""The shared-prompt forward against each completion run by itself, on real model classes."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch
from families import END, FAMILIES, IMAGE, SMALL, START, VISION, VOCABULARY, WORDS, make_model
from helpers import VL, batch_of, policy
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.errors import DataError, ModelError
from mm_agrae.model import activations, shared_attention, shared_prompt
from mm_agrae.model.image_features import feature_inputs, pixel_inputs
from mm_agrae.model.packed_layout import GroupSpans, PackedLayout
from mm_agrae.model.shared_prompt import hidden_states, install, pack, require_agreement, unsupported_reason
from mm_agrae.model.vocab_head import head_logprobs
from mm_agrae.types import Example, MicroBatch, Prompt

MODELS = FAMILIES | {
    "qwen2_sliding": SMALL | {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7,
        "max_window_layers": 1,
    },
    "mistral": SMALL | {"sliding_window": 5},
}  # fmt: skip
ROUNDING = 6e-6
"""Of a gradient's norm in float32. A layer adds up 5 · 64 + 128 products, forward and backward; in
three layers that is 2,700 additions, each rounded by up to eps/2 with a random sign, so that
√2,700 · eps is what another order of the sums may change."""
FEW = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2"])


@pytest.fixture(autouse=True)
def _recompute_any_size(monkeypatch):
    """These models are so small that none of their activations would be recomputed."""
    monkeypatch.setattr(activations, "FEWEST", 0)


def build(family: str, dtype: torch.dtype = torch.float32):
    settings = dict(MODELS[family])
    return make_model(settings.pop("model_type", family), settings, dtype)


def text_prompt(length: int, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (length,), generator=generator)
    return Prompt(Example(f"text{seed}", "", ""), "", ids, torch.zeros_like(ids))


def image_prompt(grids: list[tuple[int, int]], length: int = 9, seed: int = 0, patch: int = 14) -> Prompt:
    """Images stand in front of the text, each between its start and end token."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for height, width in grids:
        ids += [START, *[IMAGE] * (height * width // 4), END]
    ids += torch.randint(WORDS, (length,), generator=generator).tolist()
    token_ids = torch.tensor(ids)
    patches = sum(height * width for height, width in grids)
    return Prompt(
        Example(f"image{seed}", "", ""), "", token_ids,
        mm_token_type_ids=(token_ids == IMAGE).int(),
        pixel_values=torch.randn(patches, 3 * 2 * patch * patch, generator=generator),
        image_grid_thw=torch.tensor([[1, height, width] for height, width in grids]),
    )  # fmt: skip


def make_batch(prompts: list[Prompt], lengths: list[list[int]], seed: int = 0) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    flat = [length for group in lengths for length in group]
    longest = max(flat, default=0)
    mask_BT = (torch.arange(longest)[None] < torch.tensor(flat)[:, None]).float()
    token_BT = torch.randint(1, WORDS, mask_BT.shape, generator=generator) * mask_BT.long()
    index_B = [index for index, group in enumerate(lengths) for _ in group]
    return MicroBatch(prompts, torch.tensor(index_B), token_BT, mask_BT, torch.zeros(len(flat)), mask_BT)


def shared(model, batch: MicroBatch, **options):
    backbone = model.base_model
    packed = pack(backbone, batch)
    hidden_NH = hidden_states(backbone, packed, **options)
    logp_N, _ = head_logprobs(model.get_output_embeddings(), hidden_NH, packed.target_N)
    return packed.unpack(logp_N)


def repeated(model, batch: MicroBatch) -> torch.Tensor:
    """Each completion by itself behind its own copy of prompt and images, through forward()."""
    logp_BT = []
    for row, index in enumerate(batch.prompt_index_B.tolist()):
        prompt, length = batch.prompts[index], int(batch.mask_BT[row].sum())
        tokens = batch.token_BT[row, :length]
        inputs = {"input_ids": torch.cat([prompt.token_ids, tokens])[None]}
        if prompt.pixel_values is not None:
            kinds = torch.cat([prompt.mm_token_type_ids, torch.zeros(length, dtype=torch.int32)])
            inputs |= {
                "mm_token_type_ids": kinds[None],
                "pixel_values": prompt.pixel_values,
                "image_grid_thw": prompt.image_grid_thw,
            }
        logits = model(**inputs, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp_T = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        logp_BT.append(torch.nn.functional.pad(logp_T, (0, batch.mask_BT.shape[1] - length)))
    return torch.stack(logp_BT)


def loss_of(logp_BT: torch.Tensor) -> torch.Tensor:
    """Uneven weights, so that rows and tokens taken for one another show in the gradient."""
    weight = torch.linspace(-1, 2, logp_BT.numel(), dtype=logp_BT.dtype).view_as(logp_BT)
    return (logp_BT * weight).sum()


def gradients(model, logp_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(logp_BT).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch: MicroBatch, tolerance: float, reference=None) -> None:
    ours, theirs = shared(model, batch), repeated(reference or model, batch)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)
    mine, other = gradients(model, ours), gradients(reference or model, theirs)
    assert mine.keys() == other.keys()
    total = torch.cat([g.flatten() for g in other.values()]).norm()
    assert total > 1
    difference = torch.cat([(mine[name] - other[name]).flatten() for name in other]).norm()
    assert difference / total <= tolerance
    for name in other:
        scale = other[name].norm()
        # Key biases have no gradient but for rounding: softmax does not see them.
        if scale > 1e-6 * total:
            assert (mine[name] - other[name]).norm() / scale <= 50 * tolerance, name


RAGGED = [[4, 1, 9, 9], [3], [6, 2, 12]]


def prompts_for(family: str) -> list[Prompt]:
    if family in VISION:
        patch = MODELS[family]["vision_config"]["patch_size"]
        first, second = [(4, 8)], [(4, 4), (8, 4)]
        return [image_prompt(first, patch=patch), text_prompt(5, 1), image_prompt(second, 4, 2, patch)]
    return [text_prompt(6), text_prompt(1, 1), text_prompt(11, 2)]


# ------------------------------------------------------------------------------- the row


def test_the_example_of_the_docstring():
    """A prompt of 5 tokens and completions of 3, 1 and 2, as the module's docstring has it."""
    lines = re.findall(r"^    (\w+) +([\d |]+)", shared_prompt.__doc__, re.MULTILINE)
    shown = {name: [int(each) for each in re.findall(r"\d+", values)] for name, values in lines}
    completions = [[21, 22, 23], [31], [41, 42]]
    assert shown["completions"] == [*completions[0], *completions[1], *completions[2]]
    batch = make_batch([Prompt(Example("0", "", ""), "", torch.tensor(shown["prompt"]))], [[3, 1, 2]])
    for row, tokens in enumerate(completions):
        batch.token_BT[row, : len(tokens)] = torch.tensor(tokens)
    packed = pack(build("qwen2").base_model, batch)
    for name in ("input_ids", "position_ids", "source_N", "target_N", "row_N", "column_N"):
        assert getattr(packed, name).flatten().tolist() == shown[name], name
    assert packed.layout.groups == (GroupSpans((0, 5), ((5, 7), (7, 8))),)
    # Unpacked, every predicted token is back where the micro-batch has it.
    assert torch.equal(packed.unpack(packed.target_N), batch.token_BT)


# ------------------------------------------------------------------------------- equality


# The model classes themselves compute norms and rotary angles in float32, also for float64.
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, ROUNDING), (torch.float64, 5e-7)])
def test_logprobs_and_gradients_equal_the_repeated_batch(family, dtype, tolerance):
    if family == "qwen3_moe" and dtype == torch.float64:
        pytest.skip("PyTorch has no grouped matrix product in float64")
    model = build(family, dtype)
    install(model)
    batch = make_batch(prompts_for(family), RAGGED)
    for prompt in batch.prompts:
        if prompt.pixel_values is not None:
            object.__setattr__(prompt, "pixel_values", prompt.pixel_values.to(dtype))
    assert_same(model, batch, tolerance)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=5), min_size=1, max_size=4),
    kinds=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    size=st.integers(1, 12),
)
def test_random_layouts(lengths, kinds, size):
    model = _model()
    made = [
        text_prompt(size, 0),
        image_prompt([(4, 4)], size, 1),
        image_prompt([(4, 12), (8, 4)], size, 2),
        text_prompt(1, 3),
    ]
    batch = make_batch([made[kind] for kind in kinds[: len(lengths)]], lengths)
    with torch.no_grad():
        ours = shared(model, batch)
        theirs = repeated(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=10 * ROUNDING)


@functools.cache
def _model(family: str = "qwen2_5_vl"):
    model = build(family)
    install(model)
    return model


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2", "gemma3_text"])
def test_masked_attention_serves_whole_models(family, monkeypatch):
    """What runs on other devices, here on the CPU."""
    monkeypatch.setattr(shared_attention, "_cpu_flash", None)
    model = build(family)
    install(model)
    assert_same(model, make_batch(prompts_for(family), RAGGED), ROUNDING)


def test_bfloat16_is_as_close_as_the_repeated_batch():
    model, exact = build("qwen2_5_vl", torch.bfloat16), build("qwen2_5_vl")
    exact.load_state_dict({n: p.float() for n, p in model.state_dict().items()})
    install(model)
    batch = make_batch(prompts_for("qwen2_5_vl"), RAGGED)
    with torch.no_grad():
        truth = repeated(exact, batch)
        ours = (shared(model, batch) - truth).abs().mean()
        theirs = (repeated(model, batch).float() - truth).abs().mean()
    assert ours <= 1.5 * theirs


def test_autocast():
    model = _model()
    batch = make_batch(prompts_for("qwen2_5_vl"), RAGGED)
    with torch.no_grad():
        truth = repeated(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            ours = (shared(model, batch) - truth).abs().mean()
            theirs = (repeated(model, batch).float() - truth).abs().mean()
    assert ours <= 1.5 * theirs


def test_precomputed_image_features_carry_the_gradient():
    model = build("qwen2_5_vl")
    install(model)
    batch = make_batch(prompts_for("qwen2_5_vl"), RAGGED)
    packed = pack(model.base_model, batch)
    output = model.base_model.get_image_features(**pixel_inputs(packed.prompts, "cpu"))
    mine = gradients(model, shared(model, batch, images=feature_inputs(output.pooler_output)))
    other = gradients(model, shared(model, batch))
    assert any("visual" in name for name in other)
    for name in other:
        torch.testing.assert_close(mine[name], other[name])


def test_vision_runs_once_per_prompt():
    model = _model()
    patches = []
    hook = model.base_model.visual.patch_embed.register_forward_hook(
        lambda module, inputs, output: patches.append(len(output))
    )
    prompt = image_prompt([(4, 8)])
    with torch.no_grad():
        shared(model, make_batch([prompt], [[3] * 8]))
    hook.remove()
    assert patches == [32]


def test_generation_and_plain_forward_stay_as_they_were():
    plain, model = build("qwen2"), build("qwen2")
    install(model)
    ids = torch.randint(10, 97, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_batch_without_tokens_still_reaches_every_parameter():
    model = build("qwen2")
    install(model)
    batch = make_batch([text_prompt(4)], [[0, 0]])
    assert shared(model, batch).shape == (2, 0)
    grads = gradients(model, shared(model, batch))
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert all(grad.abs().max() == 0 for grad in grads.values())


# -------------------------------------------------------------------- silently wrong forms


def wrong(model, batch: MicroBatch, **changes) -> torch.Tensor:
    """Log-probabilities of a packed row run in another way than ours."""
    packed = pack(model.base_model, batch)
    inputs = {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "use_cache": False,
        "shared_prompt": packed.layout,
        "attention_mask": torch.empty(1, 1, 0, 0),
        **pixel_inputs(packed.prompts, "cpu"),
    }
    inputs |= changes
    inputs = {name: value for name, value in inputs.items() if value is not None}
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state[0, packed.source_N]
        logp_N, _ = head_logprobs(model.get_output_embeddings(), hidden, packed.target_N)
    return packed.unpack(logp_N)


def full_mask(layout: PackedLayout) -> torch.Tensor:
    """[S,S]: which token sees which."""
    see = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for group in layout.groups:
        for start, end in (group.prompt, *group.completions):
            see[start:end, slice(*group.prompt)] = True
            see[start:end, start:end] = True
    return see.tril()


def test_the_agreement_check_passes_what_is_right_and_stops_what_is_wrong():
    model = _model()
    batch = make_batch(prompts_for("qwen2_5_vl"), RAGGED)
    packed = pack(model.base_model, batch)
    with torch.no_grad():
        truth, ours = repeated(model, batch), shared(model, batch)
    require_agreement(ours, truth, batch.mask_BT)
    torch.testing.assert_close(wrong(model, batch), ours)
    forms = {
        "positions without a mask": {"shared_prompt": None, "attention_mask": None},
        "a padding mask alone": {"shared_prompt": None, "attention_mask": torch.ones_like(packed.input_ids)},
        "one-dimensional positions": {
            "position_ids": torch.cat(
                [
                    torch.arange(end - start) + (start - group.prompt[0] if not i else len_prompt)
                    for group in packed.layout.groups
                    for len_prompt in [group.prompt[1] - group.prompt[0]]
                    for i, (start, end) in enumerate((group.prompt, *group.completions))
                ]
            )[None]
        },
        "positions that run through": {"position_ids": torch.arange(packed.layout.length).expand(3, 1, -1)},
    }
    for changes in forms.values():
        result = wrong(model, batch, **changes)
        with pytest.raises(ModelError, match="differs from the repeated batch"):
            require_agreement(result, truth, batch.mask_BT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_completions_that_see_each_other_are_noticed_in_a_trained_policy(monkeypatch, dtype):
    made = policy(VL, shared_prompt="on", dtype=dtype)
    batch = batch_of(VL, made, count=1, group=4)
    made.check_sharing(batch)

    def as_one_completion(backbone, batch):
        packed = pack(backbone, batch)
        groups = [
            GroupSpans(group.prompt, ((group.completions[0][0], group.completions[-1][1]),))
            for group in packed.layout.groups
        ]
        return replace(packed, layout=PackedLayout(groups, made.device))

    monkeypatch.setattr(shared_prompt, "pack", as_one_completion)
    with pytest.raises(ModelError, match="differs from the repeated batch"):
        made.check_sharing(batch)


def test_wrong_image_positions_are_noticed_in_a_trained_policy(monkeypatch):
    made = policy(VL, shared_prompt="on")
    batch = batch_of(VL, made, count=4, group=1)
    made.check_sharing(batch)
    monkeypatch.setattr(shared_prompt, "_positions", lambda _, prompt: torch.arange(len(prompt)).expand(3, -1))
    with pytest.raises(ModelError, match="differs from the repeated batch"):
        made.check_sharing(batch)


def test_one_token_does_not_stop_a_run_in_16_bits():
    noise_BT = torch.full((1, 2000), 1e-2)
    noise_BT[0, 7] = 1.5
    logp_BT, mask_BT = torch.zeros(1, 2000), torch.ones(1, 2000)
    require_agreement(noise_BT, logp_BT, mask_BT, torch.bfloat16)
    noise_BT[0, :21] = 1.5  # more than 1 %
    with pytest.raises(ModelError, match=r"1\.5e\+00 at most in 99 % of tokens"):
        require_agreement(noise_BT, logp_BT, mask_BT, torch.bfloat16)
    noise_BT = torch.zeros(1, 2000)
    noise_BT[0, 7] = 2e-3
    with pytest.raises(ModelError, match=r"2\.0e-03 at most \("):
        require_agreement(noise_BT, logp_BT, mask_BT)


def test_a_bare_mask_is_wrong_for_sliding_layers_and_noticed():
    model = _model("gemma3_text")
    batch = make_batch(prompts_for("gemma3_text"), RAGGED)
    see = full_mask(pack(model.base_model, batch).layout)[None, None]
    with torch.no_grad():
        truth = repeated(model, batch)
    require_agreement(wrong(model, batch), truth, batch.mask_BT)
    bare = wrong(model, batch, shared_prompt=None, attention_mask=see)
    with pytest.raises(ModelError, match="differs"):
        require_agreement(bare, truth, batch.mask_BT)


def test_eager_attention_with_a_bool_mask_is_wrong_and_noticed():
    model = _model("qwen2")
    batch = make_batch(prompts_for("qwen2"), RAGGED)
    with torch.no_grad():
        truth = repeated(model, batch)
    eager = build("qwen2")
    eager.set_attn_implementation("eager")
    see = full_mask(pack(model.base_model, batch).layout)[None, None]
    bare = wrong(eager, batch, shared_prompt=None, attention_mask=see)
    with pytest.raises(ModelError, match="differs"):
        require_agreement(bare, truth, batch.mask_BT)


@FEW
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_without_our_attention_fails_instead_of_computing_something_else(family, implementation):
    model = build(family)
    key = "text_config" if family == "qwen2_5_vl" else ""
    model.set_attn_implementation({key: implementation})
    with pytest.raises(RuntimeError):
        shared(model, make_batch(prompts_for(family), RAGGED))


def test_images_that_do_not_match_are_named():
    model = _model()
    good = image_prompt([(4, 8)], seed=3)

    def broken(**changes):
        prompt = Prompt(**{**vars(good), **changes})
        return make_batch([prompt], [[2, 3]])

    with pytest.raises(DataError, match=r"'image3'.*one-dimensional positions"):
        pack(model.base_model, broken(mm_token_type_ids=None))
    with pytest.raises(DataError, match=r"'image3'.*8 image placeholder.*give 4 features"):
        pack(model.base_model, broken(image_grid_thw=torch.tensor([[1, 4, 4]])))
    with pytest.raises(DataError, match=r"'image3'.*0 tokens marked"):
        pack(model.base_model, broken(mm_token_type_ids=torch.zeros(len(good), dtype=torch.int32)))
    with pytest.raises(DataError, match=r"'image3'.*no image"):
        pack(model.base_model, broken(pixel_values=None, image_grid_thw=None))
    with pytest.raises(DataError, match=r"'image3'.*together"):
        pack(model.base_model, broken(pixel_values=None))
    with pytest.raises(DataError, match=r"'image3'.*text only"):
        pack(_model("qwen2").base_model, broken())
    batch = make_batch([good], [[2, 3]])
    batch.token_BT[1, 1] = IMAGE
    with pytest.raises(DataError, match=r"'image3'.*exclude that id"):
        pack(model.base_model, batch)


# ---------------------------------------------------------------- families that cannot share


def test_supported_families_say_so_and_are_left_as_they_were():
    for family in MODELS:
        model = build(family).train()
        assert unsupported_reason(model) is None
        assert model.training
        assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_families_that_cannot_share_give_one_line():
    import transformers as hf

    small = SMALL | {"num_hidden_layers": 2}
    soft = hf.Gemma2ForCausalLM(hf.Gemma2Config(**small, attn_logit_softcapping=5.0))
    soft.set_attn_implementation("sdpa")
    eager = build("qwen2")
    eager.set_attn_implementation("eager")
    positions = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    )
    recurrent = hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    expected = {soft: "softcap", eager: "attn_implementation is eager", recurrent: "Mamba"}
    for model, words in expected.items():
        reason = unsupported_reason(model)
        assert reason is not None
        assert words in reason
        assert "\n" not in reason
    # Whatever it answers about a family that was never tried must be true.
    reason = unsupported_reason(positions.eval())
    if reason is None:
        install(positions)
        assert_same(positions, make_batch([text_prompt(6)], [[3, 5]]), ROUNDING)
