"""The shipped recipes: every config under every overlay is what the paper says; scripts run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TEXT, VL

from mm_agrae import config as configs
from mm_agrae import tasks
from mm_agrae.errors import ConfigError
from mm_agrae.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
WITH = ROOT / "configs" / "with"
RULES = {
    # overlay: rule, base, loss, clip below and above
    None: ("agrae", None, "grpo", None, None),
    "grpo": ("grpo", None, "grpo", 0.2, 0.2),
    "grpo_agrae": ("agrae", "grpo", "grpo", 0.2, 0.2),
    "dapo": ("dapo", None, "dapo", 0.2, 0.28),
    "dapo_agrae": ("agrae", "grpo", "dapo", 0.2, 0.28),
    "dr_grpo": ("dr_grpo", None, "dr_grpo", 0.2, 0.2),
    "dr_grpo_agrae": ("agrae", "dr_grpo", "dr_grpo", 0.2, 0.2),
    "edge": ("edge", "grpo", "dapo", 0.2, 0.2),
    "edge_agrae": ("edge", "agrae", "dapo", 0.2, 0.2),
    "edge_released_code": ("edge_released_code", None, "dapo", 0.2, 0.2),
    "diva": ("diva", None, "dapo", 0.2, 0.3),
    "diva_released_code": ("diva_released_code", None, "dapo", 0.2, 0.3),
    "grpo_rrb": ("grpo_rrb", "grpo", "grpo", 0.2, 0.2),
    "maxrl": ("maxrl", None, "grpo", 0.2, 0.2),
    "pkpo": ("pkpo", None, "grpo", 0.2, 0.2),
    "pass_at_k": ("pass_at_k", None, "grpo", 0.2, 0.2),
    "quantile": ("quantile", None, "dapo", 0.2, 0.28),
    "max_minus_second": ("max_minus_second", None, "grpo", 0.2, 0.2),
    "gdpo": ("grpo", None, "grpo", 0.2, 0.2),
    "sapo": ("agrae", None, "sapo", None, None),
    "clip_cov": ("agrae", None, "clip_cov", 0.2, 0.2),
    "kl_cov": ("agrae", None, "kl_cov", None, None),
    "top_entropy": ("agrae", None, "dapo", 0.2, 0.28),
}
# model, prompts a step, G, epochs, prompts an optimiser step, α: Appendix C.2 of the paper.
TABLE = {
    "math_qwen2.5_math_7b": ("Qwen/Qwen2.5-Math-7B", 1024, 8, 20, 256, 1.0),
    "math_llama_3.2_3b": ("meta-llama/Llama-3.2-3B-Instruct", 1024, 8, 20, 256, 1.0),
    "math_deepseek_r1_distill_7b": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 1024, 8, 20, 256, 1.0,
    ),
    "geometry3k_qwen2.5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 512, 5, 20, 128, 0.5),
    "geometry3k_qwen2.5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 512, 5, 20, 128, 0.5),
    "medical_mri_qwen2.5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 32, 5, 10, 32, 0.5),
}  # fmt: skip


def test_every_run_of_the_table_is_there():
    assert {path.stem for path in PAPER} == TABLE.keys()
    assert {path.stem for path in WITH.glob("*.yaml")} == {
        *filter(None, RULES), "lora_24gb", "lora_80gb", "correction",
    }  # fmt: skip


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_settings_of_the_paper(path):
    config = configs.load(path)
    rollout, update, evaluate = config.rollout, config.update, config.evaluate
    assert (
        config.model.path, rollout.prompts_per_step, rollout.completions_per_prompt,
        config.train.epochs, update.mini_batch_prompts, config.advantage.alpha,
    ) == TABLE[path.stem]  # fmt: skip
    assert (rollout.temperature, rollout.max_new_tokens) == (1.0, 2048)
    assert (update.learning_rate, update.kl_coef) == (1e-6, 0.0)
    assert config.model.lora is None
    assert (evaluate.temperature, evaluate.top_p) == (0.6, 0.95)
    assert evaluate.max_new_tokens == (3072 if "qwen2.5_math" in path.stem else 4096)
    runs = {s.label: evaluate.for_source(s).samples for s in config.data.evaluate}
    if path.stem.startswith("math"):
        assert runs == {"math500": 4, "aime2025": 16, "amc23": 16}
        assert config.reward.parts == {"accuracy": 1.0}
    elif path.stem.startswith("geometry3k"):
        assert runs == {"geometry3k": 4, "mathvision": 4, "mathverse": 4}
    else:
        assert runs == {"mri300": 4, "ct300": 4, "xray300": 4}
    if not path.stem.startswith("math"):
        assert config.reward.parts == {"accuracy": 0.9, "format": 0.1}
    assert "\\boxed{}" in config.prompt.system + config.prompt.instruction
    for source in (*config.data.train, *config.data.evaluate):
        tasks.check(source)
    assert len({c.run_dir for c in map(configs.load, PAPER)}) == len(PAPER)


@pytest.mark.parametrize("overlay", RULES)
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_each_algorithm_is_one_override(path, overlay):
    plain = configs.load(path)
    config = configs.load(path, [str(WITH / f"{overlay}.yaml")] if overlay else [])
    rule, base, loss, low, high = RULES[overlay]
    advantage, update = config.advantage.model_dump(), config.update
    assert (advantage["rule"], advantage.get("base"), update.loss) == (rule, base, loss)
    assert (update.clip_low, update.clip_high, update.kl_coef) == (low, high, 0.0)
    assert advantage.get("alpha") == (plain.advantage.alpha if "agrae" in (rule, base) else None)
    assert config.rollout.dynamic_sampling is None
    assert config.reward.overlong is None
    assert (config.rollout.variants is not None) == (overlay == "diva")
    # Nothing else differs, so runs of two algorithms can be compared.
    rollout = config.rollout.model_copy(update={"variants": None})
    same = {"advantage": plain.advantage, "update": plain.update, "rollout": rollout}
    assert config.model_copy(update=same) == plain


NEIGHBOURS = {
    # rule, loss, clip, prompts a step, G, problems a step, new tokens, epochs: shared by paper and released code.
    "edge_qwen2.5_math_7b": ("edge", "dapo", 0.2, 0.2, 8, 8, 8, 1024, 1),
    "diva_qwen2.5_vl_7b": ("diva", "dapo", 0.2, 0.3, 128, 5, 64, 4096, 5),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_recipes_of_the_neighbours(name):
    config = configs.load(ROOT / "configs" / "neighbours" / f"{name}.yaml")
    rollout, update = config.rollout, config.update
    assert (
        config.advantage.rule, update.loss, update.clip_low, update.clip_high, rollout.prompts_per_step,
        rollout.completions_per_prompt, rollout.problems_per_step, rollout.max_new_tokens, config.train.epochs,
    ) == NEIGHBOURS[name]  # fmt: skip
    assert (rollout.correct is not None, rollout.variants is not None) == (name[0] == "e", name[0] == "d")
    assert (update.learning_rate, update.kl_coef, rollout.temperature) == (1e-6, 0.0, 1.0)
    for source in (*config.data.train, *config.data.evaluate):
        tasks.check(source)


@pytest.mark.parametrize("overlay", [name for name in RULES if name])
@pytest.mark.parametrize("lora", ["lora_24gb", "lora_80gb"])
def test_lora_goes_with_every_algorithm(lora, overlay):
    files = [str(WITH / f"{overlay}.yaml"), str(WITH / f"{lora}.yaml")]
    for path in PAPER:
        config = configs.load(path, files)
        assert config.model.lora is not None
        assert config.update.loss == RULES[overlay][2]
        assert configs.load(path, files[::-1]) == config


def test_every_name_in_a_header_exists():
    for path in (ROOT / "configs").rglob("*.yaml"):
        for word in path.read_text().split():
            if word.startswith(("configs/", "./scripts/")) and word.endswith((".yaml", ".sh")):
                assert (ROOT / word).is_file(), f"{path.name}: {word}"


# ------------------------------------------------------------------------------ layers of configs

MINIMAL = """
run_dir: runs/x
model: {path: some/model}
data: {train: [{task: synthetic}]}
train: {steps: 3}
rollout: {prompts_per_step: 4}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    write("minimal.yaml", MINIMAL)
    return write


def test_a_base_is_relative_to_its_file_and_merged_key_by_key(write):
    write("a/middle.yaml", "base: ../minimal.yaml\nrollout: {temperature: 0.7}\n")
    top = write("top.yaml", "base: a/middle.yaml\nrollout: {max_new_tokens: 9}\nrun_dir: y\n")
    config = configs.load(top, ["rollout.prompts_per_step=6"])
    assert config.run_dir == "y"
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.temperature, rollout.max_new_tokens) == (6, 0.7, 9)
    assert config.model.path == "some/model"


def test_lists_are_replaced(write):
    file = write("over.yaml", "base: minimal.yaml\ndata: {train: [{task: files, path: x.jsonl}]}")
    assert [source.task for source in configs.load(file).data.train] == ["files"]


def test_files_and_settings_apply_in_their_order(write):
    one, two = (write(f"{n}.yaml", f"train: {{steps: {n}}}\n") for n in (1, 2))
    base = write("b.yaml", MINIMAL)

    def steps(*overrides):
        return configs.load(base, list(map(str, overrides))).train.steps

    assert steps(one) == 1
    assert steps(one, two) == 2
    assert steps(two, one) == 1
    assert steps("train.steps=7", one) == 1
    assert steps(one, "train.steps=7") == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: absent.yaml\n", "absent.yaml (base of"),
        ("base: bad.yaml\n", "goes in a circle"),
        ("base: circle.yaml\n", "goes in a circle"),
        ("base: [minimal.yaml]\n", "base must be the path of one file"),
        ("base: minimal.yaml\nrolout: {}\n", "did you mean 'rollout'"),
        ("base: list.yaml\n", "expected a mapping"),
    ],
)
def test_a_wrong_base_is_named(write, text, expected):
    write("circle.yaml", "base: bad.yaml\n")
    write("list.yaml", "- 1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml|absent\.yaml|list\.yaml") as error:
        configs.load(write("bad.yaml", text))
    assert expected in str(error.value)


def test_a_missing_override_file_is_named(write):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        configs.load(write("b.yaml", MINIMAL), ["nowhere.yaml"])
    with pytest.raises(ConfigError, match="expected key=value"):
        configs.load(write("b.yaml", MINIMAL), ["nowhere"])


# ------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The scripts' virtual environment: this one, marked as installed."""
    folder = tmp_path_factory.mktemp("venv")
    (folder / "bin").mkdir()
    (folder / "bin" / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    (folder / "bin" / "python").symlink_to(sys.executable)
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    stamp = subprocess.run(["cksum"], input=b"".join(file.read_bytes() for file in files), capture_output=True)
    (folder / ".installed").write_bytes(stamp.stdout)
    return os.environ | {
        "MM_AGRAE_VENV": str(folder), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200",
    }  # fmt: skip


def script(name, *arguments, env, expect=0):
    result = subprocess.run(
        [str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True, text=True, timeout=500, env=env, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout if expect == 0 else result.stderr


SHORT = ["train.steps=1", "rollout.prompts_per_step=4", "rollout.completions_per_prompt=2",
         "rollout.max_new_tokens=16", "data.evaluate.0.limit=2", "evaluate.samples=2",
         "evaluate.max_new_tokens=16", "evaluate.before=false", "evaluate.after=false"]  # fmt: skip


@pytest.mark.parametrize("name", ["train_vlm.sh", "train_llm.sh", "evaluate.sh"])
def test_help_needs_no_installation(name, tmp_path):
    text = script(name, "--help", env=os.environ | {"MM_AGRAE_VENV": str(tmp_path / "none")})
    assert f"./scripts/{name}" in text
    assert "#" not in text
    assert not (tmp_path / "none").exists()
    for word in text.split():
        if word.startswith("configs/") and word.endswith(".yaml"):
            assert (ROOT / word).is_file()


@pytest.mark.slow
def test_train_and_evaluate_on_this_machine(environment, tmp_path):
    run = tmp_path / "run"
    out = script(
        "train_vlm.sh", "configs/quickstart.yaml", "configs/with/dr_grpo_agrae.yaml", *SHORT,
        f"model.path={VL}", f"run_dir={run}", env=environment,
    )  # fmt: skip
    assert "processes: 1 (one), GPUs: 0" in out
    assert "step 1/1" in out
    out = script(
        "evaluate.sh", VL, run, "--config", run / "config.yaml", "--out", tmp_path / "eval",
        env=environment,
    )  # fmt: skip
    assert "pass@2" in out
    assert {r.name for r in RunFolder(tmp_path / "eval").read_evaluations()} == {"vl", "run"}


def test_the_scripts_install_what_the_config_needs(environment, tmp_path):
    """vLLM's environment where it samples, the extra for GPUs where there is an NVIDIA driver; not otherwise."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "nvidia-smi").touch(mode=0o755)
    base, vllm = Path(environment["MM_AGRAE_VENV"]), tmp_path / "vllm"
    shutil.copytree(base, vllm, symlinks=True)
    with (vllm / "bin" / "activate").open("a") as file:
        file.write("echo activated: vLLM\n")
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh")]
    stamp = subprocess.run(["cksum"], input=b"".join(inputs) + b"vllm==0.32.0\n", capture_output=True)
    (vllm / ".installed").write_bytes(stamp.stdout)
    # Without the stamp of the extra the script would begin to install it here.
    (base / ".installed[gpu]").write_bytes((base / ".installed").read_bytes())
    env = environment | {"MM_AGRAE_VLLM_VENV": str(vllm), "PATH": f"{tmp_path / 'driver'}:{os.environ['PATH']}"}
    for engine in ("vllm", "hf"):
        out = script("train_llm.sh", "configs/quickstart_text.yaml", f"rollout.engine={engine}", "--plan", env=env)
        assert ("activated: vLLM" in out) == (engine == "vllm")
        assert "processes: 1 (one), GPUs: 0, threads of each: 1" in out
        assert "Plan of" in out
        assert "Installing" not in out


def test_an_unknown_strategy_is_refused(environment):
    for name, message in (("zero3", "PARALLEL=fsdp2_offload"), ("x", "no configs/accelerate/x")):
        env = environment | {"PARALLEL": name}
        assert message in script("train_llm.sh", "configs/quickstart.yaml", env=env, expect=2)


@pytest.mark.slow
def test_two_offloaded_processes_start_anew_over_an_old_run(environment, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "old"):
        (run / name).write_text("an old run\n")
    out = script(
        "train_llm.sh", "configs/quickstart_text.yaml", *SHORT, f"model.path={TEXT}",
        f"run_dir={run}", "--overwrite",
        env=environment | {"PROCESSES": "2", "PARALLEL": "fsdp2_offload"},
    )  # fmt: skip
    assert "processes: 2 (fsdp2_offload)" in out
    assert "on 2 processes" in out
    assert out.count("step 1/1") == 1
    assert not (run / "old").exists()


@pytest.mark.parametrize(
    "launcher", ["torchrun --standalone --nproc_per_node 2", "accelerate launch --num_processes 1"]
)
def test_a_launcher_adds_no_traceback_to_an_error(launcher, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "launch.py", *launcher.split(), "-m", "mm_agrae.cli", "train"]
    result = subprocess.run(
        [*command, tmp_path / "none.yaml"], capture_output=True, text=True, timeout=500, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 2
    assert f"error: config {tmp_path / 'none.yaml'}: cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
