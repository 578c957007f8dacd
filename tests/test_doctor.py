"""The memory estimate against what a model really holds; doctor's report on what is missing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TEXT, VL, engine, examples, policy, processing, run_config

from mm_agrae import config as configs
from mm_agrae import doctor
from mm_agrae.errors import ConfigError
from mm_agrae.model import activations, memory
from mm_agrae.model.policy import Policy
from mm_agrae.model.size import find_model_config, measure
from mm_agrae.progress import Reporter
from mm_agrae.trainer import check_device
from mm_agrae.types import MicroBatch

SHAPES = Path(__file__).parent.parent / "data" / "model_shapes"
PAPER = Path(__file__).parent.parent / "configs" / "paper"
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
}
LORA = {"lora": {"rank": 4, "alpha": 8}}
SETTINGS = {
    "full": {},
    "frozen": {"freeze": ["vision", "embeddings"]},
    "lora": LORA,
    "lora_vision": {"lora": {"rank": 4, "alpha": 8, "parts": ["language", "vision", "merger"]}},
    "bf16": {"dtype": "bfloat16"},
    "bf16_lora": {"dtype": "bfloat16", **LORA},
}


def size_of(config):
    return measure(config, find_model_config(config.model.path)[0])


def batch_of(made, path, completions=2, length=6):
    prompt = processing(path).prompt(examples(path, 1)[0])
    ones = torch.ones(completions, length)
    return MicroBatch(
        prompts=[prompt],
        prompt_index_B=torch.zeros(completions, dtype=torch.long),
        token_BT=torch.randint(20, 200, (completions, length)),
        mask_BT=ones,
        advantage_B=torch.ones(completions),
        sampling_logp_BT=-ones,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    file = SHAPES / f"{name.replace('/', '--')}.json"
    found, source = find_model_config(name)
    assert source == "the published shape"
    assert measure(run_config("x", name), found).parameters == PUBLISHED[name]
    assert json.loads(file.read_text())["architectures"][0] == type_of(found)


def type_of(found):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForImageTextToText if hasattr(found, "vision_config") else AutoModelForCausalLM
    return loader._model_mapping[type(found)].__name__


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_gradients_and_optimiser_are_exact(name, tmp_path):
    config = run_config(tmp_path, VL, model=SETTINGS[name])
    made = policy(VL, **config.model.model_dump(exclude={"path"}, mode="python"))
    size = size_of(config)
    parameters = list(made.model.parameters())
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.trainable == sum(p.numel() for p in made.trainable_parameters())
    assert size.weight_bytes == sum(p.numel() * p.element_size() for p in parameters)
    optimizer = torch.optim.AdamW(made.trainable_parameters())
    logp_BT, _ = made(batch_of(made, VL))
    logp_BT.sum().backward()
    optimizer.step()
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = memory.estimate(config, size, device="cpu")
    assert found.update["gradients"] == sum(g.numel() * g.element_size() for g in gradients)
    moments = [
        value for state in optimizer.state.values() for key, value in state.items() if key.startswith("exp_avg")
    ]
    held = sum(m.numel() * m.element_size() for m in moments)
    assert found.always["optimiser (Adam)"] == held


@pytest.mark.parametrize("name", ["full", "lora", "bf16", "bf16_lora"])
@pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
def test_the_cache_is_exact(path, name, tmp_path):
    config = run_config(tmp_path, path, model=SETTINGS[name])
    made = policy(path, **config.model.model_dump(exclude={"path"}, mode="python"))
    made.eval()
    prompt = processing(path).prompt(examples(path, 1)[0])
    with torch.no_grad(), made.autocast():
        _, cache, *_ = engine(made)._prefill([prompt], 3)
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    size = size_of(config)
    element = memory.kv_element_bytes(config, size, cuda=False)
    assert memory.kv_cache_bytes(size, 3, len(prompt), element) == held


def test_a_sliding_window_keeps_no_more_than_itself():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    found = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=64, sliding_window=8, layer_types=kinds,
    )  # fmt: skip
    model = Gemma3ForCausalLM(found).eval()
    size = measure(run_config("x", TEXT), found)
    for length in (5, 20):
        with torch.no_grad():
            cache = model(torch.ones(2, length, dtype=torch.long), use_cache=True).past_key_values
        held = sum(4 * (la.keys.numel() + la.values.numel()) for la in cache.layers)
        assert memory.kv_cache_bytes(size, 2, length, 4) == held


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random Qwen2 with the embedded tokenizer, wide enough for activations to matter."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    processing(TEXT).save(str(folder))
    own = json.loads((Path(TEXT) / "config.json").read_text())
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=own["vocab_size"], tie_word_embeddings=True,
            eos_token_id=own.get("eos_token_id"),
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["full", "lora", "bf16", "bf16_lora"])
def test_kept_activations(name, checkpointing, qwen, tmp_path, monkeypatch):
    """What autograd holds between forward and backward, tensor by tensor: within a fifth."""
    sections = SETTINGS[name] | {"gradient_checkpointing": checkpointing}
    group, length = 4, 128
    config = run_config(
        tmp_path, qwen, model=sections, prompt={"max_tokens": 256},
        rollout={"completions_per_prompt": group, "max_new_tokens": length},
        update={"micro_batch_completions": group},
    )  # fmt: skip
    made = Policy(config.model, processing(TEXT), shared_prompt="on")
    made.train()
    batch = batch_of(made, TEXT, group, length)
    prompt = batch.prompts[0]
    prompt = type(prompt)(prompt.example, "", torch.randint(20, 200, (256,)))
    batch.prompts[0] = prompt
    weights = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    held, kept, pack = {}, [], activations._pack

    def counting(tensor):
        packed = pack(tensor)
        if isinstance(packed, torch.Tensor):
            kept.append(packed)
            held[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
        return packed

    monkeypatch.setattr(activations, "_pack", counting)
    made(batch)
    measured = sum(size for address, size in held.items() if address not in weights)
    size = size_of(config)
    tokens = memory.micro_batch_tokens(config)
    assert tokens.tokens == 256 + group * length
    assert tokens.predicted == group * length
    expected = memory.kept_activations(config, size, tokens, cuda=False)
    if config.model.dtype == "bfloat16" and not checkpointing:
        expected += 2 * size.cast_parameters
    assert measured == pytest.approx(expected, rel=0.15)


def test_more_processes_and_a_reference_take_more(tmp_path):
    config = run_config(tmp_path, VL)
    size = size_of(config)
    one = memory.estimate(config, size)
    many = memory.estimate(config, size, processes=8)
    # DDP's buckets hold the gradients, in the rollout as well.
    added = sum(many.always.values()) - sum(one.always.values())
    assert added == 4 * size.trainable == one.update["gradients"]
    assert sum(many.update.values()) + added == sum(one.update.values())
    anchored = run_config(tmp_path, VL, update={"kl_coef": 0.01})
    assert memory.estimate(anchored, size).peak - one.peak == size.weight_bytes
    adapted = run_config(tmp_path, VL, update={"kl_coef": 0.01}, model=LORA)
    assert "reference model" not in memory.estimate(adapted, size_of(adapted)).always


def test_vllm_takes_its_share_asleep_or_not(tmp_path):
    def found(**vllm):
        config = run_config(tmp_path, VL, rollout={"engine": "vllm", "vllm": vllm})
        return memory.estimate(config, size_of(config), device_bytes=1000)

    asleep, awake = found(memory_fraction=0.5), found(memory_fraction=0.5, sleep=False)
    assert 500 in asleep.rollout.values()
    assert 500 in awake.always.values()
    assert 500 not in awake.rollout.values()


def run_of(name, *overrides):
    """A recipe of configs/paper; overlays of configs/with by name."""
    overlays = [str(PAPER.parent / "with" / f"{each}.yaml") if each.isidentifier() else each for each in overrides]
    return configs.load(PAPER / f"{name}.yaml", overlays, for_gpus=True)


def verdict(config, gpus, gib):
    sharded = doctor.parallel_strategy(config, gpus) == "fsdp2"
    options = {"processes": gpus, "device_bytes": int(gib * doctor.GIB), "sharded": sharded}
    return memory.judge(config, size_of(config), **options)


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPER.glob("*.yaml")))
def test_what_fits_where(name):
    """Every recipe in the parallel mode that the scripts choose; GPUs as torch reports them."""
    fits = {
        (gpus, gib, *overrides): verdict(run_of(name, *overrides), gpus, gib).reasons == []
        for gpus, gib, *overrides in [
            (8, 79.2), (1, 79.2), (1, 79.2, "rollout.vllm.memory_fraction=0.4"), (8, 79.2, "lora_80gb"),
            (1, 79.2, "lora_80gb"), (1, 22.0, "lora_24gb"), (1, 22.0, "lora_24gb", "rollout.engine=hf"),
        ]
    }  # fmt: skip
    small = name.endswith("3b")
    assert list(fits.values()) == [True, False, small, True, True, small, True]


def test_the_share_of_vllm_holds_weights_profile_run_and_a_group():
    """0.2 of an H100 are 15.8 GiB, and the 7B model's weights alone 15.4: vLLM finds no room for a block."""
    config = run_of("geometry3k_qwen2.5_vl_7b", "rollout.vllm.memory_fraction=0.2")
    found = verdict(config, 8, 79.2)
    assert found.vllm.weights == 2 * PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"] > 0.97 * found.vllm.share
    assert found.estimate.peak < found.usable
    assert [reason.split(":")[0] for reason in found.reasons] == [
        "vLLM's share (rollout.vllm.memory_fraction) is too small"
    ]
    for sequences in (config.rollout.completions_per_prompt, 1):
        # 28 layers, 4 heads of 128 keys and values in 16 bits; prompts and completions of 2,048 tokens.
        assert found.vllm.cache >= sequences * 28 * 2 * 4 * 128 * 2 * 4096
    fitting = memory.remedies(config, size_of(config), processes=8, device_bytes=int(79.2 * doctor.GIB), sharded=True)
    fraction = float(fitting[0].split("memory_fraction=")[1])
    least = found.vllm.least / doctor.GIB / 79.2
    assert least <= fraction < least + 0.01
    # A long evaluation needs its own cache, a smaller batch less of a profile run.
    long = verdict(run_of("geometry3k_qwen2.5_vl_7b", "evaluate.max_new_tokens=30000"), 8, 79.2).vllm
    assert long.cache > found.vllm.cache
    few = "rollout.vllm.options={max_num_batched_tokens: 2048, max_num_seqs: 64}"
    assert verdict(run_of("geometry3k_qwen2.5_vl_7b", few), 8, 79.2).vllm.profile < found.vllm.profile
    half = verdict(run_of("geometry3k_qwen2.5_vl_7b", "rollout.vllm.tensor_parallel=2"), 8, 79.2).vllm
    assert half.weights == found.vllm.weights // 2


def test_a_run_that_does_not_fit_is_refused_with_what_would_help(tmp_path, monkeypatch):
    config = run_of("math_qwen2.5_math_7b")
    with pytest.raises(ConfigError) as error:
        memory.require_fit(config, processes=8, device_bytes=int(79.2 * doctor.GIB), sharded=False)
    for expected in ("peak 153.1 GiB of 72.8 GiB", "train.check_memory=false", "PARALLEL=fsdp2", "model.lora="):
        assert expected in str(error.value)
    memory.require_fit(config, processes=8, device_bytes=int(79.2 * doctor.GIB), sharded=True)
    nowhere = run_config(tmp_path, "no/such-model")
    memory.require_fit(nowhere, processes=1, device_bytes=1, sharded=False)  # loading it will say more


def test_only_a_gpu_is_checked_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    def check(device, **sections):
        strategy = SimpleNamespace(sharded=False, offloads=False)
        processes = SimpleNamespace(device=torch.device(device), strategy=strategy, world=1)
        check_device(run_config(tmp_path, VL, **sections), processes, Reporter())
        return capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=doctor.GIB))
    assert check("cpu", model={"dtype": "float32"}) == ""
    with pytest.raises(ConfigError, match="does not fit GPUs of 1"):
        check("cuda")
    assert check("cuda", train={"check_memory": False}) == ""
    slow = check("cuda", train={"check_memory": False}, model={"dtype": "float32"})
    assert "several times slower" in slow


@pytest.mark.parametrize(
    ("gpus", "environment", "overrides", "expected"),
    [
        (8, {}, (), ("8", "fsdp2", "4")),
        (8, {}, ("lora_80gb",), ("8", "multi_gpu", "4")),
        (8, {"PARALLEL": "multi_gpu", "OMP_NUM_THREADS": "3"}, (), ("8", "multi_gpu", "3")),
        (8, {"PROCESSES": "1", "PARALLEL": "fsdp2"}, (), ("1", "one", "8")),
        (1, {}, (), ("1", "one", "8")),
        (0, {}, (), ("1", "one", "1")),
        (0, {"PROCESSES": "2"}, (), ("2", "multi_gpu", "1")),
        (0, {"PROCESSES": "02"}, (), ("2", "multi_gpu", "1")),
        (64, {}, (), ("64", "fsdp2", "1")),
    ],
)
def test_how_the_scripts_launch(gpus, environment, overrides, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: range(32))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    plan = doctor.launch_plan(run_of("math_llama_3.2_3b", *overrides), environment)
    assert plan == (expected[0], str(gpus), *expected[1:], "vllm")
    assert doctor.launch_plan(run_of("math_llama_3.2_3b", "rollout.engine=hf"), {})[-1] == ""
    with pytest.raises(ConfigError, match="PROCESSES=two"):
        doctor.launch_plan(run_of("math_llama_3.2_3b"), {"PROCESSES": "two"})


def test_an_adapter_is_launched_as_lora(tmp_path):
    made = policy(VL, **run_config(tmp_path, VL, model=LORA).model.model_dump(exclude={"path"}, mode="python"))
    made.model.save_pretrained(tmp_path / "adapter")
    assert doctor.parallel_strategy(run_config(tmp_path, str(tmp_path / "adapter")), 2) == "multi_gpu"
    assert doctor.parallel_strategy(run_config(tmp_path, VL), 2) == "fsdp2"


def test_the_documented_table_is_doctors(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER.parents[1] / "scripts"))
    import recipe_table

    text = recipe_table.DOCUMENT.read_text(encoding="utf-8")
    written = text.split(recipe_table.BEGIN)[1].split(recipe_table.END)[0]
    assert written == recipe_table.table(), "run python scripts/recipe_table.py"


def test_suggestions_fit_and_none_is_superfluous():
    config = configs.load(PAPER / "geometry3k_qwen2.5_vl_3b.yaml", ["rollout.engine=hf"])
    size, device_bytes = size_of(config), 80 * doctor.GIB
    limit = memory.usable_bytes(config, device_bytes, 8)
    assert memory.estimate(config, size, processes=8).peak > limit
    changes, after = memory.suggest(config, size, processes=8, device_bytes=device_bytes)
    assert after.estimate.peak <= limit

    def peak(overrides):
        changed = configs.load(PAPER / "geometry3k_qwen2.5_vl_3b.yaml", ["rollout.engine=hf", *overrides])
        return memory.estimate(changed, size_of(changed), processes=8).peak

    assert peak(changes) == after.estimate.peak
    for left_out in changes:
        assert peak([change for change in changes if change != left_out]) > limit


@pytest.mark.parametrize(
    "name", ["math_llama_3.2_3b", "geometry3k_qwen2.5_vl_3b", "math_qwen2.5_math_7b", "geometry3k_qwen2.5_vl_7b"]
)
@pytest.mark.parametrize("overlays", [(), ("lora_80gb",)], ids=["full", "lora_80gb"])
def test_what_fits_24_gb_with_lora_is_suggested(name, overlays):
    config = run_of(name, *overlays)
    size, options = size_of(config), {"processes": 1, "device_bytes": 24 * doctor.GIB, "sharded": False}
    if memory.judge(config, size, **options).reasons:
        changes, _ = memory.suggest(config, size, **options)
        changed = run_of(name, *overlays, *changes)
        assert memory.judge(changed, size_of(changed), **options).reasons == []


def test_nothing_is_suggested_where_nothing_helps():
    config = configs.load(PAPER / "math_qwen2.5_math_7b.yaml")
    device_bytes = 8 * doctor.GIB
    assert memory.suggest(config, size_of(config), processes=1, device_bytes=device_bytes) is None


def report(capsys, config, **options):
    problems = doctor.examine(config, **options)
    return problems, " ".join(capsys.readouterr().out.split())


def test_a_run_that_can_start(capsys, tmp_path):
    problems, text = report(capsys, run_config(tmp_path / "run", VL), gpus=1, gpu_memory=8.0)
    assert problems == 0, text
    for expected in (
        "full tuning", "train synthetic: 8,192 rows", "per step: 4 prompts × 4", "KV cache",
        "tokenizer", "checkpoints of", "nothing stands in the way",
    ):  # fmt: skip
        assert expected in text
    assert not (tmp_path / "run").exists()


def test_everything_that_is_missing_is_named_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configs.load(PAPER / "geometry3k_qwen2.5_vl_3b.yaml", ["rollout.engine=vllm"])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    problems, text = report(capsys, config, gpus=8, gpu_memory=40)
    assert problems >= 6
    for expected in (
        "hf download Qwen/Qwen2.5-VL-3B-Instruct", "3,754,622,976 parameters",
        "train geometry3k:", "evaluate mathverse:", "pip install 'mm-agrae[vllm]'",
        "per step: 512 prompts × 5 completions = 2560 on 8 processes", "problems to fix",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"path": "no/such-model"}}, "no config.json there"),
        ({"model": {"freeze": ["merger", "language", "vision"]}}, None),
        ({"data": {"train": [{"task": "files", "path": "absent.jsonl"}]}}, "absent.jsonl"),
    ],
)
def test_one_thing_missing_does_not_hide_the_rest(capsys, tmp_path, change, expected):
    problems, text = report(capsys, run_config(tmp_path / "run", VL, **change))
    assert problems == (expected is not None), text
    assert expected is None or expected in text
    assert "disk" in text
    assert "per step" in text


def test_a_folder_without_weights_and_one_with_a_shard_missing(capsys, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(VL, folder)
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in report(capsys, run_config(tmp_path / "r", str(folder)))[1]
    index = {"weight_map": {"a": "model-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001.safetensors missing" in report(capsys, run_config(tmp_path / "r", str(folder)))[1]
    (folder / "config.json").write_text("{not json")
    assert report(capsys, run_config(tmp_path / "r", str(folder)))[0] >= 1


def test_an_adapter_is_counted_on_its_base(tmp_path, capsys):
    config = run_config(tmp_path / "run", VL, model=LORA)
    made = policy(VL, **config.model.model_dump(exclude={"path"}, mode="python"))
    folder = tmp_path / "adapter"
    made.model.save_pretrained(folder)
    processing(VL).save(str(folder))
    found = run_config(tmp_path / "run", str(folder))
    size = measure(found, find_model_config(VL)[0])
    assert size.rank == 4
    assert size.trainable == sum(p.numel() for p in made.trainable_parameters())
    assert "LoRA of rank 4" in report(capsys, found)[1]


def test_more_tokens_than_positions_is_noted(capsys, tmp_path):
    config = run_config(tmp_path, VL, evaluate={"max_new_tokens": 1_000_000})
    assert "more than the model's" in report(capsys, config)[1]


@pytest.mark.parametrize("name", ["full", "frozen", "bf16_lora"])
def test_shards_are_what_fsdp2_would_keep(name, tmp_path):
    config = run_config(tmp_path, VL, model=SETTINGS[name])
    made = policy(VL, **config.model.model_dump(exclude={"path"}, mode="python"))
    size = size_of(config)

    def total(parameters):
        return sum(p.numel() * p.element_size() for p in parameters)

    tower = [] if made.update_runs_vision else list(made.backbone.visual.parameters())
    assert size.unsharded == total(tower)
    in_layers = {id(p) for layer in layers_of(made) for p in layer.parameters()}
    rest = {p for p in made.model.parameters() if id(p) not in in_layers} - set(tower)
    assert size.root.bytes == total(rest)
    assert size.layer.bytes == max(total(set(layer.parameters()) - set(tower)) for layer in layers_of(made))
    found = memory.estimate(config, size, processes=2, device="cpu", sharded=True)
    assert found.always["weights"] == (size.weight_bytes - size.unsharded) // 2 + size.unsharded
    assert found.always["optimiser (Adam)"] == 4 * size.trainable
    assert found.rollout["gathered weights"] + size.unsharded == size.weight_bytes


def layers_of(made):
    names = made.hf._no_split_modules
    return [module for module in made.model.modules() if type(module).__name__ in names]


def test_full_tuning_of_7b_fits_only_if_it_is_spread(capsys):
    config = configs.load(PAPER / "geometry3k_qwen2.5_vl_7b.yaml")
    doctor.examine(config, gpus=8, gpu_memory=80)
    assert "model sharded by FSDP2" in (text := capsys.readouterr().out)
    assert "sequences at once" in text
    assert "usable (the rest is left to CUDA" in text
    doctor.examine(config, gpus=8, gpu_memory=80, sharded=False)
    assert "PARALLEL=fsdp2" in capsys.readouterr().out
