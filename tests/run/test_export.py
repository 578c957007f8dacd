"""Weights under their stored names, and merged checkpoints, against plain transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEXT, VL, engine, policy, processing, prompts, run_config, sampling, small_files
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from mm_agrae.config import LoraSection, PromptSection
from mm_agrae.errors import ModelError, RunFolderError
from mm_agrae.model.processing import Processing
from mm_agrae.model.weights import adapter_config, adapter_weights, save_adapter
from mm_agrae.run.export import EXPORT_FILE, export
from mm_agrae.trainer import Trainer
from mm_agrae.types import Example

BOTH = pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
CLASSES = {VL: AutoModelForImageTextToText, TEXT: AutoModelForCausalLM}


def randomise_lora(made, std=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)


def stored_names(folder):
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def model_inputs(prompt):
    inputs = {"input_ids": prompt.token_ids[None]}
    if prompt.pixel_values is not None:
        inputs |= {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": prompt.mm_token_type_ids[None],
        }
    return inputs


def logits(hf, path):
    """Forward pass of one prompt by transformers alone."""
    with torch.no_grad():
        return hf.eval()(**model_inputs(prompts(path, 1)[0])).logits


def close(ours, theirs):
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def load_elsewhere(made, path, folder):
    """A fresh model, loaded by transformers from nothing but what `full_weights` yields."""
    weights = list(made.full_weights())
    names = [name for name, _ in weights]
    assert len(set(names)) == len(names)
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in weights}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made.hf.config.save_pretrained(folder)
    fresh, report = CLASSES[path].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    return fresh


@pytest.fixture
def untied(tmp_path):
    """The same models with a vocabulary head that is not tied to the embeddings."""

    def make(path):
        hf = CLASSES[path].from_pretrained(path, dtype=torch.float32)
        hf.config.get_text_config().tie_word_embeddings = False
        hf.config.tie_word_embeddings = False
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach() * 0.9)
        hf.all_tied_weights_keys = {}
        folder = tmp_path / "untied"
        hf.save_pretrained(folder)
        processing(path).save(str(folder))
        return folder

    return make


@BOTH
@pytest.mark.parametrize("lora", [None, LoraSection(rank=4)], ids=["full", "lora"])
def test_names_and_shapes_are_the_stored_ones(path, lora):
    made = policy(path, lora=lora)
    ours = {name: tuple(tensor.shape) for name, tensor in made.full_weights()}
    with safe_open(f"{path}/model.safetensors", "pt") as opened:
        assert ours == {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


@BOTH
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_lora_computes_the_same(path, tied, tmp_path, untied):
    folder = Path(path) if tied else untied(path)
    parts = ("language", "vision", "merger") if path == VL else ("language",)
    made = policy(str(folder), lora=LoraSection(rank=4, parts=parts))
    randomise_lora(made)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    assert {name for name, _ in made.full_weights()} == set(stored_names(folder))
    fresh = load_elsewhere(made, path, tmp_path / "merged")
    head, embeddings = fresh.lm_head.weight, fresh.get_input_embeddings().weight
    assert torch.equal(head, embeddings) == tied
    expected = logits(made.hf, path)
    assert close(logits(fresh, path), expected)
    assert (logits(policy(str(folder)).hf, path) - expected).abs().max() > 0.1
    after = made.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@BOTH
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_on_the_vocabulary_head(path, tied, tmp_path, untied):
    """It is merged into the head, which is untied from the embeddings thereby."""
    folder = Path(path) if tied else untied(path)
    made = policy(str(folder), lora=LoraSection(rank=4, parts=("language", "head")))
    randomise_lora(made)
    save_adapter(tmp_path / "adapter", dict(adapter_weights(made)), adapter_config(made))
    assert {name.split(".")[-2] for name in stored_names(tmp_path / "adapter")} == {
        "lora_A", "lora_B"
    }  # fmt: skip
    export(tmp_path / "adapter", tmp_path / "out", "float32")
    fresh = CLASSES[path].from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not torch.equal(fresh.lm_head.weight, fresh.get_input_embeddings().weight)
    assert close(logits(fresh, path), logits(made.hf, path))
    assert close(logits(policy(str(tmp_path / "out")).hf, path), logits(made.hf, path))


def test_frozen_bfloat16_weights_are_merged_in_float32():
    made = policy(TEXT, dtype="bfloat16", lora=LoraSection(rank=4))
    randomise_lora(made)
    merged = dict(made.full_weights())
    layer = made.hf.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    ours = merged["model.layers.0.self_attn.q_proj.weight"]
    assert ours.dtype == torch.bfloat16
    # Rounded to float32 on the way, which moves hardly any; added in bfloat16 most would differ.
    assert (ours != exact.bfloat16()).float().mean() < 1e-3
    assert torch.allclose(ours.double(), exact, rtol=2**-8, atol=1e-6)


@BOTH
def test_adapter_alone(path, tmp_path):
    from peft import PeftModel

    made = policy(path, lora=LoraSection(rank=4))
    randomise_lora(made)
    save_adapter(tmp_path / "ours", dict(adapter_weights(made)), adapter_config(made))
    made.model.save_pretrained(tmp_path / "theirs")
    assert stored_names(tmp_path / "ours") == stored_names(tmp_path / "theirs")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for config in configs:
        config["target_modules"].sort()
        config.pop("auto_mapping")  # only used where PEFT has to guess the class
    assert configs[0] == configs[1]
    fresh = PeftModel.from_pretrained(CLASSES[path].from_pretrained(path), tmp_path / "ours")
    assert close(logits(fresh, path), logits(made.hf, path))
    with pytest.raises(ValueError, match="no LoRA"):
        next(adapter_weights(policy(path)))


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from helpers import VL, policy
from mm_agrae.config import LoraSection
from mm_agrae.parallel.sharding import reshard
from mm_agrae.model.weights import adapter_weights, full_weights
from helpers import batch_of

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for lora in (None, LoraSection(rank=4)):
    made = policy(VL, lora=lora)
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    ways = [full_weights] + ([adapter_weights] if lora else [])
    before = [{name: tensor.clone() for name, tensor in way(made)} for way in ways]
    for layer in made.hf.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    for way, expected in zip(ways, before, strict=True):
        found = dict(way(made))
        assert found.keys() == expected.keys()
        assert not any(isinstance(tensor, DTensor) for tensor in found.values())
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

# A loaded adapter that training continues is the reference, also once it is sharded.
folder = sys.argv[1]
whole = policy(VL, lora=LoraSection(rank=4))
for name, parameter in whole.model.named_parameters():
    if "lora_B" in name:
        parameter.data.normal_(std=0.05)
if dist.get_rank() == 0:
    whole.model.save_pretrained(folder)
dist.barrier()
made = policy(folder)
made.keep_reference()
batch = batch_of(VL, made)
start = made(batch)[0].detach()
for layer in made.hf.model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(made, mesh=mesh)
for parameter in made.trainable_parameters():
    parameter.data.mul_(1.5)
moved = made(batch)[0].detach()
assert (moved - start).abs().max() > 1e-2
assert torch.allclose(made.reference_logprobs(batch), start, atol=1e-5)
assert torch.allclose(made(batch)[0], moved, atol=1e-5)
dist.destroy_process_group()
"""


def test_shards_of_two_processes_are_gathered(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    here = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (here, here / "model", here.parent)))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), str(tmp_path / "adapter")],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


# -------------------------------------------------------------------------------- whole checkpoints


@pytest.fixture
def run(tmp_path):
    """A run folder after two steps, whose LoRA weights are made large enough to matter."""

    def make(path, lora):
        model = {"path": path, "device": "cpu"} | ({"lora": {"rank": 4}} if lora else {})
        nothing = {"before": False, "after": False}
        trainer = Trainer(run_config(tmp_path / "run", path, model=model, evaluate=nothing))
        randomise_lora(trainer.policy)
        trainer.train()
        return tmp_path / "run"

    return make


def greedy(hf, path, count=3, tokens=16):
    """Plain greedy generation by transformers, one prompt at a time."""
    written = []
    for prompt in prompts(path, count):
        output = hf.generate(**model_inputs(prompt), do_sample=False, max_new_tokens=tokens)
        written.append(tuple(output[0, len(prompt) :].tolist()))
    return written


def loaded_as_its_card_says(folder, base=""):
    """The model and the reader of prompts that the program in a model card makes."""
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)[1]
    made = {}
    exec(program.replace("THIS", str(folder)).replace("BASE_MODEL", base), made)
    return made["model"], made.get("processor") or made["tokenizer"]


@BOTH
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_export_writes_what_its_run_writes(path, lora, run, tmp_path):
    folder, out = run(path, lora), tmp_path / "export"
    facts = export(folder, out)
    assert facts["step"] == 2
    assert facts["dtype"] == "float32"
    assert json.loads((out / EXPORT_FILE).read_text()) == facts
    step = folder / "checkpoints" / "step_000002"
    assert facts["source"] == str(step)

    plain, reader = loaded_as_its_card_says(out)
    assert facts["parameters"] == sum(p.numel() for p in plain.parameters())
    assert stored_names(out) == stored_names(Path(path))
    sampled = engine(policy(str(step))).generate(
        prompts(path, 3), 1, sampling(temperature=0, max_new_tokens=16), [0, 1, 2]
    )
    assert greedy(plain, path) == [group[0].token_ids for group in sampled]
    assert not torch.equal(logits(CLASSES[path].from_pretrained(path), path), logits(plain, path))

    # Tokenizer, processor and template are exported, for transformers and for this package.
    trained, other = loaded_as_its_card_says(step, path)  # by PEFT, if it is an adapter
    assert hasattr(trained, "peft_config") == lora
    assert close(logits(trained, path), logits(plain, path))
    assert reader.chat_template == other.chat_template == processing(path).template
    example = prompts(path, 1)[0].example
    ours = Processing(str(out), PromptSection()).prompt(example)
    assert torch.equal(ours.token_ids, prompts(path, 1)[0].token_ids)
    # A policy embeds patches by a matrix product, plain transformers by a convolution.
    torch.testing.assert_close(logits(policy(str(out)).hf, path), logits(plain, path), rtol=1e-4, atol=1e-4)
    assert plain.generation_config.eos_token_id == list(processing(path).eos_ids)


OTHER_TRANSFORMERS = """
import sys
import torch
from mm_agrae.model.compat import prepare
prepare()
import transformers
assert transformers.__version__.startswith("4."), transformers.__version__
folder, inputs, out = sys.argv[1:]
inputs = torch.load(inputs)
is_vl = "pixel_values" in inputs
loader = transformers.AutoModelForImageTextToText if is_vl else transformers.AutoModelForCausalLM
model = loader.from_pretrained(folder).eval()
inputs.pop("mm_token_type_ids", None)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
found = {"special": sorted(tokenizer.all_special_tokens), "ids": tokenizer("1+1=<|image_pad|><|im_end|>")["input_ids"]}
if is_vl:
    found["budget"] = dict(transformers.AutoProcessor.from_pretrained(folder).image_processor.size)
with torch.no_grad():
    found["logits"] = model(**inputs).logits
found["written"] = model.generate(**inputs, do_sample=False, max_new_tokens=16)
torch.save(found, out)
"""


@BOTH
@pytest.mark.skipif("MM_AGRAE_TRANSFORMERS_4" not in os.environ, reason="needs a folder with transformers 4.57")
def test_transformers_4_reads_the_same_from_an_export(path, run, tmp_path):
    """pip install --target FOLDER --no-deps transformers==4.57.6 'tokenizers<=0.23' 'huggingface_hub<1'"""
    out = tmp_path / "export"
    export(run(path, True), out)
    torch.save(model_inputs(prompts(path, 1)[0]), tmp_path / "inputs.pt")
    (tmp_path / "other.py").write_text(OTHER_TRANSFORMERS)
    paths = os.pathsep.join([os.environ["MM_AGRAE_TRANSFORMERS_4"], str(Path(__file__).parents[2])])
    names = [tmp_path / "other.py", out, tmp_path / "inputs.pt", tmp_path / "found.pt"]
    result = subprocess.run(
        [sys.executable, *map(str, names)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert result.returncode == 0, result.stderr
    found, made = torch.load(tmp_path / "found.pt"), processing(path)
    assert found["special"] == sorted(made.tokenizer.all_special_tokens)
    assert found["ids"] == made.tokenizer("1+1=<|image_pad|><|im_end|>")["input_ids"]
    if path == VL:
        size = made.processor.image_processor.size
        assert found["budget"] == {name: size[name] for name in ("shortest_edge", "longest_edge")}
    plain = CLASSES[path].from_pretrained(out)
    torch.testing.assert_close(found["logits"], logits(plain, path), rtol=1e-4, atol=1e-4)
    prompt = prompts(path, 1)[0]
    assert tuple(found["written"][0, len(prompt) :].tolist()) == greedy(plain, path, count=1)[0]


def test_plain_transformers_makes_the_image_tokens_of_the_training(tmp_path):
    """prompt.max_pixels goes into checkpoints and exports."""
    nothing = {"before": False, "after": False}
    config = run_config(tmp_path / "run", prompt={"max_pixels": 50176}, train={"steps": 1}, evaluate=nothing)
    trainer = Trainer(config)
    trainer.train()
    export(tmp_path / "run", tmp_path / "out")
    image = Image.effect_noise((640, 480), 90).convert("RGB")
    ours = trainer.processing.prompt(Example("a", "?", "1", (image,)))
    for folder in (trainer.newest_checkpoint(), tmp_path / "out"):
        theirs = AutoProcessor.from_pretrained(folder)(text=[ours.text], images=[image], return_tensors="pt")
        assert torch.equal(theirs["input_ids"][0], ours.token_ids)
        assert torch.equal(theirs["image_grid_thw"], ours.image_grid_thw)
        assert Processing(str(folder), PromptSection()).prompt(ours.example).images[0].size == ours.images[0].size


def test_an_adapter_folder_in_bfloat16(tmp_path):
    made = policy(TEXT, lora=LoraSection(rank=4))
    randomise_lora(made)
    made.model.save_pretrained(tmp_path / "adapter")
    facts = export(tmp_path / "adapter", tmp_path / "out", "bfloat16")
    assert facts["dtype"] == "bfloat16"
    assert facts["step"] is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == torch.bfloat16
    merged = {name: tensor.bfloat16() for name, tensor in made.full_weights()}
    state = plain.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())


def test_exports_that_are_refused(tmp_path, run):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"full exists and is not empty"):
        export(Path(TEXT), full)
    assert (full / "note.txt").read_text() == "mine"
    with pytest.raises(ModelError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    step = run(TEXT, False) / "checkpoints" / "step_000002"
    with (step / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(RunFolderError, match=r"model\.safetensors damaged"):
        export(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        export(Path(TEXT), tmp_path / "file" / "out")
    with small_files(100_000), pytest.raises(RunFolderError, match="cannot be written"):
        export(Path(TEXT), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
