"""DeepSpeed's ZeRO-3 takes the steps of one process; scripts/test_deepspeed.sh runs all of these.

What needs DeepSpeed is left out where it is not installed, or cannot be built for a CPU. With
MM_AGRAE_SLOW=1 there are more runs.
"""

import importlib.util
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SLOW
from distributed_worker import first_step
from helpers import TEXT, run_config
from test_distributed import RUNS, apart, check_same_steps, second_step, start, write_config

from mm_agrae import config as configs
from mm_agrae import zero
from mm_agrae.distributed import Processes
from mm_agrae.errors import ConfigError

MISSING = importlib.util.find_spec("deepspeed") is None
RUNS = RUNS | {"spoilt": RUNS["full_kl"]}
FORMS = {"zero": ("full", "lora", "spoilt")}
RESUMED = {"lora": "zero"}
if SLOW:
    # On a CPU offloading moves nothing, but takes other ways through DeepSpeed.
    FORMS = {"zero": tuple(RUNS), "offload": ("full_kl",)}
    RESUMED = {"full": "offload", "lora": "zero"}
real = pytest.mark.skipif(
    MISSING or shutil.which("g++") is None,
    reason="DeepSpeed is not installed, or there is no g++, which it needs on a CPU",
)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{(form, run): what the worker saved}; one launch for all runs of two processes"""
    folder = tmp_path_factory.mktemp("zero")
    found, paths = {}, {}

    def alone(name, path):
        found["one", name] = first_step(configs.load(path), spoilt=name == "spoilt")

    for name in {name for names in FORMS.values() for name in names}:
        alone(name, write_config(folder / f"one_{name}.yaml", **RUNS[name]))
    for form, names in FORMS.items():
        for name in names:
            paths[form, name] = write_config(folder / f"{form}_{name}.yaml", **RUNS[name])
    for name, form in RESUMED.items():  # of one process by two …
        path = second_step(folder / f"one_{name}", f"{form}_{name}_goes_on")
        paths[form, f"{name}_resumed"] = path
    start(2, str(folder / "two.pt"), *map(str, paths.values()))
    saved = torch.load(folder / "two.pt", weights_only=False)
    found |= {key: saved[str(path)] for key, path in paths.items()}
    for name in RESUMED:  # … of two by one, and of one by one
        for form in ("zero", "one"):
            run = folder / f"{form}_{name}"
            alone(f"{form}_{name}_resumed", second_step(run, f"one_{form}_{name}_goes_on"))
    return found


@real
@pytest.mark.parametrize(
    ("form", "run"),
    [(form, name) for form, names in FORMS.items() for name in names if name != "spoilt"],
)
def test_two_processes_take_the_steps_of_one(steps, form, run):
    # DeepSpeed's hooks have autograd add up in another order.
    check_same_steps(steps["one", run], steps[form, run], weights=1e-5)


@real
def test_a_gradient_that_is_no_number_is_left_out(steps):
    one, two = steps["one", "spoilt"], steps["zero", "spoilt"]
    for run in (one, two):
        assert not all(gradient.isfinite().all() for gradient in run["gradients"][0].values())
        assert run["metrics"][0]["update/bad_gradients"] == 1
    # Nothing of it is left in what follows, nor has it moved the weights.
    assert max(apart(one["gradients"][1], two["gradients"][1])) < 1e-6
    assert apart(one["learning"], two["learning"])[0] < 1e-5


@real
@pytest.mark.parametrize("run", RESUMED)
def test_a_run_goes_on_in_another_form(steps, run):
    whole = steps["one", f"one_{run}_resumed"]
    for other in (steps[RESUMED[run], f"{run}_resumed"], steps["one", f"zero_{run}_resumed"]):
        assert [row["step"] for row in other["metrics"]] == [1, 2]
        assert other["rollouts"] == whole["rollouts"]
        # Both steps: Adam's moments have come along.
        assert apart(whole["learning"], other["learning"])[0] < 1e-5
    assert apart(whole["learning"], steps["one", run]["learning"])[0] > 1e-3


@pytest.mark.skipif(not MISSING, reason="DeepSpeed is installed")
def test_without_deepspeed_it_is_named():
    with pytest.raises(ConfigError, match=r"mm-agrae\[deepspeed\]"):
        zero.settings()


@pytest.mark.skipif(MISSING, reason="DeepSpeed is not installed")
def test_one_process_does_not_offload(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    AcceleratorState._reset_state()
    with pytest.raises(ConfigError, match=r"offload_param.*one process"):
        Processes(run_config(tmp_path, TEXT))


def config(**others):
    stage = {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "none"}}
    return {
        "train_batch_size": "auto",
        "zero_optimization": stage | others.pop("zero", {}),
    } | others


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (config(zero={"stage": 2}), "ZeRO stage 2"),
        (config(zero={"offload_param": {"device": "nvme"}}), "offload_param"),
        (config(zero={"zero_hpz_partition_size": 8}), "zero_hpz_partition_size"),
        (config(bf16={"enabled": True}), "bf16.*model.dtype"),
        (config(gradient_clipping=1.0), "gradient_clipping.*update.max_grad_norm"),
        (config(optimizer={"type": "Adam"}), "optimizer"),
    ],
)
def test_what_is_not_supported_is_refused(found, message):
    with pytest.raises(ConfigError, match=message):
        zero.checked(found)


def test_what_is_supported_is_handed_on():
    found = config(
        zero={"offload_optimizer": {"device": "cpu"}, "stage3_prefetch_bucket_size": 10},
        bf16={"enabled": "auto"},
        fp16={"enabled": False},
        gradient_clipping="auto",
    )
    assert zero.checked(found) == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "stage3_prefetch_bucket_size": 10,
    }
