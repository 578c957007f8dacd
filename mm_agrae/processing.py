"""Example -> Prompt: chat template, images, token ids. The only owner of tokenizer and processor.

Each prompt is processed exactly once, and the tensors made here serve rollout and update. The
number of image placeholders is checked against the number of image features of every row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mm_agrae.compat import prepare
from mm_agrae.config import PromptSection
from mm_agrae.errors import DataError, ModelError
from mm_agrae.images import open_image
from mm_agrae.types import Example, Prompt

IMAGE_MARKER = "<image>"

PLACEHOLDERS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)
"""Tokens of the Qwen family that only the processor may write."""


class Processing:
    """Tokenizer and, for a vision-language model, image processor of one checkpoint.

    Raises ModelError if the checkpoint's processor cannot be loaded.
    """

    def __init__(self, path: str, prompt: PromptSection, *, trust_remote_code: bool = False):
        prepare()
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

        self.path = path
        self.settings = prompt
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            self.is_multimodal = hasattr(config, "vision_config")
            loader = AutoProcessor if self.is_multimodal else AutoTokenizer
            self.processor: Any = loader.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"model.path {path!r}: cannot load its config and processor: {error}"
            ) from error
        self.tokenizer: Any = self.processor.tokenizer if self.is_multimodal else self.processor
        if not getattr(self.processor, "chat_template", None):
            raise ModelError(f"model.path {path!r}: has no chat template; choose an instruct model")
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:
            generation = GenerationConfig()
        text_config = config.get_text_config()
        self.eos_ids = _ids(
            self.tokenizer.eos_token_id, generation.eos_token_id, text_config.eos_token_id
        )
        if not self.eos_ids:
            raise ModelError(f"model.path {path!r}: names no end-of-sequence token")
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = min(self.eos_ids) if pad is None else pad
        vision_ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        for name in PLACEHOLDERS:
            index = self.tokenizer.convert_tokens_to_ids(name)
            if index is not None and index != self.tokenizer.unk_token_id:
                vision_ids.append(index)
        forbidden = set(_ids(*vision_ids))
        if self.pad_id not in self.eos_ids:
            forbidden.add(self.pad_id)
        self.forbidden_ids: tuple[int, ...] = tuple(sorted(forbidden))
        """Ids that a policy may never sample: image, video and padding placeholders."""
        self.image_token_id: int | None = getattr(config, "image_token_id", None)
        self._special = {
            token for token in self.tokenizer.all_special_tokens if token.startswith("<|")
        }

    def prompt(self, example: Example) -> Prompt:
        """Render, tokenize and process one example.

        Raises DataError naming the row: an unreadable image, more or fewer markers than images,
        control tokens in the text, or a prompt longer than `prompt.max_tokens`.
        """
        where = example.origin or example.id
        if example.images and not self.is_multimodal:
            raise DataError(
                f"{where}: has an image, but the model {self.path!r} is text-only; choose a "
                "vision-language model or a text task"
            )
        question = example.question
        if self.settings.instruction:
            question = f"{question}\n{self.settings.instruction}"
        for token in self._special:
            if token in question:
                raise DataError(f"{where}: the question holds the control token {token}; remove it")
        images = [self._image(source, where) for source in example.images]
        content: Any = question
        if self.is_multimodal and images:
            content = _interleave(question, len(images), where)
        messages = [{"role": "user", "content": content}]
        if self.settings.system:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if images:
            inputs = self.processor(
                text=[text],
                images=images,
                do_resize=False,
                return_tensors="pt",
                return_mm_token_type_ids=True,
            )
            self._check_image_tokens(inputs, len(images), where)
        else:
            inputs = self.tokenizer([text], return_tensors="pt", add_special_tokens=False)
        token_ids = inputs["input_ids"][0]
        if len(token_ids) > self.settings.max_tokens:
            raise DataError(
                f"{where}: the prompt is {len(token_ids)} tokens, more than prompt.max_tokens = "
                f"{self.settings.max_tokens}; raise it, lower prompt.max_pixels, or set "
                "data.on_bad_row=skip"
            )
        return Prompt(
            example=example,
            text=text,
            token_ids=token_ids,
            mm_token_type_ids=inputs["mm_token_type_ids"][0] if images else None,
            pixel_values=inputs["pixel_values"] if images else None,
            image_grid_thw=inputs["image_grid_thw"] if images else None,
            images=tuple(images),
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, control tokens left out. Never raises on sampled ids."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def save(self, folder: str) -> None:
        self.processor.save_pretrained(folder)

    def _image(self, source: Any, where: str) -> Any:
        from qwen_vl_utils import fetch_image

        image = open_image(source, origin=where)
        processor = self.processor.image_processor
        size = processor.size
        request = {
            "image": image,
            "min_pixels": self.settings.min_pixels or size["shortest_edge"],
            "max_pixels": self.settings.max_pixels or size["longest_edge"],
        }
        try:
            return fetch_image(request, image_patch_size=processor.patch_size)
        except ValueError as error:
            raise DataError(f"{where}: image of {image.width}×{image.height}: {error}") from None

    def _check_image_tokens(self, inputs: Any, images: int, where: str) -> None:
        placeholders = int((inputs["input_ids"] == self.image_token_id).sum())
        merge = self.processor.image_processor.merge_size**2
        features = int((inputs["image_grid_thw"].prod(-1) // merge).sum())
        if placeholders != features or len(inputs["image_grid_thw"]) != images:
            raise DataError(
                f"{where}: {placeholders} image placeholders for {features} image features of "
                f"{images} images"
            )


def _ids(*values: Any) -> tuple[int, ...]:
    found: set[int] = set()
    for value in values:
        if value is not None:
            found.update(value if isinstance(value, list | tuple) else [value])
    return tuple(sorted(found))


def _interleave(question: str, images: int, where: str) -> list[dict[str, str]]:
    """Chat content with a picture at each `<image>` marker, or all in front if there is none."""
    pieces = re.split(re.escape(IMAGE_MARKER), question)
    markers = len(pieces) - 1
    if markers == 0:
        return [{"type": "image"}] * images + [{"type": "text", "text": question}]
    if markers != images:
        raise DataError(f"{where}: {markers} {IMAGE_MARKER} markers for {images} images")
    content: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        if index:
            content.append({"type": "image"})
        if piece.strip():
            content.append({"type": "text", "text": piece})
    return content
