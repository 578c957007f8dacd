"""Make a Qwen2.5-VL with random weights, the true tokenizer and the true image processor.

    python scripts/make_random_vlm.py --tokenizer FOLDER --size small --out /tmp/random_vl

It answers nothing sensibly. It is for what does not depend on the weights: whether a config runs
on given data at the default pixel budget, how long a step takes, and how much memory it needs.

`FOLDER` holds a Qwen2.5 tokenizer (any Qwen2.5 model's folder, or its id on the hub). The sizes
`3b` and `7b` are the published models' shapes (data/model_shapes); `small` and `medium` have 3b's
proportions with fewer and narrower layers: heads of 128, grouped keys, mrope_section 16+24+24,
window attention in the vision tower with heads of 80, patches of 14, the vocabulary of 151,936.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mm_agrae.model.compat import prepare

SHAPES = Path(__file__).resolve().parents[1] / "data" / "model_shapes"
PUBLISHED = {"3b": "Qwen--Qwen2.5-VL-3B-Instruct", "7b": "Qwen--Qwen2.5-VL-7B-Instruct"}
SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    # 103 M parameters, 78 M of them the embeddings.
    "small": {
        "text_config": {
            "hidden_size": 512, "intermediate_size": 2752, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 320, "intermediate_size": 856, "depth": 4, "num_heads": 4,
            "out_hidden_size": 512, "fullatt_block_indexes": [1, 3],
        },
    },
    # 374 M parameters, 156 M of them the embeddings.
    "medium": {
        "text_config": {
            "hidden_size": 1024, "intermediate_size": 5504, "num_hidden_layers": 9,
            "num_attention_heads": 8, "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 640, "intermediate_size": 1710, "depth": 8, "num_heads": 8,
            "out_hidden_size": 1024, "fullatt_block_indexes": [1, 3, 5, 7],
        },
    },
}  # fmt: skip
SPECIAL_IDS = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
# Qwen2.5-VL's conversation format: its default system message, images between their markers.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- elif part['type'] == 'text' -%}"
    "{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
"""The published checkpoints' own budget: at most 16,384 tokens per image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="a folder or hub id of Qwen2.5")
    parser.add_argument("--size", choices=[*SMALLER, *PUBLISHED], default="small")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare()
    from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration

    make_processor(options.tokenizer).save_pretrained(options.out)
    config = AutoConfig.for_model(**shape(options.size))
    config.dtype = getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)  # so that 7b need not exist in float32 first
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    model.save_pretrained(options.out)
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def shape(size: str) -> dict[str, Any]:
    """The config of a size, as in a checkpoint's config.json."""
    file = SHAPES / f"{PUBLISHED.get(size, PUBLISHED['3b'])}.json"
    values = copy.deepcopy(json.loads(file.read_text(encoding="utf-8")))
    for part, changes in SMALLER.get(size, {}).items():
        values[part] |= changes
    return values


def make_processor(tokenizer_path: str) -> Any:
    """Qwen2.5-VL's processor around a Qwen2.5 tokenizer. Exits if it is another tokenizer."""
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    for token, expected in SPECIAL_IDS.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            sys.exit(f"{tokenizer_path}: {token} has id {found}, not {expected}: no Qwen2.5 one")
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=PIXELS, patch_size=14, merge_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=PIXELS, patch_size=14, merge_size=2),
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    main()
