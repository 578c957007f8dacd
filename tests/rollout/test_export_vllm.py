"""What a run leaves, loaded by vLLM alone, as its card says: an export, and a checkpoint that is a LoRA adapter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TEXT, VL, engine, examples, policy, run_config, sampling

from mm_agrae.run.export import export
from mm_agrae.trainer import Trainer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("vllm"),
]

ALONE = """
import json
import sys
from PIL import Image
from mm_agrae.rollout.vllm_worker import prepare_vllm
prepare_vllm()
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, questions, out = sys.argv[1:]
lora = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
llm = LLM(model, dtype="float32", max_model_len=384, enforce_eager=True, max_num_seqs=8, max_num_batched_tokens=8192,
    enable_chunked_prefill=False, kv_cache_memory_bytes=1 << 28, limit_mm_per_prompt={"video": 0}, **lora)
chats = []
for text, image in json.load(open(questions)):
    parts = [{"type": "image_pil", "image_pil": Image.open(image)}] if image else []
    chats.append([{"role": "user", "content": parts + [{"type": "text", "text": text}]}])
default = llm.get_default_sampling_params()
greedy = SamplingParams(temperature=0, max_tokens=16, logit_bias=dict.fromkeys(json.load(open(out)), -100.0))
made = llm.chat(chats, greedy, lora_request=LoRARequest("trained", 1, adapter) if adapter else None)
found = {name: getattr(default, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
found["prompts"] = [list(output.prompt_token_ids) for output in made]
found["tokens"] = [list(output.outputs[0].token_ids) for output in made]
json.dump(found, open(out, "w"))
"""


@pytest.mark.parametrize(("path", "adapter"), [(VL, False), (TEXT, True)], ids=["export", "adapter"])
def test_vllm_alone_writes_what_the_run_writes(path, adapter, tmp_path):
    nothing = {"before": False, "after": False}
    trainer = Trainer(
        run_config(
            tmp_path / "run",
            path,
            model={"path": path, "device": "cpu", "lora": {"rank": 4}},
            prompt={"max_pixels": 12544},
            rollout={"temperature": 0.8, "top_p": 0.9},
            train={"steps": 1},
            evaluate=nothing,
        )
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    trainer.train()
    if not adapter:
        export(tmp_path / "run", tmp_path / "out")
    made = trainer.processing
    asked, questions = [made.prompt(example) for example in examples(path, 3)], []
    for index, prompt in enumerate(asked):
        image = tmp_path / f"{index}.png"
        for picture in prompt.example.images:
            picture.save(image)
        questions.append((prompt.example.question, str(image) if prompt.images else ""))
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "found.json").write_text(json.dumps(made.forbidden_ids))
    (tmp_path / "alone.py").write_text(ALONE)
    folders = (path, tmp_path / "run/checkpoints/latest") if adapter else (tmp_path / "out", "")
    names = (tmp_path / "alone.py", *folders, tmp_path / "questions.json", tmp_path / "found.json")
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *map(str, names)],
        capture_output=True, text=True, timeout=280, env=os.environ | settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    if not adapter:  # vLLM reads the base model's settings for an adapter
        assert (found["temperature"], found["top_p"]) == (0.8, 0.9)
        assert found["repetition_penalty"] == 1
    assert found["prompts"] == [prompt.token_ids.tolist() for prompt in asked]  # template and pixel budget as trained
    greedy = sampling(temperature=0, max_new_tokens=16)
    trained, untrained = (
        [list(group[0].token_ids) for group in engine(each).generate(asked, 1, greedy, [0, 1, 2])]
        for each in (trainer.policy, policy(path))
    )
    assert found["tokens"] == trained != untrained
