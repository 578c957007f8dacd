"""Example -> Prompt: chat template, images, token ids. The only owner of tokenizer and processor.

Each prompt is processed exactly once, and the tensors made here serve rollout and update. Several threads may prepare
prompts: their images are decoded and resized side by side, only the tokenizer is for one at a time.
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import itertools
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakValueDictionary

from mm_agrae.config import PromptSection, SamplingSection
from mm_agrae.errors import SKIP, DataError, ModelError, one_line
from mm_agrae.model.compat import prepare
from mm_agrae.model.loading import cannot_load
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.tasks.images import open_image
from mm_agrae.types import Example, Prompt

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGE_MARKER = "<image>"

PROBE, ANSWER = "{question}", "{answer}"
"""Texts that a chat template is probed with."""

PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
"""Tokens of the Qwen family that only the processor may write."""

THINK = "<think>"
"""Opens the thinking part, in completions and at the end of some chat templates."""

CHAT_TEMPLATES = {
    "55b2f4a2": "Qwen2.5",
    "a0bc6f6f": "Qwen2.5-VL",
    "a55ee1b1": "Qwen3",
    "9d879ef9": "Qwen3-VL",
    "ba03a121": "Llama-3",
    "93c0e9aa": "Llama-3.1",
    "d82792f9": "Llama-3.2",
    "56a1447a": "DeepSeek-R1-Distill",
    "ecd6ae51": "Gemma",
    "8d9e3a3c": "Gemma-3",
    "82e45de2": "mm-agrae warm start",
}
"""Published chat templates by the start of their SHA-256, surrounding white space stripped."""

TODAY = datetime.date(2024, 7, 26)
"""The date given to chat templates (Llama 3 writes it into every prompt), fixed so that the same
data give the same prompts on any day. Meta's own templates fall back to this one."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _exclusive(method: Method) -> Method:
    """For methods of `Processing`: tokenizers are not made for two threads at once, and prompts are
    prepared in some while rollout and update run in another."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any) -> Any:
        with self._lock:
            return method(self, *args)

    return cast(Method, locked)


class Processing:
    """Tokenizer and, for a vision-language model, image processor of one checkpoint.

    `path` may also be a LoRA adapter; what its folder lacks comes from its base model. Raises
    ModelError if the checkpoint's processor or chat template cannot be loaded or does not fit.
    """

    def __init__(self, path: str, prompt: PromptSection, *, trust_remote_code: bool = False):
        prepare()
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

        self.path = path
        self.settings = prompt
        model, adapter = model_and_adapter(path)
        own_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            self.is_multimodal = hasattr(config, "vision_config")
            loader = AutoProcessor if self.is_multimodal else AutoTokenizer
            self.processor: Any = loader.from_pretrained(
                adapter if own_tokenizer else model, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # other people's files and, if trusted, their code
            raise cannot_load(path, "config and processor", error) from error
        self.family: str = config.model_type
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        if self.is_multimodal:
            self._set_pixel_budget()
        self._control = _control_tokens(self.tokenizer)
        self._lock = threading.Lock()
        self._pixels: WeakValueDictionary[bytes, torch.Tensor] = WeakValueDictionary()
        self.template = self._chat_template()
        self.image_token_id: int | None = getattr(config, "image_token_id", None)
        self._probe_template()
        try:
            self._generation = GenerationConfig.from_pretrained(model)
        except OSError:
            self._generation = GenerationConfig()
        text_eos = getattr(config.get_text_config(), "eos_token_id", None)
        named = (self.tokenizer.eos_token_id, self._generation.eos_token_id, text_eos)
        self.eos_ids = _ids(*named, self._end_of_turn())
        """Ids that end a completion: those the checkpoint names, and the one with which the chat
        template ends a turn (a base model's own is another)."""
        if not self.eos_ids:
            raise ModelError(f"model.path {path!r}: names no end-of-sequence token")
        ends = (self._end_of_turn(), self.tokenizer.eos_token_id, self.eos_ids[0])
        self.end_id: int = next(index for index in ends if index is not None)
        """The one of them that ends a completion by the chat template."""
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = min(self.eos_ids) if pad is None else pad
        forbidden = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        named = self.tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
        forbidden += [index for index in named if index != self.tokenizer.unk_token_id]
        if self.pad_id not in self.eos_ids:
            forbidden.append(self.pad_id)
        self.forbidden_ids = _ids(*forbidden)
        """Ids that a policy never samples: image, video and padding placeholders."""

    def prompt(self, example: Example) -> Prompt:
        """Render, tokenize and process one example. Threads may share this object.

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
        for text in (question, example.system, *(text for _, text in example.history)):
            if found := self._control.search(text):
                raise DataError(f"{where}: the question holds the control token {found[0]}; remove it")
        originals = [open_image(source, origin=where) for source in example.images]
        images = [self._shown(image) for image in originals]
        if not images:
            return self._with_text(example, question, where)
        sizes = [tuple(image.size for image in each) for each in (originals, images)]
        example = replace(example, image_sizes=sizes[0], shown_sizes=sizes[1])
        # Not by way of the processor, which would have images wait for the tokenizer.
        patches = self.processor.image_processor(images, do_resize=False, return_tensors="pt")
        made = (patches["pixel_values"], patches["image_grid_thw"])
        return self._with_text(example, question, where, images, _digest(images), *made)

    @_exclusive
    def _with_text(
        self,
        example: Example,
        question: str,
        where: str,
        images: Sequence[Image.Image] = (),
        digest: bytes = b"",
        pixel_values: Any = None,
        image_grid_thw: Any = None,
    ) -> Prompt:
        text = self._render_example(example, question, where)
        long = self._with_placeholders(text, image_grid_thw, where) if images else text
        # The template writes all control tokens itself, BOS included.
        token_ids = self.tokenizer([long], return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        if len(token_ids) > self.settings.max_tokens:
            raise DataError(
                f"{where}: the prompt is {len(token_ids)} tokens, more than prompt.max_tokens = "
                f"{self.settings.max_tokens}; raise it (for a new run lower prompt.max_pixels), or set "
                f"{SKIP}"
            )
        return Prompt(
            example=example,
            text=text,
            token_ids=token_ids,
            mm_token_type_ids=(token_ids == self.image_token_id).long() if images else None,
            # One copy for the same images, as long as one of their prompts is alive.
            pixel_values=self._pixels.setdefault(digest, pixel_values) if images else None,
            image_grid_thw=image_grid_thw,
            images=tuple(images),
        )

    def _with_placeholders(self, text: str, grid_N3: torch.Tensor, where: str) -> str:
        """The text with as many placeholders for an image as it has features, as Qwen's processors write it."""
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        first, *rest = text.split(token)
        if len(rest) != len(grid_N3):
            raise DataError(f"{where}: {len(rest)} image placeholders for {len(grid_N3)} images")
        features_N = grid_N3.prod(-1) // self.processor.image_processor.merge_size**2
        return first + "".join(token * int(count) + piece for count, piece in zip(features_N, rest, strict=True))

    @property
    def opens_thinking(self) -> bool:
        """Whether the prompt ends inside a thinking part, as with DeepSeek's distilled models.

        Completions then hold only the closing tag; one without it is thinking throughout.
        """
        return self._ending.rfind(THINK) > self._ending.rfind("</think>")

    def describe(self) -> list[tuple[str, str]]:
        """How prompts are made, as (name, value) lines for the start of a run."""
        digest = hashlib.sha256(self.template.strip().encode()).hexdigest()[:8]
        published = CHAT_TEMPLATES.get(digest, "not a published one")
        origin = self.settings.chat_template or "the checkpoint's own"
        lines = [
            ("model", f"{self.family}, {type(self.processor).__name__}"),
            ("chat template", f"{published} ({digest}), {origin}"),
            ("system prompt", self.settings.system or "the template's default"),
            ("prompt", repr(self._render(PROBE))),
            ("thinking", "opened by the prompt" if self.opens_thinking else "left to the model"),
        ]
        if self.is_multimodal:
            low, high = self._pixel_budget()
            tokens = f"up to {high // self._side**2:,} tokens an image"
            lines.append(("pixels", f"{low:,} to {high:,}, {tokens}"))
        names = self.tokenizer.convert_ids_to_tokens
        for label, ids in (("ends at", self.eos_ids), ("never sampled", self.forbidden_ids)):
            listed = [f"{name} ({index})" for name, index in zip(names(ids), ids, strict=True)]
            lines.append((label, ", ".join(listed) or "none"))
        return lines

    @_exclusive
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion without control tokens. Never raises on sampled ids.

        Where the prompt opens the thinking part, its tag is put in front, so that rewards and
        readers can tell thinking from answer even if it was never closed.
        """
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return f"{THINK}\n{text}" if self.opens_thinking else text

    @_exclusive
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is put into a completion; none for one that holds a control token."""
        return () if self._control.search(text) else tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @_exclusive
    def save(self, folder: str, sampling: SamplingSection | None = None) -> None:
        """Write tokenizer, processor, chat template, and by what transformers' generate and vLLM sample: as a training
        with `sampling` did, or as the model's own file says, and up to the ids that end a completion here."""
        self.processor.save_pretrained(folder)
        made = copy.deepcopy(self._generation)
        if sampling is not None:
            made = type(made)(do_sample=True, **sampling.model_dump(include={"temperature", "top_p", "top_k"}))
            made.suppress_tokens = list(self.forbidden_ids) or None
        made.eos_token_id, made.pad_token_id = list(self.eos_ids), self.pad_id
        made.save_pretrained(folder)

    def _shown(self, image: Image.Image) -> Image.Image:
        """The image as the model sees it: sides that are multiples of `_side`, an area within the budget."""
        from qwen_vl_utils.vision_process import smart_resize

        (width, height), side, (low, high) = image.size, self._side, self._pixel_budget()
        new_height, new_width = smart_resize(height, width, side, low, high)
        if not 0 < new_height * new_width <= high:  # a thin image, of which it rounds a side to 0 or up
            aspect = max(image.size) / min(image.size)
            short = max(side, int(math.sqrt(high / aspect)) // side * side)
            long = min(int(math.sqrt(high * aspect)), high // short) // side * side
            new_width, new_height = (short, long) if width < height else (long, short)
        return image.resize((new_width, new_height))

    @property
    def _side(self) -> int:
        """Pixels along a side of what becomes one token."""
        return self.processor.image_processor.patch_size * self.processor.image_processor.merge_size

    def _pixel_budget(self) -> tuple[int, int]:
        """Smallest and largest area; where settings and checkpoint cross, the setting wins."""
        size, settings = self.processor.image_processor.size, self.settings
        low = settings.min_pixels or size["shortest_edge"]
        high = settings.max_pixels or size["longest_edge"]
        if settings.min_pixels and settings.max_pixels:
            return low, high
        return (low, max(low, high)) if settings.min_pixels else (min(low, high), high)

    def _set_pixel_budget(self) -> None:
        """Have checkpoints and exports say the budget trained with.

        Raises ModelError unless images become patches under a pixel budget, as Qwen's do.
        """
        image_processor: Any = getattr(self.processor, "image_processor", None)
        size = getattr(image_processor, "size", None) or {}
        fits = all(hasattr(image_processor, name) for name in ("patch_size", "merge_size"))
        # Not hasattr(size, …): transformers' class of sizes has all fields.
        if not fits or None in (size.get("shortest_edge"), size.get("longest_edge")):
            raise ModelError(
                f"model.path {self.path!r}: {type(self.processor).__name__} of family "
                f"{self.family} does not cut images into patches as Qwen's processors do "
                "(patch_size, merge_size, a budget of pixels); Qwen2-VL, Qwen2.5-VL and Qwen3-VL "
                "fit"
            )
        side = self._side
        low, high = self._pixel_budget()
        if low > high or high < side**2:
            raise ModelError(
                f"prompt.min_pixels = {low} and prompt.max_pixels = {high}: this model needs "
                f"min_pixels ≤ max_pixels and max_pixels ≥ {side**2} (one token of "
                f"{side}×{side} pixels)"
            )
        image_processor.size = type(size)(shortest_edge=low, longest_edge=high)

    def _chat_template(self) -> str:
        path = self.settings.chat_template
        if path:
            try:
                template: Any = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise ModelError(
                    f"prompt.chat_template {path}: cannot be read ({error}); correct the path, or "
                    "leave it empty for a checkpoint trained with it, which has it saved"
                ) from None
            # Saved with every checkpoint, which then needs no template file.
            self.processor.chat_template = self.tokenizer.chat_template = template
            return template
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ModelError(
                f"model.path {self.path!r}: has no chat template; choose an instruct model, or "
                "name a Jinja file in prompt.chat_template"
            )
        return template

    def _render_example(self, example: Example, question: str, where: str) -> str:
        """The prompt's text. Raises DataError for a system turn that the template drops, or turns that it refuses."""
        history, left = [], len(example.images)
        for role, text in example.history:
            markers = text.count(IMAGE_MARKER)
            history.append({"role": role, "content": _content(text, markers, where)})
            left -= markers
        content = _content(question, left, where)
        if not example.system and not history:
            return self._render(content)
        try:
            text = self._render(content, system=example.system, history=history)
        except Exception as error:  # a template is a program by someone else
            problem = f"takes no such turns ({one_line(error)})"
        else:
            if example.system.strip() in text:
                return text
            problem = "leaves the row's system turn out"
        raise DataError(f"{where}: the chat template {problem}; columns: {{system: null}} reads rows without theirs")

    def _render(
        self, content: Any, answer: str | None = None, *, system: str = "", history: Sequence[dict[str, Any]] = ()
    ) -> str:
        messages = [*history, {"role": "user", "content": content}]
        if system := system or self.settings.system:
            messages.insert(0, {"role": "system", "content": system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=answer is None,
            strftime_now=TODAY.strftime,
        )

    def _probe_template(self) -> None:
        """Render a prompt. Raises ModelError if the template fails or drops one of its inputs."""
        named = self.settings.chat_template or "its chat template"
        where = f"model.path {self.path!r}: {named}"
        remedy = "leave prompt.system empty and say it in prompt.instruction"
        try:
            text = self._render(PROBE)
        except Exception as error:  # a template is a program by someone else
            problem = f"fails: {one_line(error)}"
            if self.settings.system and "system" in str(error).lower():
                problem = f"takes no system prompt ({one_line(error)}); {remedy}"
            raise ModelError(f"{where} {problem}") from None
        if PROBE not in text:
            raise ModelError(f"{where} leaves the question out")
        if self.settings.system.strip() not in text:
            raise ModelError(f"{where} leaves the system prompt out; {remedy}")
        self._ending = text.rpartition(PROBE)[2]
        if self.is_multimodal:
            text = self._render(_content(PROBE, 1, ""))
            ids = self.tokenizer([text], add_special_tokens=False)["input_ids"][0]
            if ids.count(self.image_token_id) != 1:
                raise ModelError(f"{where} writes no placeholder for an image")

    def _end_of_turn(self) -> int | None:
        """The control token that the template writes after the assistant's turn."""
        try:
            text = self._render(PROBE, answer=ANSWER)
        except Exception:  # a template for single questions may refuse an assistant's turn
            return None
        _, found, rest = text.rpartition(ANSWER)
        token = self._control.match(rest.lstrip()) if found else None
        return self.tokenizer.convert_tokens_to_ids(token[0]) if token else None


def _digest(images: Sequence[Image.Image]) -> bytes:
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return digest.digest()


def _ids(*values: Any) -> tuple[int, ...]:
    """All ids in `values`, each of them one, several or None."""
    listed = (value if isinstance(value, list | tuple) else [value] for value in values)
    return tuple(sorted({*itertools.chain.from_iterable(listed)} - {None}))


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches what a question must not contain: special tokens, and tokens that look like them."""
    names = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or token.content.startswith(("<|", "<｜"))
    }
    # Without names the pattern must match nothing, not everything.
    return re.compile("|".join(map(re.escape, sorted(names, reverse=True))) or r"(?!)")


def _content(question: str, images: int, where: str) -> str | list[dict[str, str]]:
    """Chat content with an image at each `<image>` marker, or all in front if there is none."""
    pieces = re.split(re.escape(IMAGE_MARKER), question)
    markers = len(pieces) - 1
    if markers not in (0, images):
        raise DataError(f"{where}: {markers} {IMAGE_MARKER} markers for {images} images")
    if images == 0:
        return question
    if markers == 0:
        return [{"type": "image"}] * images + [{"type": "text", "text": question}]
    content: list[dict[str, str]] = []
    for piece in pieces:
        if piece.strip():
            content.append({"type": "text", "text": piece})
        content.append({"type": "image"})
    return content[:-1]
