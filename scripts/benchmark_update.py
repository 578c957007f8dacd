"""One policy update, forward and backward: the shared-prompt update beside TRL's own code.

Both run on the same weights, tokens and images in one process, by turns. TRL's side is
`GRPOTrainer._compute_loss` (which calls its `_get_per_token_logps_and_entropies`) and backward;
ours is `pack`, `hidden_states`, `head_logprobs`, `policy_loss` and backward. Reported are

    times     median of TRL's time / median of ours (CPU time of all threads; CUDA events on GPU)
    theory    the same ratio in floating-point operations of matrix products and attention
    memory    peak above the model, its gradients included, ours / TRL's
    gradient  relative difference of all gradients of the two, in the same run

`--repeated` measures our own code with the prompt repeated for each completion as well. Tokens a
second and, where the device's peak is known or given, the utilisation of model FLOPs (what our
update needs, without what checkpointing computes again) are in the JSON file and, on a GPU,
printed. Random weights, so that it runs anywhere; `--preset 3b` has the shape of Qwen2.5-VL-3B.

    python scripts/benchmark_update.py --shapes 64x64,256x64 --kinds text,vl --tuning full,lora
    python scripts/benchmark_update.py --preset 3b --dtype bfloat16 --checkpointing --repeated
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mm_agrae.loss import Denominator, policy_loss
from mm_agrae.model import fused, lora_linear, shared_prompt, vision_tower
from mm_agrae.model.compat import prepare
from mm_agrae.model.vocab_head import head_logprobs
from mm_agrae.types import Example, MicroBatch, Prompt

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # 57 M parameters in the proportions of Qwen2.5-VL-3B: the vision tower has 20 % of the weights
    # that are multiplied with (19 % there), an image costs .8 of the text layers per image token
    # (.9 there). Without the tower 46 M. The embeddings are tied to the head.
    "57m": {
        "text": {
            "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 11,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
        },
        "vision": {
            "depth": 7, "hidden_size": 320, "intermediate_size": 864, "num_heads": 5,
            "out_hidden_size": 512, "patch_size": 14, "fullatt_block_indexes": [3, 6],
        },
    },
    # 59 M parameters with a heavier tower: 30 % of the weights, an image costs 1.5 of the text
    # layers per image token.
    "59m": {
        "text": {
            "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
        },
        "vision": {
            "depth": 8, "hidden_size": 384, "intermediate_size": 1037, "num_heads": 6,
            "out_hidden_size": 512, "patch_size": 14, "fullatt_block_indexes": [3, 7],
        },
    },
    "3b": {
        "text": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151_936,
        },
        "vision": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 2048, "patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
}  # fmt: skip
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16 operations a second that the makers state, by a part of the device's name."""

IMAGE, START, END = 4, 5, 6
FIRST_WORD = 10
"""Token ids below this one are special."""


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = []
    for kind in options.kinds:
        for tuning in options.tuning:
            model = build(options, kind, tuning).to(device)
            trainer = trl_trainer(model, options)
            for prompt, response in options.shapes:
                row = compare(model, trainer, options, kind, prompt, response)
                row = {"kind": kind, "tuning": tuning, **row}
                rows.append(row)
                print_row(row, header=len(rows) == 1)
            del model, trainer
    write(rows, options)


def compare(
    model: Any, trainer: Any, options: argparse.Namespace, kind: str, prompt: int, response: int
) -> dict[str, Any]:
    batch = make_batch(options, kind, prompt, response)
    inputs = trl_inputs(batch)
    own = copy.deepcopy(model)  # with the operators that `Policy` gives its model; TRL's stays as it is
    lora_linear.install(own)
    hf = own.get_base_model() if hasattr(own, "peft_config") else own
    for operators in (vision_tower, fused):
        operators.install(hf, getattr(torch, options.dtype), torch.device(options.device))

    def loss(logp_BT: torch.Tensor, entropy_BT: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            "grpo",
            logp_BT=logp_BT,
            advantage_B=batch.advantage_B,
            mask_BT=batch.mask_BT,
            entropy_BT=entropy_BT,
            denominator=Denominator(len(batch.mask_BT), int(batch.mask_BT.sum()), response),
        ).loss

    def ours() -> None:
        shared_prompt.install(hf)
        packed = shared_prompt.pack(hf.base_model, batch)
        hidden_NH = shared_prompt.hidden_states(hf.base_model, packed)
        logp_N, entropy_N = head_logprobs(hf.get_output_embeddings(), hidden_NH, packed.target_N)
        loss(packed.unpack(logp_N), packed.unpack(entropy_N)).backward()

    def repeated() -> None:
        shared_prompt.uninstall(hf)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        images: dict[str, Any] = {}
        if kind == "vl":
            names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
            images = {name: inputs[name] for name in names}
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        hidden = hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **images)
        hidden_NH = hidden.last_hidden_state[:, prompt - 1 : -1].flatten(0, 1)
        logp_N, entropy_N = head_logprobs(hf.get_output_embeddings(), hidden_NH, batch.token_BT.flatten())
        loss(logp_N.view_as(batch.mask_BT), entropy_N.view_as(batch.mask_BT)).backward()

    def theirs() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(model, dict(inputs))
        loss.backward()

    # The first run of each also gives the gradients that are compared.
    ours()
    mine = gradients(own)
    model.zero_grad()
    theirs()
    difference = relative_difference(mine, gradients(model))
    del mine
    sides = {"trl": theirs, "ours": ours}
    if options.repeated:
        repeated()
        sides["repeated"] = repeated
    times: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, run in sides.items():
            taken, high = measure(run, model if name == "trl" else own, options.device)
            (model if name == "trl" else own).zero_grad()
            times[name].append(taken)
            memory[name].append(high)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = {name: statistics.median(values) for name, values in memory.items()}
    flops = flop_count(model, batch)
    tflops = flops["ours"] / seconds["ours"] / 1e12
    beside: dict[str, Any] = {}
    if "repeated" in sides:
        beside = {"repeated_s": seconds["repeated"], "repeated_mb": peak["repeated"]}
    if options.peak_tflops:
        beside["model_flops_utilisation"] = tflops / options.peak_tflops
    return {
        "prompt": prompt,
        "response": response,
        "trl_s": seconds["trl"],
        "ours_s": seconds["ours"],
        "times": seconds["trl"] / seconds["ours"],
        "theory": flops["trl"] / flops["ours"],
        "trl_mb": peak["trl"],
        "ours_mb": peak["ours"],
        "memory": peak["ours"] / peak["trl"],
        "gradient_difference": difference,
        "tflops_per_s": tflops,
        "tokens_per_s": float(batch.mask_BT.sum()) / seconds["ours"],
        "all_seconds": times,
        **beside,
    }


# ------------------------------------------------------------------------------- both sides


def build(options: argparse.Namespace, kind: str, tuning: str) -> Any:
    prepare()
    import transformers as hf

    preset = PRESETS[options.preset]
    text = {**preset["text"], "max_position_embeddings": 32_768, "pad_token_id": 0}
    if options.vocabulary:
        text["vocab_size"] = options.vocabulary
    if options.layers:
        text["num_hidden_layers"] = options.layers
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    config: Any
    if kind == "vl":
        text["rope_parameters"]["mrope_section"] = [half - 2 * (half * 3 // 8), *[half * 3 // 8] * 2]
        config = hf.Qwen2_5_VLConfig(
            text_config=text, vision_config=preset["vision"], tie_word_embeddings=True,
            image_token_id=IMAGE, video_token_id=7, vision_start_token_id=START,
            vision_end_token_id=END,
        )  # fmt: skip
        model: Any = hf.Qwen2_5_VLForConditionalGeneration
    else:
        config, model = hf.Qwen2Config(**text, tie_word_embeddings=True), hf.Qwen2ForCausalLM
    for part in (config, config.get_text_config()):
        part.bos_token_id, part.eos_token_id = 2, 3
    model = model(config).to(getattr(torch, options.dtype)).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tuning == "lora":
        import peft

        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        targets = [n for n in names if "visual" not in n and "lm_head" not in n]
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets))
    return model


def trl_trainer(model: Any, options: argparse.Namespace) -> Any:
    """TRL's trainer, set up but not run: only its loss is used."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {f"t{index}": index for index in range(FIRST_WORD)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t1")),
        unk_token="t1", eos_token="t3", pad_token="t0",
    )  # fmt: skip
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="benchmark-"),
        per_device_train_batch_size=options.group,
        num_generations=options.group,
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        use_cpu=options.device == "cpu",
        bf16=options.device == "cuda" and options.dtype == "bfloat16",
        gradient_checkpointing=options.checkpointing,
        report_to="none",
        disable_tqdm=True,
    )

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        return [0.0] * len(completions)

    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["t1"] * options.group}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def make_batch(options: argparse.Namespace, kind: str, prompt: int, response: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(prompt * 10_007 + response)
    preset = PRESETS[options.preset]
    vocabulary = options.vocabulary or preset["text"]["vocab_size"]
    prompts = []
    for index in range(options.prompts):
        token_ids = torch.randint(FIRST_WORD, vocabulary, (prompt,), generator=generator)
        image: dict[str, Any] = {}
        if kind == "vl":
            height, width = image_size(prompt)
            token_ids[1 : 3 + height * width] = torch.tensor([START, *[IMAGE] * height * width, END])
            grid = torch.tensor([[1, 2 * height, 2 * width]])
            values = 3 * 2 * preset["vision"]["patch_size"] ** 2
            image = {
                "pixel_values": torch.randn(int(grid.prod()), values, generator=generator),
                "image_grid_thw": grid,
                "mm_token_type_ids": (token_ids == IMAGE).int(),
            }
        prompts.append(Prompt(Example(str(index), "", ""), "", token_ids, **image))
    rows = options.prompts * options.group
    lengths = torch.full((rows,), response)
    if options.ragged:
        lengths = torch.randint(response // 4, response + 1, (rows,), generator=generator)
        lengths[0] = response
    mask_BT = (torch.arange(response)[None] < lengths[:, None]).long()
    token_BT = torch.randint(FIRST_WORD, vocabulary, (rows, response), generator=generator)
    advantage_B = torch.randn(rows, generator=generator)
    index_B = torch.arange(options.prompts).repeat_interleave(options.group)
    device = torch.device(options.device)
    batch = MicroBatch(prompts, index_B, token_BT * mask_BT, mask_BT, advantage_B, torch.zeros(rows, response))
    for name in ("prompt_index_B", "token_BT", "mask_BT", "advantage_B", "sampling_logp_BT"):
        setattr(batch, name, getattr(batch, name).to(device))
    return batch


def image_size(prompt: int) -> tuple[int, int]:
    """Tokens (height, width) of the image that fills about three quarters of a prompt."""
    height = max(2, int((prompt * 9 / 16) ** 0.5) // 2 * 2)
    return height, max(2, prompt * 3 // 4 // height // 2 * 2)


def trl_inputs(batch: MicroBatch) -> dict[str, Any]:
    """The batch as TRL's trainer hands it to its loss: everything repeated for each completion."""
    device = batch.token_BT.device
    prompts = [batch.prompts[index] for index in batch.prompt_index_B.tolist()]
    prompt_ids = torch.stack([prompt.token_ids for prompt in prompts]).to(device)
    inputs: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": batch.token_BT,
        "completion_mask": batch.mask_BT,
        "advantages": batch.advantage_B,
        "num_items_in_batch": batch.mask_BT.sum(),
    }
    if prompts[0].pixel_values is not None:
        kinds = torch.stack([prompt.mm_token_type_ids for prompt in prompts]).to(device)
        inputs |= {
            "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]).to(device),
            "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]).to(device),
            "num_images": [1] * len(prompts),
            "mm_token_type_ids": torch.nn.functional.pad(kinds, (0, batch.token_BT.shape[1])),
        }
    return inputs


# ------------------------------------------------------------------------------ measurement


def measure(run: Any, model: Any, device: str) -> tuple[float, float]:
    """Seconds of CPU (or GPU) time, and peak memory in MB above the model, gradients included."""
    model.zero_grad()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return start.elapsed_time(end) / 1e3, peak / 2**20
    # Freed memory goes back to the system first, so that no side inherits the other's.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    kilobytes = resident("VmRSS")
    seconds = time.process_time()
    run()
    seconds = time.process_time() - seconds
    return seconds, (resident("VmHWM") - kilobytes) / 1024


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status: peak memory is read on Linux only")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"gradients of different parameters: {ours.keys() ^ theirs.keys()}")
    error = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    total = sum(float(theirs[name].double().square().sum()) for name in ours)
    return (error / total) ** 0.5


def flop_count(model: Any, batch: MicroBatch) -> dict[str, float]:
    """Operations of matrix products and attention, forward and backward, of both ways.

    Forward 1, gradient of inputs 1, gradient of weights 1 if they learn. Both vocabulary heads
    recompute their logits; TRL's scores every position where it has no Triton, ours the response
    positions. Attention is causal, its backward 2.5 times its forward.
    """
    hf = model.get_base_model() if hasattr(model, "peft_config") else model
    text = hf.config.get_text_config()
    learns = 3.0 if not hasattr(model, "peft_config") else 2.0

    def size(module: Any) -> float:
        """Twice the weights of linear layers, weighted by the passes over them."""
        return sum(
            2.0 * part.weight.numel() * (3.0 if part.weight.requires_grad else 2.0)
            for part in module.modules()
            if isinstance(part, torch.nn.Linear)
        )

    language = getattr(hf.base_model, "language_model", hf.base_model)
    per_token = size(language)
    last_mlp = size(language.layers[-1].mlp)
    per_pair = 3.5 * 4 * text.hidden_size * text.num_hidden_layers
    per_score = 2.0 * text.vocab_size * text.hidden_size * (1 + learns)
    visual = getattr(hf.base_model, "visual", None)
    per_patch = 0.0
    if visual is not None:
        trained = any(parameter.requires_grad for parameter in visual.parameters())
        per_patch = size(visual.blocks) / (1 if trained else 2)
    total = {"trl": 0.0, "ours": 0.0}
    longest = batch.token_BT.shape[1]
    for index, prompt in enumerate(batch.prompts):
        lengths = batch.mask_BT[batch.prompt_index_B == index].sum(-1).tolist()
        p, count, tokens = len(prompt), len(lengths), sum(lengths)
        patches = 0 if prompt.pixel_values is None else len(prompt.pixel_values)
        whole = p + longest
        everywhere = not str(batch.token_BT.device).startswith("cuda")
        total["trl"] += count * (
            whole * per_token
            + whole**2 / 2 * per_pair
            + ((whole - 1) if everywhere else longest) * per_score
            + patches * per_patch
        )
        # A completion's last token predicts nothing and is not run.
        inside = [length - 1 for length in lengths]
        pairs = p**2 / 2 + sum(length * p + length**2 / 2 for length in inside)
        total["ours"] += (
            (p + sum(inside)) * per_token
            - (p - 1) * last_mlp  # the last layer's MLP runs where something is predicted
            + pairs * per_pair
            + tokens * per_score
            + patches * per_patch
        )
    return total


# ------------------------------------------------------------------------------------ output


def print_row(row: dict[str, Any], header: bool) -> None:
    if header:
        print("| model | tuning | prompt × response | TRL s | ours s | times | theory "
              "| TRL MB | ours MB | memory | gradient |")  # fmt: skip
        print("|" + "---|" * 11)
    print(
        f"| {row['kind']} | {row['tuning']} | {row['prompt']}×{row['response']} "
        f"| {row['trl_s']:.2f} | {row['ours_s']:.2f} | {row['times']:.2f} | {row['theory']:.2f} "
        f"| {row['trl_mb']:.0f} | {row['ours_mb']:.0f} | {row['memory']:.2f} "
        f"| {row['gradient_difference']:.1e} |",
        flush=True,
    )
    if "repeated_s" in row:
        print(
            f"  our own update with the prompt repeated: {row['repeated_s']:.2f} s, {row['repeated_mb']:.0f} MB",
            flush=True,
        )
    if "model_flops_utilisation" in row:
        print(
            f"  ours: {row['tokens_per_s']:.0f} completion tokens/s, {row['tflops_per_s']:.1f} "
            f"TFLOP/s, {row['model_flops_utilisation']:.1%} of the device's peak",
            flush=True,
        )


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    import importlib.metadata

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"settings": settings, "versions": versions, "rows": rows}
    (folder / "benchmark_update.json").write_text(json.dumps(report, indent=1))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.9 + 0.34 * len(rows)), sharey=True)
    labels = [f"{row['kind']} {row['tuning']} {row['prompt']}×{row['response']}" for row in rows]
    place = list(range(len(rows)))
    left.barh(place, [row["times"] for row in rows], color="#3b6ea8", label="measured")
    left.plot([row["theory"] for row in rows], place, "k|", markersize=11, label="operations")
    left.set(yticks=place, yticklabels=labels, xlabel="TRL's time / ours")
    left.axvline(1, color="grey", linewidth=0.8)
    left.legend()
    left.invert_yaxis()
    right.barh(place, [row["memory"] for row in rows], color="#c2703d")
    right.axvline(1, color="grey", linewidth=0.8)
    right.set(xlabel="our peak memory / TRL's")
    figure.suptitle(f"One update of {options.prompts} × {options.group} completions")
    figure.tight_layout()
    figure.savefig(folder / "benchmark_update.png", dpi=120)
    print(f"written: {folder}/benchmark_update.json and .png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def words(text: str) -> list[str]:
        return text.split(",")

    def shapes(text: str) -> list[tuple[int, int]]:
        return [(int(p), int(r)) for p, r in (each.split("x") for each in text.split(","))]

    default = "64x64,256x64,1024x64,64x256,256x256,1024x256,64x1024"
    parser.add_argument("--shapes", type=shapes, default=default, help="prompt x response tokens")
    parser.add_argument("--kinds", type=words, default="text,vl", help="text, vl or both")
    parser.add_argument("--tuning", type=words, default="full", help="full, lora or both")
    parser.add_argument("--preset", choices=PRESETS, default="57m")
    parser.add_argument("--vocabulary", type=int, help="instead of the preset's")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--prompts", type=int, default=1, help="groups in the batch")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--ragged", action="store_true", help="responses of different lengths")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeated", action="store_true", help="our repeated batch as well")
    parser.add_argument("--peak-tflops", type=float, help="of the device, in this precision")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="runs/benchmark_update")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not options.peak_tflops:
        name = torch.cuda.get_device_name()
        known = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
        options.peak_tflops = known[0] if known and options.dtype == "bfloat16" else None
    return options


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
