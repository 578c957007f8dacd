"""vLLM over HTTP against the reference engine, with real server processes on the CPU.

The order matters: two servers are shared, and the later tests kill them. A start takes a minute.
"""

import contextlib
import importlib.util
import signal
import socket
from dataclasses import replace

import psutil
import pytest
import torch
from comparing import (
    EXACT,
    disturb,
    favour_forbidden,
    flat,
    mixed_prompts,
    require_same_policy,
    require_same_samples,
    require_whole,
    tokens,
)
from helpers import TEXT, VL, policy, processing, prompts, sampling
from servers import KEY, MAX_TOKENS, Server
from training import require_same_greedy_evaluation, small_trainer

from mm_agrae.config.rollout import RolloutSection, VllmSection
from mm_agrae.config.schema import LoraSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.rollout import serve as serving
from mm_agrae.rollout import vllm_transfer
from mm_agrae.rollout.mismatch import measure
from mm_agrae.rollout.vllm_gate import KEY_VARIABLE
from mm_agrae.rollout.vllm_server import VllmServerEngine

pytestmark = [pytest.mark.timeout(300)]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: mm-agrae[vllm]"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers of the image model, both asking for a key that the trainer has."""
    folders = [tmp_path_factory.mktemp("server") for _ in range(2)]
    servers = [Server(folder, VL) for folder in folders]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        yield servers
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.stop()


def connect(made, servers, *, batch_completions=64, max_tokens=MAX_TOKENS, overlap=False, **vllm):
    addresses = tuple(getattr(server, "address", server) for server in servers)
    settings = {"servers": addresses, "start_limit_s": 240.0, "request_limit_s": 60.0} | vllm
    rollout = RolloutSection(engine="vllm_server", overlap=overlap, vllm=VllmSection(**settings))
    return VllmServerEngine(
        made, processing(made.settings.path), rollout, batch_completions=batch_completions, max_tokens=max_tokens
    )


def synced(made, servers, **settings):
    engine = connect(made, servers, **settings)
    engine.sync()
    return engine


def next_version(made, engine):
    made.version += 1
    return engine.sync()


def once(action):
    """An `on_progress` that acts at its first call."""
    left = [action]
    return lambda count: left and left.pop()()


def lost_once(caplog, server) -> bool:
    messages = [r for r in caplog.records if f"{server.address} is lost" in r.getMessage()]
    return len(messages) == 1


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


def test_settings_that_exclude_each_other():
    with pytest.raises(EngineError, match="'localhost:8000' is not an address"):
        connect(policy(TEXT), ["localhost:8000"])
    with pytest.raises(ConfigError, match=r"needs model\.lora"):
        connect(policy(TEXT), ["http://127.0.0.1:1"], sync="adapter")
    seeing = policy(VL, lora=LoraSection(rank=4, parts=("language", "vision")))
    with pytest.raises(ConfigError, match="language layers only"):
        connect(seeing, ["http://127.0.0.1:1"], sync="adapter")


def test_serve_refuses_early(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        with pytest.raises(EngineError, match=f"cannot listen at 127.0.0.1:{port}"):
            serving.serve([TEXT, "--port", str(port)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="vLLM is not installed"):
        serving.serve([TEXT])


@pytest.mark.parametrize("key", ["", KEY])
def test_addresses_that_others_can_reach_are_warned_of(key, monkeypatch, capsys):
    monkeypatch.setenv(KEY_VARIABLE, key)
    for host in ("127.0.0.1", "localhost", "::1"):
        serving._warn_if_open(host)
    assert capsys.readouterr().err == ""
    serving._warn_if_open("0.0.0.0")
    messages = capsys.readouterr().err
    assert "can be reached from other machines" in messages
    assert (f"set {KEY_VARIABLE}" in messages) == (not key)
    assert KEY not in messages


def test_the_server_command(monkeypatch):
    def command(*argv):
        return serving.command_line(serving.parse(argv))

    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert KEY not in " ".join(command(VL))
    assert serving.environment(serving.parse([VL]))[KEY_VARIABLE] == KEY
    assert "--mm-processor-kwargs" in command(VL)
    assert "--mm-processor-kwargs" not in command(TEXT)
    assert command(TEXT, "--lora-rank", "9")[-2:] == ["--max-lora-rank", "16"]
    assert command(TEXT, "--max-num-seqs", "512")[-2:] == ["--max-num-seqs", "512"]
    assert command(TEXT, "--", "--max-num-seqs", "512") == command(TEXT, "--max-num-seqs", "512")
    with pytest.raises(ConfigError, match="up to rank 512, not 513"):
        command(TEXT, "--lora-rank", "513")


# ---------------------------------------------------------------------- two servers


@needs_vllm
def test_every_path_but_health_needs_the_key(pair, monkeypatch):
    made = policy(VL)
    connect(made, pair)  # waits until both are ready
    for path in ("/collective_rpc", "/v1/completions", "/inference/v1/generate", "/pause"):
        assert pair[0].request("POST", path, key="another", json={}).status_code == 401
    files = "/mm_agrae/files"
    assert pair[0].request("PUT", f"{files}/x/y", key="another", data=b"").status_code == 401
    assert pair[0].request("GET", "/health", key="another").status_code == 200
    for path in ("x/../../y", "x/.y", "x/a%2Fb", "x"):
        assert pair[0].request("PUT", f"{files}/{path}", data=b"1").status_code >= 400
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(EngineError, match=f"asks for a key; set {KEY_VARIABLE}"):
        connect(made, pair)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_logprobs_equal_the_policy_forward(pair, temperature):
    made, batch = policy(VL, temperature=temperature), mixed_prompts(processing(VL), 3)
    served = connect(made, pair)
    assert served.version == -1
    sent = served.sync()
    assert served.version == made.version == 0
    size = sum(tensor.nbytes for _, tensor in made.full_weights())
    assert sent.megabytes == pytest.approx(size / 1e6, 0.01)
    messages = []
    groups = served.generate(batch, 3, sampling(temperature=temperature), range(len(batch)), messages.append)
    assert sum(messages) == 3 * len(batch)
    assert [len(group) for group in groups] == [3] * len(batch)
    assert measure(made, batch, groups).highest < EXACT
    require_whole(groups, processing(VL), 24)


@needs_vllm
def test_prompts_are_spread_and_samples_follow_the_seeds(pair):
    """More than fit into one pass: some are read in chunks, see `vllm_worker.fix_seeds`."""
    made, batch, seeds = policy(VL), prompts(VL, 40), range(40)
    served = synced(made, pair[:1], batch_completions=320)
    first = served.generate(batch, 8, sampling(), seeds)
    assert measure(made, batch, first).highest < EXACT
    assert any(group[0].token_ids != group[1].token_ids for group in first)

    served = synced(made, pair)
    before = [server.requests_served() for server in pair]
    again = served.generate(batch, 8, sampling(), seeds)
    after = [server.requests_served() for server in pair]
    # Several completions of one request count as several.
    assert all(new >= old + 10 for old, new in zip(before, after, strict=True))
    require_same_samples(again, first)
    other = served.generate(batch[:8], 8, sampling(), range(100, 108))
    assert tokens(other) != tokens(first[:8])


@needs_vllm
def test_every_sync_reaches_the_servers(pair, monkeypatch):
    made, batch = policy(VL), mixed_prompts(processing(VL), 2)
    served = synced(made, pair)
    old = {name: tensor.clone() for name, tensor in made.hf.state_dict().items()}

    def greedy_logprobs():
        return [group[0].logprobs for group in served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))]

    first = require_same_policy(made, served, batch)
    before = greedy_logprobs()
    # Only the vision tower: caches of prompts and of image features must both be emptied.
    disturb(made.hf.model.visual.parameters(), 0.1)
    next_version(made, served)
    require_same_policy(made, served, batch)
    after = greedy_logprobs()
    assert after[0] != before[0]
    assert after[-1] == pytest.approx(before[-1], abs=EXACT)  # a prompt without an image

    # The embedding is tied to the vocabulary head. Now in several files.
    monkeypatch.setattr(vllm_transfer, "SHARD_BYTES", 1_000_000)
    assert len(list(served.transfer.files())) > 3
    disturb(made.hf.get_input_embeddings().parameters())
    next_version(made, served)
    require_same_policy(made, served, batch)
    assert greedy_logprobs()[-1] != pytest.approx(before[-1], abs=1e-3)

    made.hf.load_state_dict(old)
    next_version(made, served)
    assert require_same_policy(made, served, batch) == first


@needs_vllm
def test_merged_lora_reaches_the_servers(pair):
    made = policy(VL, lora=LoraSection(rank=4, parts=("language", "vision")))
    disturb(made.model.parameters(), 0.01)
    require_same_policy(made, synced(made, pair), mixed_prompts(processing(VL), 1))


@needs_vllm
def test_placeholder_ids_are_never_sampled(pair):
    made, batch = policy(VL), prompts(VL, 3)
    favour_forbidden(made, processing(VL))
    served = synced(made, pair)
    for temperature in (0.0, 1.0):
        groups = served.generate(batch, 4, sampling(temperature=temperature), [1, 2, 3])
        used = {token for each in flat(groups) for token in each.token_ids}
        assert not used & set(processing(VL).forbidden_ids)
    assert measure(made, batch, groups).highest < EXACT


@needs_vllm
def test_prompts_that_are_refused(pair, caplog):
    made, batch = policy(VL), mixed_prompts(processing(VL), 2)
    served = synced(made, pair)
    long = replace(batch[-1], token_ids=batch[-1].token_ids.repeat(40))
    batch[2] = replace(long, example=replace(long.example, origin="data.jsonl:3"))
    with pytest.raises(DataError, match=r"data\.jsonl:3: the prompt is \d+ tokens"):
        served.generate(batch, 2, sampling(), range(len(batch)))  # before anything is sampled

    served.max_tokens = 10_000  # so that only the server knows: the row is lost alone
    groups = served.generate(batch, 2, sampling(), range(len(batch)))
    assert [len(group) for group in groups] == [2, 2, 0, 2, 2, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "data.jsonl:3" in messages[0]
    assert str(MAX_TOKENS) in messages[0]
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
    with pytest.raises(EngineError, match=r"at most 128 completions .* --max-num-seqs 129"):
        connect(policy(VL), pair[:1]).generate(prompts(VL, 1), 129, sampling(), [1])


@needs_vllm
def test_weights_of_another_run_are_noticed(pair):
    made, other = policy(VL), policy(VL)
    batch = mixed_prompts(processing(VL), 1)
    mine, overlapping = connect(made, pair), synced(made, pair, overlap=True)
    mine.sync()
    disturb(other.hf.parameters())
    theirs = synced(other, pair[:1])
    # The policy may be changing beside an overlapped rollout, so nothing is sent then.
    with pytest.raises(EngineError, match="holds other weights"):
        overlapping.generate(batch, 1, sampling(), range(len(batch)))
    require_same_policy(made, mine, batch)  # sent again before sampling
    require_same_policy(other, theirs, batch)

    # While sampling: the tag comes with every token.
    mine.sync()
    mine.servers.all[0].lost = "left out, so that only the second is asked"
    mine.batch_completions = 1

    def change():
        pair[1].request("POST", "/update_weight_version", json={"new_version": "other"})

    with pytest.raises(EngineError, match="holds other weights"):
        mine.generate(prompts(VL, 8), 1, sampling(), range(8), once(change))


@needs_vllm
def test_a_run_with_one_step_overlap(pair, tmp_path):
    """Sampling beside the update: one step behind, and weighted for it."""
    trainer = small_trainer(
        tmp_path, VL, "vllm_server",
        rollout={"overlap": True, "vllm": {"servers": [server.address for server in pair]}},
        update={"learning_rate": 5e-2},
        train={"steps": 4},
    )  # fmt: skip
    trainer.train()
    rows = trainer.run.read_metrics()
    assert [row["policy/lag"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["mismatch/mean_abs"] < 1e-5
    # The weights that sampled were another policy's; the ratio says by how much.
    assert all(row["mismatch/mean_abs"] > 1e-3 for row in rows[1:])
    assert trainer.collector.order.position == 4 * trainer.config.rollout.prompts_per_step
    require_same_greedy_evaluation(tmp_path, trainer)


# ---------------------------------------------------------------------- servers that get lost


@needs_vllm
def test_a_server_that_hangs(pair, caplog):
    made, batch = policy(VL), prompts(VL, 12)
    served = synced(made, pair, batch_completions=4, request_limit_s=8.0)
    try:
        groups = served.generate(batch, 4, sampling(), range(12), once(lambda: pair[1].signal(signal.SIGSTOP)))
    finally:
        pair[1].signal(signal.SIGCONT)
    assert [len(group) for group in groups] == [4] * 12
    assert measure(made, batch, groups).highest < EXACT
    assert lost_once(caplog, pair[1])
    assert "no answer in 8 s" in served.servers.all[1].lost
    next_version(made, served)
    assert len(served.servers.live()) == 2
    require_same_policy(made, served, batch[:2])


@needs_vllm
def test_a_server_is_killed_midway_and_comes_back(pair, caplog):
    made, batch = policy(VL), prompts(VL, 16)
    bystander = synced(made, pair)
    served = synced(made, pair, batch_completions=8)
    groups = served.generate(batch, 4, sampling(), range(16), once(lambda: pair[1].signal(signal.SIGKILL)))
    assert [len(group) for group in groups] == [4] * 16
    assert measure(made, batch, groups).highest < EXACT
    assert lost_once(caplog, pair[1])

    disturb(made.hf.parameters())
    next_version(made, served)  # one is enough
    assert [bool(server.lost) for server in served.servers.all] == [False, True]
    require_same_policy(made, served, batch[:3])
    assert lost_once(caplog, pair[1])

    pair[1].process.wait(60)
    pair[1] = Server(pair[1].folder, VL, port=pair[1].port)
    connect(made, pair)  # waits until it is ready
    next_version(made, served)
    assert len(served.servers.live()) == 2
    assert f"{pair[1].address} is back" in caplog.text
    served.servers.all[0].lost = "left out, so that only the second is asked"
    require_same_policy(made, served, batch[:3])

    # Another engine did not notice: it finds the weights that a server starts with.
    bystander.version = made.version
    require_same_policy(made, bystander, batch[:3])


@needs_vllm
def test_a_run_goes_on_when_one_of_two_servers_dies(pair, tmp_path, caplog):
    trainer = small_trainer(
        tmp_path, VL, "vllm_server",
        rollout={"vllm": {"servers": [server.address for server in pair]}},
        update={"learning_rate": 1e-2},
        train={"steps": 3},
    )  # fmt: skip
    sample = trainer.engine.generate

    def dying(*arguments, **options):
        if trainer.steps_done == 1:
            pair[0].signal(signal.SIGKILL)
        return sample(*arguments, **options)

    trainer.engine.generate = dying
    trainer.train()
    assert trainer.steps_done == 3
    assert pair[0].address in caplog.text
    require_same_greedy_evaluation(tmp_path, trainer)


@needs_vllm
def test_the_last_server_is_stopped(pair):
    made, batch = policy(VL), prompts(VL, 24)
    served = synced(made, pair[1:], batch_completions=4)
    children = psutil.Process(pair[1].process.pid).children(recursive=True)
    with pytest.raises(EngineError, match="no vLLM server is left") as caught:
        served.generate(batch, 4, sampling(), range(24), once(pair[1].stop))
    assert pair[1].address in str(caught.value)
    for call in (served.sync, lambda: served.generate(batch, 4, sampling(), range(24))):
        with pytest.raises(EngineError, match="no vLLM server is left"):
            call()
    # Nothing of it is left behind.
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not list(pair[1].folder.glob("mm-agrae-weights-*/*"))
    assert "ready: " + pair[1].address in pair[1].log.read_text()
    assert not any(KEY in server.log.read_text() for server in pair)


@needs_vllm
@pytest.mark.slow
def test_the_adapter_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    made, batch = policy(VL, lora=LoraSection(rank=4)), mixed_prompts(processing(VL), 1)
    server = Server(tmp_path, VL, "--lora-rank", "4")
    try:
        with pytest.raises(EngineError, match=r"its --lora-rank is for rollout\.vllm\.sync=adapter"):
            connect(made, [server])
        larger = policy(VL, lora=LoraSection(rank=9))
        with pytest.raises(EngineError, match=r"up to rank 8\. .*--lora-rank 9"):
            connect(larger, [server], sync="adapter")
        served = connect(made, [server], sync="adapter")
        learning = torch.nn.ParameterList(made.trainable_parameters())
        seen = []
        for version in range(3):
            made.version = version
            assert served.sync().megabytes < 0.2
            require_same_policy(made, served, batch)
            groups = served.generate(batch, 1, sampling(temperature=0.0), range(len(batch)))
            seen.append([group[0].logprobs for group in groups])
            disturb(learning.parameters())
        assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))
        assert all(a != b for a, b in zip(seen[1], seen[2], strict=True))
    finally:
        server.stop()
