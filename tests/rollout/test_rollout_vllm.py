"""vLLM inside this process against the reference engine and the policy's own forward.

Every test samples with the real engine, on a CPU where there is no GPU.
"""

import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, TEXT, VL, engine, policy, processing, prompts, sampling
from PIL import Image

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config import LoraSection, ModelSection, PromptSection, RolloutSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.weights import full_weights
from mm_agrae.rollout import make_engine, vllm_common
from mm_agrae.types import Example

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("vllm"),  # engines take seconds to start: one process for the file
]

EXACT = 1e-4
"""Nats; float32 on both sides."""

LARGE_PIXELS = 4 * 112896
"""More than the checkpoint's own limit: pictures must not be made smaller a second time."""


class Setup:
    """A policy, its processing, its prompts and a vLLM engine."""

    def __init__(self, path, prompts, processing, settings=None, **model):
        torch.manual_seed(0)
        self.processing, self.prompts = processing, prompts
        self.policy = Policy(ModelSection(path=path, **model), processing).eval()
        self.engine = make_engine(
            RolloutSection(engine="vllm", vllm=settings or {}),
            self.policy,
            processing,
            batch_completions=64,
            max_tokens=384,
        )
        self.start = {name: value.clone() for name, value in self.policy.state_dict().items()}

    def generate(self, prompts, count, **settings):
        return self.engine.generate(prompts, count, sampling(**settings), range(len(prompts)))

    def difference(self, prompts, groups, temperature=1.0):
        """Largest |Δ log-prob| between the samples and the policy's forward on the same tokens."""
        rows = [UpdateRow(index, each, 0.0) for index, group in enumerate(groups) for each in group]
        micro = micro_batch(prompts, rows, self.policy.device)
        self.policy.temperature = temperature
        with torch.no_grad():
            logp_BT, _ = self.policy(micro)
        return float(((logp_BT - micro.sampling_logp_BT) * micro.mask_BT).abs().max())

    def greedy(self):
        """Greedy tokens by vLLM, required to equal the reference engine's."""
        made = self.generate(self.prompts, 1, temperature=0.0)
        expected = engine(self.policy).generate(
            self.prompts, 1, sampling(temperature=0.0), range(len(self.prompts))
        )
        for own, reference in zip(made, expected, strict=True):
            assert own[0].token_ids == reference[0].token_ids
            assert np.allclose(own[0].logprobs, reference[0].logprobs, atol=EXACT)
            assert own[0].finish_reason == reference[0].finish_reason
            assert own[0].policy_version == self.policy.version
        return [group[0].token_ids for group in made]

    def move(self, change):
        """Another version of the weights, handed over."""
        with torch.no_grad():
            change()
        self.policy.version += 1
        return self.engine.sync()

    def disturb(self, only="", size=0.3):
        generator = torch.Generator().manual_seed(3)
        for name, value in self.policy.model.named_parameters():
            if value.requires_grad and only in name:
                noise = torch.randn(value.shape, generator=generator)
                value.add_(noise * size * (float(value.std()) or 0.3))

    def restore(self):
        self.policy.load_state_dict(self.start)


def mixed_prompts(made):
    """Pictures of several sizes, two in one row, none in another: all in one batch."""
    wide, small = Image.new("RGB", (196, 56), "red"), Image.new("RGB", (56, 56), "blue")
    large = Image.effect_noise((476, 476), 90).convert("RGB")
    rows = [
        ("What?", (wide,)),
        ("And <image> or <image>, which?", (small, wide)),
        ("1+1?", ()),
        ("How large?", (large,)),
    ]
    return [made.prompt(Example(f"row {i}", q, "1", images)) for i, (q, images) in enumerate(rows)]


@pytest.fixture(scope="module")
def vl():
    made = processing(VL, max_pixels=LARGE_PIXELS)
    setup = Setup(VL, prompts(VL, 4) + mixed_prompts(made), made)
    assert max(map(len, setup.prompts)) > 300
    yield setup
    setup.engine.close()


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A text model whose vocabulary head is not its embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tmp_path_factory.mktemp("untied"))
    model = AutoModelForCausalLM.from_pretrained(TEXT, tie_word_embeddings=False)
    weight = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(weight.detach() * 1.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEXT).save_pretrained(folder)
    # Room for a dozen prompts at once: the others have to wait, whole.
    narrow = {"options": {"max_num_batched_tokens": 512}}
    setup = Setup(folder, prompts(TEXT, 5), Processing(folder, PromptSection()), narrow)
    assert not setup.policy.hf.config.tie_word_embeddings
    yield setup
    setup.engine.close()


@pytest.fixture(scope="module")
def text_lora():
    lora = LoraSection(rank=4, modules=("q_proj", "v_proj", "down_proj"))
    setup = Setup(TEXT, prompts(TEXT, 5), processing(TEXT), lora=lora)
    yield setup
    setup.engine.close()


@pytest.fixture(scope="module")
def vl_adapter():
    setup = Setup(VL, prompts(VL, 5), processing(VL), {"sync": "adapter"}, lora=LoraSection(rank=4))
    yield setup
    setup.engine.close()


@pytest.fixture(params=["vl", "untied", "text_lora", "vl_adapter"])
def setup(request):
    made = request.getfixturevalue(request.param)
    made.restore()
    if made.engine.version != made.policy.version:
        made.engine.sync()
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampling_logprobs_equal_the_policy_forward(setup, temperature):
    groups = setup.generate(setup.prompts, 3, temperature=temperature)
    assert [len(group) for group in groups] == [3] * len(setup.prompts)
    assert setup.difference(setup.prompts, groups, temperature) < EXACT


def test_greedy_tokens_equal_the_reference_after_every_sync(setup):
    before = setup.greedy()
    sync = setup.move(setup.disturb)
    assert sync.megabytes > 0
    assert sync.seconds > 0
    assert setup.engine.version == setup.policy.version
    assert setup.greedy() != before
    groups = setup.generate(setup.prompts, 3)
    assert setup.difference(setup.prompts, groups) < EXACT
    setup.move(setup.restore)
    assert setup.greedy() == before


def test_new_vision_weights_are_seen_at_once(vl):
    """The engine keeps the features of pictures that it has seen."""
    pictured = [prompt for prompt in vl.prompts if prompt.images]
    before = vl.generate(pictured, 2)
    vl.move(lambda: vl.disturb(only="visual", size=1.0))
    assert vl.difference(pictured, before) > 0.01  # the change is one that can be seen
    after = vl.generate(pictured, 2)
    assert vl.difference(pictured, after) < EXACT
    vl.move(vl.restore)
    assert vl.generate(pictured, 2)[0][0].token_ids == before[0][0].token_ids
    assert vl.difference(pictured, vl.generate(pictured, 2)) < EXACT


@pytest.mark.parametrize("settings", [{"top_p": 0.6}, {"top_k": 2}, {"top_k": 3, "top_p": 0.7}])
def test_logprobs_are_of_the_distribution_sampled_from(untied, settings):
    """The first token of many samples occurs as often as its log-probability says."""
    settings = {"temperature": 2.0, "max_new_tokens": 1, **settings}
    prompt, count = untied.prompts[0], 2000
    with torch.no_grad():  # a flat distribution, so that there is something to cut
        untied.policy.hf.lm_head.weight.mul_(0.15)
    untied.policy.version += 1
    untied.engine.sync()
    try:
        group = untied.generate([prompt], count, **settings)[0]
        reference = engine(untied.policy).generate([prompt], count, sampling(**settings), [1])[0]
    finally:
        untied.move(untied.restore)
    expected = {each.token_ids[0]: each.logprobs[0] for each in reference}
    assert len(expected) > 1
    for token in {each.token_ids[0] for each in group}:
        values = [each.logprobs[0] for each in group if each.token_ids[0] == token]
        assert np.ptp(values) == 0
        if token in expected:
            assert values[0] == pytest.approx(expected[token], abs=EXACT)
        p = np.exp(values[0])
        assert len(values) / count == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / count) + 1e-9)


def test_samples_depend_on_their_seed(vl):
    def tokens(groups):
        return [[each.token_ids for each in group] for group in groups]

    def run(prompts, seeds):
        return tokens(vl.engine.generate(prompts, 4, sampling(), seeds))

    seeds = list(range(10, 10 + len(vl.prompts)))
    together = run(vl.prompts, seeds)
    assert run(vl.prompts, seeds) == together
    assert run(vl.prompts[2:3], seeds[2:3])[0] == together[2]
    assert run(vl.prompts, [seed + 100 for seed in seeds]) != together
    # Neighbouring seeds share nothing: vLLM itself would number samples by seed + index.
    first, second = run([vl.prompts[0]] * 2, [10, 11])
    assert first[1:] != second[:-1]


def test_the_process_keeps_its_random_state(untied):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    untied.generate(untied.prompts, 2)
    untied.engine.sync()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().tolist() == states[2]


def test_forbidden_ids_are_never_sampled(vl):
    forbidden = list(vl.processing.forbidden_ids)
    assert vl.processing.image_token_id in forbidden

    def favour():
        # Tied: the embeddings of ids that prompts hold too. Only this test's head matters.
        vl.policy.hf.get_output_embeddings().weight[forbidden] *= 50

    vl.move(favour)
    try:
        for temperature in (0.0, 1.0):
            groups = vl.generate(vl.prompts, 4, temperature=temperature)
            for each in (each for group in groups for each in group):
                assert not set(each.token_ids) & set(forbidden)
            assert vl.difference(vl.prompts, groups) < 10 * EXACT  # logits of hundreds
    finally:
        vl.move(vl.restore)


def test_finish_reason_limits_and_progress(untied):
    finished = []
    groups = untied.engine.generate(
        untied.prompts, 4, sampling(max_new_tokens=64), range(5), finished.append
    )
    assert sum(finished) == 20
    eos = untied.processing.eos_ids
    reasons = set()
    for each in (each for group in groups for each in group):
        ended = each.token_ids[-1] in eos
        reasons.add(each.finish_reason)
        assert each.finish_reason == ("stop" if ended else "length")
        assert ended or len(each.token_ids) == 64
        assert not set(each.token_ids[:-1]) & set(eos)
        assert each.text == untied.processing.decode(each.token_ids)
    assert "stop" in reasons
    short = untied.generate(untied.prompts, 2, max_new_tokens=2)
    assert {(each.finish_reason, len(each.token_ids)) for g in short for each in g} == {
        ("length", 2)
    }
    assert untied.generate([], 2) == []


def test_an_interrupted_call_leaves_nothing_behind(untied):
    def interrupt(finished):
        raise KeyboardInterrupt

    expected = untied.generate(untied.prompts, 2)
    with pytest.raises(KeyboardInterrupt):
        untied.engine.generate(untied.prompts, 2, sampling(), range(5), interrupt)
    assert untied.generate(untied.prompts, 2) == expected


def test_every_end_token_ends_a_completion(untied):
    """A checkpoint can name several; vLLM itself would know but one of these."""
    seen = untied.generate(untied.prompts, 1, temperature=0.0)
    extra = seen[0][0].token_ids[3]
    untied.engine._stop.append(extra)
    try:
        again = untied.generate(untied.prompts[:1], 1, temperature=0.0)[0][0]
    finally:
        untied.engine._stop.remove(extra)
    assert again.token_ids == seen[0][0].token_ids[: seen[0][0].token_ids.index(extra) + 1]
    assert again.finish_reason == "stop"


def test_greedy_group_is_one_completion_repeated(untied):
    group = untied.generate(untied.prompts[:1], 3, temperature=0.0)[0]
    assert len(group) == 3
    assert group[0] == group[1] == group[2]


def bad_prompts(setup):
    """(what the error says, the prompt) of each kind that vLLM would choke on."""
    pad = setup.processing.image_token_id
    good = next(prompt for prompt in setup.prompts if len(prompt.images) == 1)
    ids = good.token_ids
    first = int((ids == pad).nonzero()[0])
    none = {"pixel_values": None, "image_grid_thw": None, "mm_token_type_ids": None, "images": ()}
    short = torch.cat([ids[:first], ids[first + 1 :]])
    apart = ids.clone()
    apart[first], apart[0] = apart[0].item(), pad
    twice = {
        "images": good.images * 2,
        "image_grid_thw": good.image_grid_thw.repeat(2, 1),
        "pixel_values": good.pixel_values.repeat(2, 1),
    }
    smaller = good.images[0].resize((28, 28))
    text = next(prompt for prompt in setup.prompts if not prompt.images)
    return [
        ("image 0 has", replace(good, token_ids=ids[ids != pad])),
        ("placeholders, but no image", replace(good, **none)),
        ("image 1 has", replace(good, **twice)),
        ("2 images, but features of 1", replace(good, images=good.images * 2)),
        ("0 images, but features of 1", replace(good, images=())),
        ("image 0 has", replace(good, token_ids=short)),
        ("image 0 has", replace(good, token_ids=apart)),
        (
            "image placeholders for",
            replace(good, token_ids=torch.cat([ids, torch.tensor([pad])])),
        ),
        ("its features are of", replace(good, images=(smaller,))),
        ("is empty", replace(text, token_ids=text.token_ids[:0])),
        ("more than the engine's 384", replace(text, token_ids=text.token_ids.repeat(40))),
    ]


def test_bad_prompts_are_refused_and_the_engine_lives_on(vl):
    good = vl.prompts[:2]
    expected = [group[0].token_ids for group in vl.generate(good, 1, temperature=0.0)]
    cases = bad_prompts(vl)
    for message, bad in cases:
        bad = replace(bad, example=replace(bad.example, origin="data.jsonl row 7"))
        with pytest.raises(DataError, match=rf"data\.jsonl row 7.*{message}"):
            vl.generate([good[0], bad, good[1]], 2)
        prompts = [good[0], bad, good[1]]
        fit, refused = vl.engine.usable(prompts, max_new_tokens=24)
        assert (fit, list(refused)) == ([0, 2], [1])  # one bad row loses one row
        made = vl.generate([prompts[index] for index in fit], 1, temperature=0.0)
        assert [group[0].token_ids for group in made] == expected


def test_a_picture_for_a_text_model_is_refused(untied, vl):
    pictured = next(prompt for prompt in vl.prompts if prompt.images)
    with pytest.raises(DataError, match="text-only"):
        untied.generate([pictured], 1)


def test_room_for_the_completion_counts(untied):
    length = len(untied.prompts[0])
    group = untied.generate(untied.prompts[:1], 1, max_new_tokens=384 - length)[0]
    assert group[0].finish_reason in ("stop", "length")
    with pytest.raises(DataError, match=f"the prompt is {length} tokens"):
        untied.generate(untied.prompts[:1], 1, max_new_tokens=385 - length)


def test_temperatures_that_vllm_would_change_are_refused(untied):
    for temperature in (0.001, 2.5):
        with pytest.raises(ConfigError, match=f"temperature is {temperature}"):
            untied.generate(untied.prompts, 2, temperature=temperature)
    with pytest.raises(ValueError, match="1 seeds for 5 prompts"):
        untied.engine.generate(untied.prompts, 1, sampling(), [1])


def without(part):
    def weights(policy):
        return (pair for pair in full_weights(policy) if part not in pair[0])

    return weights


def with_unknown(policy):
    yield from full_weights(policy)
    yield "model.layers.0.self_attn.unknown.weight", torch.zeros(2)


def with_wrong_shape(policy):
    for name, tensor in full_weights(policy):
        yield name, tensor[:, :-1] if name.endswith("o_proj.weight") else tensor


@pytest.mark.parametrize(
    "weights",
    [without("norm.weight"), without("layers.1.self_attn.q_proj"), with_unknown, with_wrong_shape],
    ids=["missing", "part missing", "unknown", "wrong shape"],
)
def test_weights_must_fit_one_to_one(untied, weights):
    def load(worker):
        return vllm_common.load_weights_in_worker(worker, weights(untied.policy))

    with pytest.raises(EngineError, match="vLLM"):
        untied.engine._llm.collective_rpc(load)
    untied.engine.sync()
    untied.greedy()


def test_settings_that_cannot_work(untied):
    def start(**settings):
        make_engine(
            RolloutSection(engine="vllm", vllm=settings),
            untied.policy,
            untied.processing,
            batch_completions=8,
            max_tokens=64,
        )

    with pytest.raises(ConfigError, match=r"needs model\.lora"):
        start(sync="adapter")
    with pytest.raises(ConfigError, match="tensor_parallel is 3"):
        start(tensor_parallel=3)
    with pytest.raises(EngineError, match="cannot start"):
        start(options={"no_such_option": 1})
    vision = policy(VL, lora=LoraSection(rank=2, parts=("vision",)))
    with pytest.raises(ConfigError, match="use sync=merged"):
        make_engine(
            RolloutSection(engine="vllm", vllm={"sync": "adapter"}),
            vision,
            processing(VL),
            batch_completions=8,
            max_tokens=64,
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1  # vLLM would make this do nothing
    torch.set_num_threads(threads)


def test_several_processes():
    """One engine a process, then one over both: see `in_two_processes`."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    result = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ("separate, rank 0", "separate, rank 1", "together, rank 0", "together, rank 1"):
        assert f"{line}: as the reference" in result.stdout


def in_two_processes():
    """What each process of `test_several_processes` does: their prompts are not equally many."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = prompts(TEXT, 5)[:3] if rank == 0 else prompts(TEXT, 5)[3:]
    for name, parallel in (("separate", 1), ("together", 2)):
        setup = Setup(TEXT, mine, processing(TEXT), {"tensor_parallel": parallel})
        before = setup.greedy()
        setup.move(setup.disturb)
        assert setup.greedy() != before
        assert setup.difference(mine, setup.generate(mine, 2)) < EXACT
        setup.engine.close()
        torch.distributed.barrier()  # the group is still there
        print(f"{name}, rank {rank}: as the reference\n", end="", flush=True)
    torch.distributed.destroy_process_group()


def test_an_engine_with_lost_weights_samples_no_more(text_lora, monkeypatch):
    """The last test of this engine: afterwards it is closed."""
    made = text_lora.engine
    monkeypatch.setattr("mm_agrae.rollout.vllm.full_weights", without("norm.weight"))
    version = made.version
    text_lora.policy.version += 1
    with pytest.raises(EngineError, match=r"handing weights .* over failed: .*got no value"):
        made.sync()
    assert made.version == version
    for call in (made.sync, lambda: text_lora.generate(text_lora.prompts, 1)):
        with pytest.raises(EngineError, match="cannot be used any more"):
            call()
    made.close()
    made.close()
    with pytest.raises(EngineError, match="it was closed"):
        text_lora.generate(text_lora.prompts, 1)


if __name__ == "__main__":
    in_two_processes()
