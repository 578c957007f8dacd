"""Small models with random weights, one for each family, and what the tests do with them."""

from __future__ import annotations

import torch
import transformers
from helpers import TEXT, VL, examples
from transformers import AutoConfig, AutoTokenizer

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config import ModelSection, PromptSection
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.types import Completion, Example

TOKENIZER = AutoTokenizer.from_pretrained(VL)
VOCABULARY = len(TOKENIZER)
PAD, EOS, START, END, IMAGE, VIDEO = TOKENIZER.convert_tokens_to_ids(
    ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
)
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": PAD,
    "bos_token_id": None, "eos_token_id": EOS, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
WORDS = 600
"""Ids from here on are special."""
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_VL = {
    "text_config": SMALL | {"rope_parameters": ROPE}, "vision_start_token_id": START,
    "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO,
}  # fmt: skip
TOWER = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.2}
# Short windows, so that prompts do not fit into them.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
FAMILIES = {
    "qwen2_5_vl": QWEN_VL | {"vision_config": TOWER | {
        "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 56,
        "fullatt_block_indexes": [1],
    }},
    "qwen2_vl": QWEN_VL | {"vision_config": TOWER | {"embed_dim": 32, "hidden_size": 64}},
    "qwen3_vl": QWEN_VL | {"vision_config": TOWER | {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
        "patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }},
    "llama": SMALL,
    "qwen2": SMALL | {"tie_word_embeddings": True},
    "qwen3": SMALL,
    "gemma3_text": SMALL | SLIDING | {"sliding_window": 8, "tie_word_embeddings": True},
    "qwen3_moe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip
VISION = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def make_model(family, settings=None, dtype=torch.float32):
    """The same weights in every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(settings or FAMILIES[family]))
    loader = (
        transformers.AutoModelForImageTextToText
        if hasattr(config, "vision_config")
        else transformers.AutoModelForCausalLM
    )
    model = loader.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS
    return model.to(dtype).eval()


def write_family(family, folder, settings=None):
    """A checkpoint of such a model with the warm start's tokenizer; its path."""
    model = make_model(family, settings)
    model.save_pretrained(folder)
    if not hasattr(model.config, "vision_config"):
        AutoTokenizer.from_pretrained(TEXT).save_pretrained(folder)
        return str(folder)
    processor = transformers.AutoProcessor.from_pretrained(VL)
    images, videos = processor.image_processor, processor.video_processor
    images.patch_size = videos.patch_size = model.config.vision_config.patch_size
    if family == "qwen3_vl":
        side = 16 * 2
        images.size = {"shortest_edge": side**2, "longest_edge": 16 * side**2}
        processor = transformers.Qwen3VLProcessor(
            image_processor=images,
            tokenizer=processor.tokenizer,
            video_processor=transformers.Qwen3VLVideoProcessor(patch_size=16),
            chat_template=processor.chat_template,
        )
    processor.save_pretrained(folder)
    return str(folder)


def build(path, shared_prompt="auto", **settings):
    processing = Processing(path, PromptSection())
    policy = Policy(ModelSection(path=path, **settings), processing, shared_prompt=shared_prompt)
    return processing, policy


def trained(policy):
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def prompts_for(processing, count=2):
    """With images for a vision model, and one of text only."""
    kind = VL if processing.is_multimodal else TEXT
    made = [processing.prompt(example) for example in examples(kind, count)]
    return [*made, processing.prompt(Example("t", "What is 2+2?", "4"))]


def batch_for(processing, policy):
    prompts = prompts_for(processing)
    random = torch.Generator().manual_seed(3)
    rows = []
    for index in range(len(prompts)):
        for length in (5, 9, 2):
            ids = torch.randint(0, WORDS, (length,), generator=random).tolist()
            completion = Completion(tuple(ids), (0.0,) * length, "", "length", 0)
            rows.append(UpdateRow(index, completion, float(torch.randn((), generator=random))))
    return micro_batch(prompts, rows, policy.device)


def randomise_lora(policy, std=0.1):
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std)


def gradients(policy, batch):
    policy.train()
    policy.zero_grad()
    logp_BT, _ = policy(batch)
    (logp_BT * batch.advantage_B[:, None]).sum().div(batch.mask_BT.sum()).backward()
    return logp_BT.detach(), {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}


def require_equal(one, two, rtol=1e-5):
    """Log-probabilities and gradients that differ by no more than the order of their sums."""
    (logp_1, grads_1), (logp_2, grads_2) = one, two
    assert (logp_1 - logp_2).abs().max() <= rtol * logp_2.abs().max()
    assert grads_1.keys() == grads_2.keys()
    largest = max(grad.abs().max() for grad in grads_2.values())
    assert largest > 0
    assert max((grads_1[n] - grads_2[n]).abs().max() for n in grads_1) <= rtol * largest
