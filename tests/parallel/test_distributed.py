"""Two processes take the steps of one, with a copy of the model each (DDP) or half of it (FSDP2).

One launch for all runs: most of the time goes into starting processes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from distributed_worker import first_step
from helpers import ROOT, TEXT, VL, run_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mm_agrae import config as configs

pytestmark = pytest.mark.timeout(1500)  # all runs are made for the first test, by two processes on the cores there are
WORKER = Path(__file__).parent / "distributed_worker.py"
LORA = {"lora": {"rank": 4, "alpha": 8, "parts": ["language", "vision", "head"]}}
RUNS = {
    "full": {"evaluate": {"before": False, "after": True}},
    "lora": {"model": LORA},
    # All that calls the model without a backward pass: old and reference log-probabilities.
    "full_kl": {
        "model": {"gradient_checkpointing": True, "freeze": ["vision"]},
        "update": {"kl_coef": 0.1, "mini_batch_prompts": 3, "learning_rate": 1e-3},
        "rollout": {"prompts_per_step": 6},
    },
    "lora_kl": {"model": LORA, "update": {"kl_coef": 0.1, "epochs": 2, "shared_prompt": "off", "learning_rate": 1e-3}},
    # Rows of one process may all be correct: the other samples once more on its own.
    "corrected": {
        "rollout": {
            "prompts_per_step": 5,
            "max_new_tokens": 48,
            "correct": {"reflect_cue": " So, ", "answer_cue": " so {boxed}", "reflect_tokens": 8},
        }
    },
    # The groups of a problem are on both processes, and their success is one.
    "variants": {"rollout": {"prompts_per_step": 9, "variants": {"count": 2}}, "advantage": {"rule": "diva"}},
}
STRATEGIES = {"ddp": ("full", "lora", "corrected", "variants"), "fsdp": tuple(RUNS), "offload": ("full", "lora_kl")}
SPREAD = """
def spread(example, completion):
    return sum(completion.token_ids) % 97 / 97
"""


def launcher_environment(*line: str) -> dict[str, str]:
    """What `accelerate launch` sets; on a CPU it starts several processes by MPI alone."""
    arguments = _validate_launch_command(launch_command_parser().parse_args([*line, "x.py"]))[0]
    found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def start(processes: int, *arguments: str, worker: Path = WORKER) -> None:
    launched = launcher_environment("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1")
    assert launched["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    paths = os.pathsep.join([str(ROOT), *sys.path])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, *launch, str(worker), *arguments],
        capture_output=True, text=True, timeout=1500,
        env=os.environ | launched | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def write_config(path: Path, **sections) -> Path:
    """A run whose groups all have a gradient, some with images and some without.

    Five groups on two processes: one of them has less to do, and has idle micro-batches.
    """
    reward = path.with_name("reward.py")
    reward.write_text(SPREAD)
    sections = {
        "rollout": {"prompts_per_step": 5},
        "train": {"steps": 1},
        "reward": {"parts": {"accuracy": 1.0, f"{reward}:spread": 1.0}},
        "evaluate": {"before": False, "after": False},
    } | sections
    update = {"micro_batch_completions": 3, "learning_rate": 1e-3}
    sections["update"] = update | sections.get("update", {})
    image, text = ({"task": "synthetic", "modality": m, "split": "train"} for m in ("image", "text"))
    data = {"train": [image | {"name": "image"}, text | {"name": "text"}]}
    config = run_config(path.with_suffix(""), VL, data=data, **sections)
    path.write_text(configs.dump(config))
    return path


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{(strategy, run): what the worker saved}"""
    folder = tmp_path_factory.mktemp("steps")
    found = {}
    for name, sections in RUNS.items():
        path = write_config(folder / f"one_{name}.yaml", **sections)
        found["one", name] = first_step(configs.load(path))
    paths = {
        (strategy, name): write_config(folder / f"{strategy}_{name}.yaml", **RUNS[name])
        for strategy, names in STRATEGIES.items()
        for name in names
    }
    for name in RESUMED:  # of one process by two …
        paths["fsdp", f"{name}_resumed"] = second_step(folder / f"one_{name}", f"fsdp_{name}_goes_on")
        add_damaged_checkpoint(folder / f"fsdp_{name}_goes_on" / "checkpoints")
    start(2, str(folder / "two.pt"), *map(str, paths.values()))
    saved = torch.load(folder / "two.pt", weights_only=False)
    found |= {key: saved[str(path)] for key, path in paths.items()}
    for name in RESUMED:  # … of two by one, and of one by one
        for strategy in ("fsdp", "one"):
            path = second_step(folder / f"{strategy}_{name}", f"one_{strategy}_{name}_goes_on")
            found["one", f"{strategy}_{name}_resumed"] = first_step(configs.load(path))
    return found


RESUMED = ("full", "lora")


def second_step(run_dir: Path, name: str) -> Path:
    """A config that goes on with a copy of this run, by one more step."""
    copied = run_dir.with_name(name)
    shutil.copytree(run_dir, copied)
    path = copied.with_suffix(".yaml")
    config = configs.load(run_dir.with_suffix(".yaml"), [f"run_dir={copied}", "train.steps=2"])
    path.write_text(configs.dump(config))
    return path


def add_damaged_checkpoint(folder: Path) -> None:
    """A newer one than the whole one there."""
    shutil.copytree(folder / "step_000001", folder / "step_000002")
    with (folder / "step_000002" / "training.pt").open("r+b") as file:
        file.seek(1000)
        file.write(bytes(8))


def apart(a: dict, b: dict) -> tuple[float, float]:
    """Norm of the difference by the norm, largest difference by the largest entry."""
    assert a.keys() == b.keys()
    one, two = (torch.cat([x[name].double().flatten() for name in sorted(a)]) for x in (a, b))
    return float((one - two).norm() / one.norm()), float((one - two).abs().max() / one.abs().max())


def check_same_steps(one: dict, two: dict, weights: float = 1e-6) -> None:
    """Whether two runs took the same steps; `weights`: how far apart weights may be after them."""
    assert set(one["has_image"]) == {True, False}
    assert one["rollouts"] == two["rollouts"]  # completions, rewards, advantages and variants
    assert one["data_state"] == two["data_state"]
    assert len(one["gradients"]) == len(two["gradients"])
    assert max(apart(one["gradients"][0], two["gradients"][0])) < 1e-6
    # Adam makes a step of full size of a gradient that is next to nothing.
    assert apart(one["learning"], two["learning"])[0] < weights
    assert apart(one["whole"], two["whole"])[0] < weights
    assert max(apart(one["gradients"][-1], two["gradients"][-1])) < 100 * weights
    assert one["evaluations"] == two["evaluations"]
    for name in ("update/loss", "update/grad_norm", "policy/entropy", "tokens/completion"):
        pair = [x["metrics"][0][name] for x in (one, two)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(
    ("strategy", "run"), [(strategy, name) for strategy, names in STRATEGIES.items() for name in names]
)
def test_two_processes_take_the_steps_of_one(steps, strategy, run):
    assert len(steps["one", run]["gradients"]) == (2 if "kl" in run else 1)
    check_same_steps(steps["one", run], steps[strategy, run])


@pytest.mark.parametrize("run", RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(steps, run):
    whole = steps["one", f"one_{run}_resumed"]
    # Of two processes one judges the files, and both pass over the damaged checkpoint.
    main, other = steps["fsdp", f"{run}_resumed"]["checksums"]
    assert main == 2 * steps["one", f"fsdp_{run}_resumed"]["checksums"][0] > 0
    assert other == 0
    for other in (steps["fsdp", f"{run}_resumed"], steps["one", f"fsdp_{run}_resumed"]):
        assert [row["step"] for row in other["metrics"]] == [1, 2]
        assert other["rollouts"] == whole["rollouts"]
        # Both steps: Adam's moments have come along.
        assert apart(whole["learning"], other["learning"])[0] < 1e-5
    assert apart(whole["learning"], steps["one", run]["learning"])[0] > 1e-3


def test_one_process_loads_the_model(tmp_path):
    """The other keeps its half and one layer: nothing of it was ever the whole model."""
    model = AutoConfig.from_pretrained(TEXT)
    model.update(
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
    )
    shutil.copytree(TEXT, tmp_path / "model")
    made = AutoModelForCausalLM.from_config(model, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "model")
    # Stored twice, tied weights can be told only by who has their values.
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = run_config(tmp_path / "run", str(tmp_path / "model"))
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    worker = WORKER.with_name("loading_worker.py")
    start(2, str(tmp_path / "config.yaml"), str(tmp_path / "found"), worker=worker)
    main, other = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in (0, 1))
    assert main["different"] == other["different"] == []
    assert main["repeats_because"] == other["repeats_because"] == ""
    assert main["tied"] == other["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert main["grown"] > 0.95
    assert other["grown"] < 0.8


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")))
def test_accelerate_understands_its_configs(file):
    environment = launcher_environment("--config_file", str(file), "--num_processes", "2", "--num_machines", "1")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == ("fsdp" in file.name)
    if "fsdp" in file.name:
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"].lower() == "true"
        assert environment["FSDP_OFFLOAD_PARAMS"].lower() == str("offload" in file.name).lower()
