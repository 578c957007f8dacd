"""vLLM over HTTP against the reference engine, with real server processes on the CPU.

The order matters: two servers of the picture model are shared, one is killed and comes back, and
both have ended before the text model's server starts.
"""

import contextlib
import importlib.util
import shutil
import signal
import socket

import psutil
import pytest
import requests
import torch
from helpers import TEXT, VL, engine, policy, processing, prompts, sampling
from servers import MAX_TOKENS, Server

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config.schema import LoraSection, RolloutSection, VllmSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.rollout import serve as serving
from mm_agrae.rollout.vllm_server import VllmServerEngine
from mm_agrae.rollout.vllm_worker import KEY_VARIABLE
from mm_agrae.types import Example

pytestmark = [pytest.mark.timeout(300)]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: mm-agrae[vllm]"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers of the picture model."""
    folder = tmp_path_factory.mktemp("servers")
    servers = [Server(folder, VL), Server(folder, VL)]
    yield servers
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.stop()


def connect(made, servers, *, batch_completions=64, max_tokens=MAX_TOKENS, overlap=False, **vllm):
    addresses = tuple(getattr(server, "address", server) for server in servers)
    settings = {"servers": addresses, "start_limit_s": 240.0, "request_limit_s": 60.0} | vllm
    rollout = RolloutSection(engine="vllm_server", overlap=overlap, vllm=VllmSection(**settings))
    return VllmServerEngine(
        made,
        processing(made.settings.path),
        rollout,
        batch_completions=batch_completions,
        max_tokens=max_tokens,
    )


def mixed_prompts():
    """Pictures of several sizes, two in one row, none in another."""
    from PIL import Image

    made = processing(VL)
    wide = Image.effect_noise((196, 56), 90).convert("RGB")
    small = Image.effect_noise((56, 84), 90).convert("RGB")
    rows = [("What?", (wide,)), ("And <image> or <image>, which?", (small, wide)), ("1+1?", ())]
    drawn = [made.prompt(Example(str(i), q, "1", images)) for i, (q, images) in enumerate(rows)]
    return prompts(VL, 3) + drawn


def gap(made, batch, groups) -> float:
    """Largest difference between the engine's log-probabilities and the policy's own."""
    rows = [UpdateRow(p, c, 0.0) for p, group in enumerate(groups) for c in group]
    micro = micro_batch(batch, rows, made.device)
    with torch.no_grad():
        logp_BT, _ = made.eval()(micro)
    return ((logp_BT - micro.sampling_logp_BT) * micro.mask_BT).abs().max().item()


def require_same_policy(made, served, batch):
    """Greedy tokens of both engines are the same, and so are the sampled ones' numbers."""
    seeds = range(len(batch))
    expected = engine(made).generate(batch, 1, sampling(temperature=0.0), seeds)
    found = served.generate(batch, 2, sampling(temperature=0.0), seeds)
    for (one,), (first, second) in zip(expected, found, strict=True):
        assert first.token_ids == second.token_ids == one.token_ids
        assert first.finish_reason == one.finish_reason
        assert first.text == one.text
    groups = served.generate(batch, 3, sampling(), seeds)
    assert gap(made, batch, groups) < 1e-4
    assert {c.policy_version for group in groups for c in group} == {made.version}


@torch.no_grad()
def disturb(module, scale=0.02):
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * scale)


def lost_once(caplog, server) -> bool:
    told = [r for r in caplog.records if f"{server.address} is lost" in r.getMessage()]
    return len(told) == 1


# ---------------------------------------------------------------------- without a server


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_server_that_never_gets_ready(kind):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if kind == "silent":
            silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match="mm-agrae serve") as caught:
            connect(policy(TEXT), [address], start_limit_s=1.5)
    assert address in str(caught.value)
    assert "start_limit_s" in str(caught.value)


def test_settings_that_cannot_work():
    with pytest.raises(EngineError, match="'localhost:8000' is no address"):
        connect(policy(TEXT), ["localhost:8000"])
    with pytest.raises(ConfigError, match=r"needs model\.lora"):
        connect(policy(TEXT), ["http://127.0.0.1:1"], sync="adapter")
    seeing = policy(VL, lora=LoraSection(rank=4, parts=("language", "vision")))
    with pytest.raises(ConfigError, match="language layers alone"):
        connect(seeing, ["http://127.0.0.1:1"], sync="adapter")


def test_serve_refuses_early(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        with pytest.raises(EngineError, match=f"cannot listen at 127.0.0.1:{port}"):
            serving.serve(TEXT, port=port)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="vLLM is not installed"):
        serving.serve(TEXT)


@pytest.mark.parametrize("key", ["", "a-secret"])
def test_addresses_that_others_can_reach_are_warned_of(key, monkeypatch, capsys):
    monkeypatch.setenv(KEY_VARIABLE, key)
    for host in ("127.0.0.1", "localhost", "::1"):
        serving._warn_if_open(host)
    assert capsys.readouterr().err == ""
    serving._warn_if_open("0.0.0.0")
    told = capsys.readouterr().err
    assert "can be reached from other machines" in told
    assert (f"set {KEY_VARIABLE}" in told) == (not key)
    assert "a-secret" not in told


def test_the_key_is_in_the_environment_and_not_on_the_command_line(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "a-secret")
    assert "a-secret" not in " ".join(serving.command_line(VL))
    assert serving.environment()[KEY_VARIABLE] == "a-secret"
    assert "--mm-processor-kwargs" not in serving.command_line(TEXT)
    assert serving.command_line(TEXT, lora_rank=9)[-1] == "16"
    with pytest.raises(EngineError, match="at most 512"):
        serving.command_line(TEXT, lora_rank=513)


# ---------------------------------------------------------------------- two servers


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_policys(pair, temperature):
    made, batch = policy(VL, temperature=temperature), mixed_prompts()
    served = connect(made, pair)
    assert served.version == -1
    sent = served.sync()
    assert served.version == made.version == 0
    assert sent.megabytes == pytest.approx(
        sum(t.nbytes for _, t in made.full_weights()) / 1e6, 0.01
    )
    told = []
    groups = served.generate(
        batch, 3, sampling(temperature=temperature), range(len(batch)), told.append
    )
    assert sum(told) == 3 * len(batch)
    assert [len(group) for group in groups] == [3] * len(batch)
    assert gap(made, batch, groups) < 1e-4
    eos = processing(VL).eos_ids
    for completion in (c for group in groups for c in group):
        ended = completion.token_ids[-1] in eos
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not set(completion.token_ids[:-1]) & set(eos)
        assert completion.text == processing(VL).decode(completion.token_ids)


@needs_vllm
def test_prompts_are_spread_and_samples_follow_the_seeds(pair):
    made, batch = policy(VL), prompts(VL, 8)
    served = connect(made, pair)
    served.sync()
    before = [server.requests_served() for server in pair]
    first = served.generate(batch, 2, sampling(), range(8))
    after = [server.requests_served() for server in pair]
    assert all(new >= old + 4 for old, new in zip(before, after, strict=True))
    again = served.generate(batch, 2, sampling(), range(8))
    other = served.generate(batch, 2, sampling(), range(100, 108))

    def ids(groups):
        return [[c.token_ids for c in group] for group in groups]

    assert ids(again) == ids(first) != ids(other)
    assert any(a.token_ids != b.token_ids for a, b in first)


@needs_vllm
def test_more_prompts_than_fit_into_one_pass(pair):
    """vLLM reads some of them in parts, which its CPU engine does not survive by itself."""
    made, batch = policy(VL), prompts(VL, 40)
    served = connect(made, pair[:1], batch_completions=320)
    served.sync()
    groups = served.generate(batch, 8, sampling(), range(40))
    assert gap(made, batch, groups) < 1e-4
    alone = served.generate(batch[36:], 8, sampling(), range(36, 40))
    assert [[c.token_ids for c in g] for g in alone] == [
        [c.token_ids for c in g] for g in groups[36:]
    ]


@needs_vllm
def test_three_syncs_old_new_old(pair):
    made, batch = policy(VL), mixed_prompts()
    served = connect(made, pair)
    served.sync()
    old = {name: tensor.clone() for name, tensor in made.hf.state_dict().items()}
    require_same_policy(made, served, batch)
    first = served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))

    # Only what becomes of pictures: caches of prompts and of features must both be emptied.
    disturb(made.hf.model.visual, 0.1)
    made.version = 1
    served.sync()
    require_same_policy(made, served, batch)
    pictured = served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))
    assert pictured[0][0].logprobs != first[0][0].logprobs
    assert pictured[-1][0].logprobs == pytest.approx(first[-1][0].logprobs, abs=1e-4)

    # The embedding is tied to the vocabulary head.
    disturb(made.hf.get_input_embeddings())
    made.version = 2
    served.sync()
    require_same_policy(made, served, batch)
    changed = served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))
    assert changed[-1][0].logprobs != pytest.approx(first[-1][0].logprobs, abs=1e-3)

    made.hf.load_state_dict(old)
    made.version = 3
    served.sync()
    require_same_policy(made, served, batch)
    back = served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))
    assert [g[0].token_ids for g in back] == [g[0].token_ids for g in first]


@needs_vllm
def test_merged_lora_reaches_the_servers(pair):
    made = policy(VL, lora=LoraSection(rank=4, parts=("language", "vision")))
    disturb(made.model, 0.01)
    served = connect(made, pair)
    served.sync()
    require_same_policy(made, served, mixed_prompts())


@needs_vllm
def test_weights_in_several_files(pair, monkeypatch):
    monkeypatch.setattr("mm_agrae.rollout.vllm_server.SHARD_BYTES", 1_000_000)
    made = policy(VL)
    disturb(made.hf)
    served = connect(made, pair)
    assert len(list(served._files())) > 3
    served.sync()
    require_same_policy(made, served, mixed_prompts())


@needs_vllm
def test_placeholder_ids_are_never_sampled(pair):
    made = policy(VL)
    forbidden = list(processing(VL).forbidden_ids)
    with torch.no_grad():  # make them by far the most probable ones
        made.hf.get_output_embeddings().weight[forbidden] *= 50
    served = connect(made, pair)
    served.sync()
    batch = prompts(VL, 3)
    for temperature in (0.0, 1.0):
        groups = served.generate(batch, 4, sampling(temperature=temperature), [1, 2, 3])
        assert not {t for group in groups for c in group for t in c.token_ids} & set(forbidden)
    assert gap(made, batch, groups) < 1e-4


@needs_vllm
def test_bad_prompts_are_refused_and_the_servers_live_on(pair):
    from dataclasses import replace

    made = policy(VL)
    served = connect(made, pair)
    served.sync()
    pictured, wordy = prompts(VL, 1)[0], mixed_prompts()[-1]
    bad = {
        "image without placeholder": replace(
            wordy, images=pictured.images, image_grid_thw=pictured.image_grid_thw
        ),
        "placeholder without image": replace(pictured, images=(), image_grid_thw=None),
        "too many images": replace(
            pictured,
            images=pictured.images * 2,
            image_grid_thw=pictured.image_grid_thw.repeat(2, 1),
        ),
        "too long": replace(wordy, token_ids=wordy.token_ids.repeat(40)),
    }
    for prompt in bad.values():
        with pytest.raises(DataError):
            served.generate([prompt], 2, sampling(), [1])
    batch = [pictured, *bad.values(), wordy]
    good, refused = served.usable(batch, 24)
    assert (good, sorted(refused)) == ([0, 5], [1, 2, 3, 4])
    require_same_policy(made, served, [batch[index] for index in good])


@needs_vllm
def test_a_row_that_a_server_refuses_loses_itself_alone(pair, caplog):
    from dataclasses import replace

    made, batch = policy(VL), mixed_prompts()
    served = connect(made, pair)
    served.sync()
    served.max_tokens = 10_000  # so that only the server knows
    long = replace(batch[-1], token_ids=batch[-1].token_ids.repeat(40))
    batch[2] = replace(long, example=replace(long.example, origin="data.jsonl:3"))
    groups = served.generate(batch, 2, sampling(), range(len(batch)))
    assert [len(group) for group in groups] == [2, 2, 0, 2, 2, 2]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "data.jsonl:3" in told[0]
    assert str(MAX_TOKENS) in told[0]
    with pytest.raises(DataError, match=r"data\.jsonl:3"):
        served.generate(batch[2:3], 2, sampling(), [1])


@needs_vllm
def test_a_server_that_does_not_fit_is_refused(pair):
    with pytest.raises(EngineError, match=r"architectures is .*Qwen2_5_VL.*, not .*Qwen2For"):
        connect(policy(TEXT), pair[:1])
    with pytest.raises(EngineError, match=f"takes {MAX_TOKENS} tokens, fewer than 257"):
        connect(policy(VL), pair[:1], max_tokens=257)
    with pytest.raises(EngineError, match="dtype is float32, not bfloat16"):
        connect(policy(VL), pair[:1], dtype="bfloat16")
    made = policy(VL)
    with pytest.raises(EngineError, match=r"at most 128 completions .* --max-num-seqs 129"):
        connect(made, pair[:1]).generate(prompts(VL, 1), 129, sampling(), [1])


@needs_vllm
def test_weights_of_another_run_are_noticed(pair, caplog):
    made, other = policy(VL), policy(VL)
    batch = mixed_prompts()
    mine, overlapping = connect(made, pair), connect(made, pair, overlap=True)
    overlapping.sync()
    mine.sync()
    disturb(other.hf)
    theirs = connect(other, pair[:1])
    theirs.sync()
    # The weights may be changing beside an overlapped rollout, so they are not sent in it.
    with pytest.raises(EngineError, match="holds other weights"):
        overlapping.generate(batch, 1, sampling(), range(len(batch)))
    require_same_policy(made, mine, batch)  # sent again before sampling
    require_same_policy(other, theirs, batch)

    # While sampling: the tag comes with every token.
    mine.sync()
    mine._servers[0].lost = "left out, so that the second alone is asked"
    changed = []

    def change(count):
        if not changed:
            changed.append(True)
            body = {"new_version": "other"}
            requests.post(f"{pair[1].address}/update_weight_version", json=body, timeout=10)

    mine.batch_completions = 1
    with pytest.raises(EngineError, match="holds other weights"):
        mine.generate(prompts(VL, 8), 1, sampling(), range(8), change)


@needs_vllm
def test_a_server_that_hangs(pair, caplog):
    made, batch = policy(VL), prompts(VL, 12)
    served = connect(made, pair, batch_completions=4, request_limit_s=8.0)
    served.sync()
    stopped = []

    def stop(count):
        if not stopped:
            stopped.append(True)
            pair[1].signal(signal.SIGSTOP)

    try:
        groups = served.generate(batch, 4, sampling(), range(12), stop)
    finally:
        pair[1].signal(signal.SIGCONT)
    assert [len(group) for group in groups] == [4] * 12
    assert gap(made, batch, groups) < 1e-4
    assert lost_once(caplog, pair[1])
    assert "no answer in 8 s" in served._servers[1].lost
    made.version = 1
    served.sync()
    assert not any(server.lost for server in served._servers)
    require_same_policy(made, served, batch[:2])


@needs_vllm
def test_a_server_is_killed_midway_and_comes_back(pair, caplog, tmp_path):
    made, batch = policy(VL), prompts(VL, 16)
    bystander = connect(made, pair)
    bystander.sync()
    served = connect(made, pair, batch_completions=8)
    served.sync()
    killed = []

    def kill(count):
        if not killed:
            killed.append(True)
            pair[1].signal(signal.SIGKILL)

    groups = served.generate(batch, 4, sampling(), range(16), kill)
    assert [len(group) for group in groups] == [4] * 16
    assert gap(made, batch, groups) < 1e-4
    assert lost_once(caplog, pair[1])

    disturb(made.hf)
    made.version = 1
    served.sync()  # one is enough
    assert [bool(server.lost) for server in served._servers] == [False, True]
    require_same_policy(made, served, batch[:3])
    assert lost_once(caplog, pair[1])

    pair[1].process.wait(60)
    pair[1] = Server(tmp_path, VL, port=pair[1].port)
    connect(made, pair)  # waits until it is ready
    made.version = 2
    served.sync()
    assert not any(server.lost for server in served._servers)
    assert f"{pair[1].address} is back" in caplog.text
    served._servers[0].lost = "left out, so that the second alone is asked"
    require_same_policy(made, served, batch[:3])

    # Another engine never saw it go: it finds the weights that a server starts with.
    bystander.version = made.version
    require_same_policy(made, bystander, batch[:3])


@needs_vllm
def test_all_servers_are_lost(pair, caplog):
    made, batch = policy(VL), prompts(VL, 24)
    served = connect(made, pair, batch_completions=4)
    served.sync()
    killed = []

    def kill(count):
        if not killed:
            killed.append(True)
            for server in pair:
                server.signal(signal.SIGKILL)

    with pytest.raises(EngineError, match="no vLLM server is left") as caught:
        served.generate(batch, 4, sampling(), range(24), kill)
    assert all(server.address in str(caught.value) for server in pair)
    for call in (served.sync, lambda: served.generate(batch, 4, sampling(), range(24))):
        with pytest.raises(EngineError, match="no vLLM server is left"):
            call()


# ---------------------------------------------------------------------- one server, with a key


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """The text model with a vocabulary head of its own."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(TEXT)
    shutil.copytree(TEXT, folder, dirs_exist_ok=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    disturb(model.lm_head)
    model.save_pretrained(folder)
    return str(folder)


@needs_vllm
@pytest.mark.slow
def test_untied_text_model_behind_a_key(untied, tmp_path, monkeypatch):
    server = Server(tmp_path, untied, key="a-secret")
    try:
        made, batch = policy(untied), prompts(TEXT, 4)
        head, embedding = made.hf.get_output_embeddings(), made.hf.get_input_embeddings()
        assert head.weight.data_ptr() != embedding.weight.data_ptr()
        with pytest.raises(EngineError, match=f"asks for a key; set {KEY_VARIABLE}"):
            connect(made, [server])
        for path in ("/collective_rpc", "/v1/completions", "/inference/v1/generate", "/pause"):
            assert requests.post(server.address + path, json={}, timeout=10).status_code == 401
        wrong = {"Authorization": "Bearer another"}
        path = f"{server.address}/mm_agrae/files/x/y"
        assert requests.put(path, data=b"", headers=wrong, timeout=10).status_code == 401
        right = {"Authorization": "Bearer a-secret"}
        for path in ("x/../../y", "x/.y", "x/a%2Fb", "x"):
            url = f"{server.address}/mm_agrae/files/{path}"
            assert requests.put(url, data=b"1", headers=right, timeout=10).status_code >= 400

        monkeypatch.setenv(KEY_VARIABLE, "a-secret")
        served = connect(made, [server])
        served.sync()
        old = {name: tensor.clone() for name, tensor in made.hf.state_dict().items()}
        require_same_policy(made, served, batch)
        disturb(head, 0.05)
        made.version = 1
        served.sync()
        require_same_policy(made, served, batch)
        disturb(made.hf)
        made.version = 2
        served.sync()
        require_same_policy(made, served, batch)
        made.hf.load_state_dict(old)
        made.version = 3
        served.sync()
        require_same_policy(made, served, batch)
    finally:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.stop()
    assert "ready: " + server.address in server.log.read_text()
    assert "a-secret" not in server.log.read_text()
    assert not list(tmp_path.glob("mm-agrae-weights-*"))
    assert not psutil.wait_procs(children, timeout=20)[1]


# ---------------------------------------------------------------------- one server for adapters


@needs_vllm
@pytest.mark.slow
def test_the_adapter_alone(tmp_path):
    made, batch = policy(VL, lora=LoraSection(rank=4)), mixed_prompts()
    server = Server(tmp_path, VL, lora_rank=4)
    try:
        with pytest.raises(EngineError, match=r"sync=adapter alone"):
            connect(made, [server])
        larger = policy(VL, lora=LoraSection(rank=9))
        with pytest.raises(EngineError, match=r"up to rank 8\. .*--lora-rank 9"):
            connect(larger, [server], sync="adapter")
        served = connect(made, [server], sync="adapter")
        learning = torch.nn.ParameterList(made.trainable_parameters())
        seen = []
        for version in range(3):
            made.version = version
            sent = served.sync()
            assert sent.megabytes < 0.2
            require_same_policy(made, served, batch)
            groups = served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))
            seen.append([group[0].logprobs for group in groups])
            disturb(learning, 0.02)
        assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))
        assert all(a != b for a, b in zip(seen[1], seen[2], strict=True))
    finally:
        server.stop()
