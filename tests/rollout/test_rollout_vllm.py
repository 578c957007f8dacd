"""vLLM inside this process against the reference engine and the policy's own forward.

Every test samples with the real engine, on a CPU where there is no GPU.
"""

import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparing import (
    EXACT,
    favour_forbidden,
    flat,
    mixed_prompts,
    require_same_policy,
    require_same_samples,
    require_whole,
    tokens,
)
from helpers import ROOT, TEXT, VL, engine, policy, processing, prompts, sampling

from mm_agrae.config import LoraSection, ModelSection, PromptSection, RolloutSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.weights import full_weights
from mm_agrae.rollout.correction import _Draft
from mm_agrae.rollout.mismatch import measure
from mm_agrae.rollout.vllm import VllmEngine
from mm_agrae.rollout.vllm_worker import clear_inputs, load_weights
from mm_agrae.types import Group

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("vllm"),  # engines take seconds to start: one process for the file
]

LARGE_PIXELS = 4 * 112896
"""More than the checkpoint's own limit: images must not be made smaller a second time."""


class Setup:
    """A policy, its processing, its prompts and a vLLM engine."""

    def __init__(self, path, prompts, processing, settings=None, **model):
        torch.manual_seed(0)
        self.processing, self.prompts = processing, prompts
        self.policy = Policy(ModelSection(path=path, **model), processing).eval()
        self.engine = VllmEngine(
            self.policy,
            processing,
            RolloutSection(engine="vllm", vllm=settings or {}),
            batch_completions=64,
            max_tokens=384,
        )
        self.start = {name: value.clone() for name, value in self.policy.state_dict().items()}

    def generate(self, prompts, count, **settings):
        return self.engine.generate(prompts, count, sampling(**settings), range(len(prompts)))

    def difference(self, prompts, groups, temperature=1.0):
        """Largest |Δ log-prob| between the samples and the policy's forward on the same tokens."""
        self.policy.temperature = temperature
        return measure(self.policy, prompts, groups).highest

    def require_same_policy(self):
        self.policy.temperature = 1.0
        return require_same_policy(self.policy, self.engine, self.prompts)

    def move(self, change):
        """Change the weights and send them as the next version."""
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


@pytest.fixture(scope="module")
def vl():
    made = processing(VL, max_pixels=LARGE_PIXELS)
    setup = Setup(VL, mixed_prompts(made, 4), made)
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


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_sampling_logprobs_equal_the_policy_forward(setup, temperature):
    groups = setup.generate(setup.prompts, 3, temperature=temperature)
    assert setup.difference(setup.prompts, groups, temperature) < EXACT


def test_every_sync_reaches_the_engine(setup):
    before = setup.require_same_policy()
    sync = setup.move(setup.disturb)
    assert sync.megabytes > 0
    assert sync.seconds > 0
    assert setup.engine.version == setup.policy.version
    assert setup.require_same_policy() != before
    setup.move(setup.restore)
    assert setup.require_same_policy() == before


def test_new_vision_weights_are_seen_at_once(vl):
    """The engine caches the features of images that it has seen."""
    illustrated = [prompt for prompt in vl.prompts if prompt.images]
    before = vl.generate(illustrated, 2)
    vl.move(lambda: vl.disturb(only="visual", size=1.0))
    assert vl.difference(illustrated, before) > 0.01  # the change is one that can be seen
    after = vl.generate(illustrated, 2)
    assert vl.difference(illustrated, after) < EXACT
    vl.move(vl.restore)
    assert vl.generate(illustrated, 2)[0][0].token_ids == before[0][0].token_ids
    assert vl.difference(illustrated, vl.generate(illustrated, 2)) < EXACT


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
    def run(prompts, seeds):
        return vl.engine.generate(prompts, 4, sampling(), seeds)

    seeds = list(range(10, 10 + len(vl.prompts)))
    together = run(vl.prompts, seeds)
    assert run(vl.prompts, seeds) == together
    alone = [run([prompt], [seed])[0] for prompt, seed in zip(vl.prompts, seeds, strict=True)]
    require_same_samples(alone, together)
    assert tokens(run(vl.prompts, [seed + 100 for seed in seeds])) != tokens(together)
    # Neighbouring seeds share nothing: vLLM itself would number completions by seed + index.
    first, second = tokens(run([vl.prompts[0]] * 2, [10, 11]))
    assert first[1:] != second[:-1]


def test_the_process_keeps_its_random_state(untied):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    untied.generate(untied.prompts, 2)
    untied.engine.sync()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().tolist() == states[2]


def test_forbidden_ids_are_never_sampled(vl):
    assert vl.processing.image_token_id in vl.processing.forbidden_ids
    # Embeddings are tied to the head, those of ids in the prompts too: only the head matters here.
    vl.move(lambda: favour_forbidden(vl.policy, vl.processing))
    try:
        for temperature in (0.0, 1.0):
            groups = vl.generate(vl.prompts, 4, temperature=temperature)
            used = {token for each in flat(groups) for token in each.token_ids}
            assert not used & set(vl.processing.forbidden_ids)
            assert vl.difference(vl.prompts, groups) < 10 * EXACT  # logits of hundreds
    finally:
        vl.move(vl.restore)


def test_finish_reason_limits_and_progress(untied):
    finished = []
    groups = untied.engine.generate(untied.prompts, 4, sampling(max_new_tokens=64), range(5), finished.append)
    assert sum(finished) == 20
    require_whole(groups, untied.processing, 64, untied.policy.version)
    assert "stop" in {each.finish_reason for each in flat(groups)}
    short = flat(untied.generate(untied.prompts, 2, max_new_tokens=2))
    assert {(each.finish_reason, len(each.token_ids)) for each in short} == {("length", 2)}
    assert untied.generate([], 2) == []
    length = len(untied.prompts[0])  # room for the completion counts
    untied.generate(untied.prompts[:1], 1, max_new_tokens=384 - length)
    with pytest.raises(DataError, match=f"the prompt is {length} tokens"):
        untied.generate(untied.prompts[:1], 1, max_new_tokens=385 - length)


def test_a_completion_is_continued(vl):
    """From its own token ids, images unchanged, at the engine's very limit."""
    begun = vl.generate(vl.prompts, 1, max_new_tokens=8)
    groups = [Group(0, prompt, group, []) for prompt, group in zip(vl.prompts, begun, strict=True)]
    cue = vl.processing.encode(" So, ")
    prompts = [_Draft(g, 0, "", "", g.completions[0].token_ids, cue, 5, 0).prompt for g in groups]
    prompts[0] = replace(prompts[0], room=384 - len(prompts[0]))
    continued = vl.generate(prompts, 1, max_new_tokens=384)
    assert vl.difference(prompts, continued) < EXACT
    assert all(len(group[0].token_ids) <= prompt.room for group, prompt in zip(continued, prompts, strict=True))


def test_an_interrupted_call_leaves_nothing_behind(untied):
    def interrupt(finished):
        raise KeyboardInterrupt

    expected = untied.generate(untied.prompts, 2)
    with pytest.raises(KeyboardInterrupt):
        untied.engine.generate(untied.prompts, 2, sampling(), range(5), interrupt)
    assert untied.generate(untied.prompts, 2) == expected


def test_every_end_token_ends_a_completion(untied):
    """A checkpoint can name several, of which vLLM itself would know only one."""
    seen = untied.generate(untied.prompts, 1, temperature=0.0)
    extra = seen[0][0].token_ids[3]
    untied.engine.stop_ids.append(extra)
    try:
        again = untied.generate(untied.prompts[:1], 1, temperature=0.0)[0][0]
    finally:
        untied.engine.stop_ids.remove(extra)
    assert again.token_ids == seen[0][0].token_ids[: seen[0][0].token_ids.index(extra) + 1]
    assert again.finish_reason == "stop"


def bad_prompts(setup):
    """(what the error says, the prompt) for each kind that vLLM must not get."""
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
        ("image placeholders for 0 features", replace(good, **none)),
        ("image 1 has", replace(good, **twice)),
        ("2 images, but features of 1", replace(good, images=good.images * 2)),
        ("0 images, but features of 1", replace(good, images=())),
        ("image 0 has", replace(good, token_ids=short)),
        ("image 0 has", replace(good, token_ids=apart)),
        ("image placeholders for", replace(good, token_ids=torch.cat([ids, torch.tensor([pad])]))),
        ("its features are of", replace(good, images=(smaller,))),
        ("is empty", replace(text, token_ids=text.token_ids[:0])),
        ("more than the engine's 384", replace(text, token_ids=text.token_ids.repeat(40))),
    ]


def test_bad_prompts_are_refused_and_the_engine_lives_on(vl, untied):
    good = vl.prompts[:2]
    expected = tokens(vl.generate(good, 1, temperature=0.0))
    for message, bad in bad_prompts(vl):
        bad = replace(bad, example=replace(bad.example, origin="data.jsonl row 7"))
        with pytest.raises(DataError, match=rf"data\.jsonl row 7.*{message}"):
            vl.generate([good[0], bad, good[1]], 2)
    assert tokens(vl.generate(good, 1, temperature=0.0)) == expected
    with pytest.raises(DataError, match="text-only"):
        untied.generate([next(prompt for prompt in vl.prompts if prompt.images)], 1)


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
        return load_weights(worker, weights(untied.policy))

    with pytest.raises(EngineError, match="vLLM"):
        untied.engine._llm.collective_rpc(load)
    untied.engine.sync()
    untied.require_same_policy()


def test_dropped_weights_come_back_before_anything_is_sampled(untied):
    """Asleep at level 2, which needs a GPU, vLLM's weights are lost; here they are overwritten."""

    def drop(worker):
        for parameter in worker.model_runner.get_model().parameters():
            parameter.data.fill_(float("nan"))

    untied.engine._llm.collective_rpc(drop)
    untied.engine._dropped = True
    untied.require_same_policy()
    assert not untied.engine._dropped


def test_inputs_that_a_gpu_keeps_among_its_weights_are_cleared():
    """vLLM's own state of rotary positions, with what memory may hold after it was dropped."""
    from vllm.v1.worker.gpu.mm.rope import RopeState

    options = {"num_dims": 3, "max_num_reqs": 2, "max_num_tokens": 8, "max_model_len": 16}
    try:
        rope = RopeState(**options, device=torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(f"vLLM makes it on a GPU only: {error}")
    rope.positions.fill_(1 << 60)
    head = torch.nn.Linear(2, 2)
    state = SimpleNamespace(rope_state=rope, encoder_runner=None, model=head)
    clear_inputs(SimpleNamespace(model_runner=SimpleNamespace(model_state=state)))
    assert not rope.positions.any()
    assert head.weight.any()


def test_vllm_chooses_how_many_sequences_it_samples_at_once(untied):
    engine, scheduler = untied.engine, untied.engine._llm.llm_engine.vllm_config.scheduler_config
    assert scheduler.max_num_seqs == 256  # vLLM's default on a CPU; batch_completions is 64
    engine.settings = engine.settings.model_copy(update={"max_num_seqs": 7})
    assert engine._options(cpu=True)["max_num_seqs"] == 7
    engine.settings = engine.settings.model_copy(update={"max_num_seqs": None})


def test_settings_that_cannot_work(untied):
    def start(setup=untied, **settings):
        rollout = RolloutSection(engine="vllm", vllm=settings)
        VllmEngine(setup.policy, setup.processing, rollout, batch_completions=8, max_tokens=64)

    with pytest.raises(ConfigError, match=r"needs model\.lora"):
        start(sync="adapter")
    with pytest.raises(ConfigError, match="tensor_parallel is 3"):
        start(tensor_parallel=3)
    with pytest.raises(EngineError, match="cannot start"):
        start(options={"no_such_option": 1})
    vision = policy(VL, lora=LoraSection(rank=2, parts=("vision",)))
    with pytest.raises(ConfigError, match="use sync=merged"):
        start(SimpleNamespace(policy=vision, processing=processing(VL)), sync="adapter")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1  # vLLM would make this do nothing
    torch.set_num_threads(threads)


def test_several_processes():
    """One engine a process, then one over both: see `in_two_processes`."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    folders = [ROOT, ROOT / "tests", Path(__file__).parent]
    result = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, timeout=240,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ("separate, rank 0", "separate, rank 1", "together, rank 0", "together, rank 1"):
        assert f"{line}: as the reference" in result.stdout


def in_two_processes():
    """What each process of `test_several_processes` does, with unequal numbers of prompts."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = prompts(TEXT, 5)[:3] if rank == 0 else prompts(TEXT, 5)[3:]
    for name, parallel in (("separate", 1), ("together", 2)):
        setup = Setup(TEXT, mine, processing(TEXT), {"tensor_parallel": parallel})
        before = setup.require_same_policy()
        setup.move(setup.disturb)
        assert setup.require_same_policy() != before
        setup.engine.close()
        torch.distributed.barrier()  # the group is still there
        print(f"{name}, rank {rank}: as the reference\n", end="", flush=True)
    torch.distributed.destroy_process_group()


def test_an_engine_with_lost_weights_samples_no_more(text_lora, monkeypatch):
    """The last test of this engine: afterwards it is closed."""
    made = text_lora.engine
    monkeypatch.setattr("mm_agrae.rollout.vllm_common.full_weights", without("norm.weight"))
    version = made.version
    text_lora.policy.version += 1
    with pytest.raises(EngineError, match=r"loading the weights .* failed: .*got no value"):
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
