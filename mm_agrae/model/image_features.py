"""Image features: each distinct image goes through the vision tower once.

Prompts with the same image hold the same tensor of pixels (`Processing` sees to it), so images are
told apart by that tensor's identity.

- A frozen tower always gives the same features: they are cached while the pixels are alive.
- A trained tower gives other features after every optimiser step. Within one, an image that
  several micro-batches need is encoded by the first of them. All but the last get a detached copy
  of the features, which collects its gradient; the last gets the features themselves and, in its
  own backward pass, passes the sum of all gradients on to the tower.
"""

import contextlib
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mm_agrae.model.loading import model_modules
from mm_agrae.types import MicroBatch, Prompt

Features = list[Tensor]
"""One [tokens, hidden size] for each image of a prompt."""


class ImageFeatures:
    """The features of a policy's images, cached. `frozen` says that its tower is not trained."""

    def __init__(self, frozen: bool):
        self.frozen = frozen
        self._cached: Any = WeakTensorKeyDictionary()
        self._uses: Counter[int] = Counter()
        # Features that later micro-batches need as well, and the copies that earlier ones got.
        self._pending: dict[int, tuple[Features, list[Features]]] = {}

    def plan(self, batches: Iterable[MicroBatch]) -> None:
        """Announce the micro-batches of one optimiser step, each run once, in any order.

        Raises RuntimeError if gradients of the step before never reached the tower.
        """
        if self._pending:
            raise RuntimeError(
                f"{len(self._pending)} images still wait for a micro-batch that was planned and "
                "never ran: their gradients have not reached the vision tower"
            )
        self._uses.clear()
        if self.frozen:
            return
        for batch in batches:
            self._uses.update({_key(prompt) for prompt in _with_images(batch.prompts)})

    def of(self, prompts: Sequence[Prompt], encode: Callable[[list[Prompt]], list[Features]]) -> Features:
        """Features of all images of `prompts` in order; `encode` runs the tower on new ones."""
        distinct = {_key(prompt): prompt for prompt in _with_images(prompts)}
        learning = torch.is_grad_enabled() and not self.frozen
        found: dict[int, Features] = {}
        for key, prompt in distinct.items():
            if self.frozen and prompt.pixel_values in self._cached:
                found[key] = self._cached[prompt.pixel_values]
            elif learning and key in self._pending:
                found[key] = self._pending[key][0]
        new = {key: prompt for key, prompt in distinct.items() if key not in found}
        # An image that waits for later micro-batches is encoded alone: what goes through the tower
        # together must go back through it together.
        alone = [[key] for key in new if learning and self._uses[key] > 1]
        rest = [key for key in new if [key] not in alone]
        with torch.set_grad_enabled(learning):
            for keys in [*alone, rest] if rest else alone:
                found.update(zip(keys, encode([new[key] for key in keys]), strict=True))
        if self.frozen:
            self._cached.update({prompt.pixel_values: found[key] for key, prompt in new.items()})
        elif learning:
            found = {key: self._for_this_batch(key, features) for key, features in found.items()}
        return [each for prompt in _with_images(prompts) for each in found[_key(prompt)]]

    def _for_this_batch(self, key: int, features: Features) -> Features:
        """What this micro-batch gets for the image, so that no gradient is lost or doubled."""
        self._uses[key] -= 1
        if self._uses[key] > 0:
            copy = [each.detach().requires_grad_() for each in features]
            self._pending.setdefault(key, (features, []))[1].append(copy)
            return copy
        _, copies = self._pending.pop(key, (features, []))
        if copies:
            for each, *others in zip(features, *copies, strict=True):
                each.register_hook(functools.partial(_add_gradients, others))
        return features


def _add_gradients(copies: Features, gradient: Tensor) -> Tensor:
    return sum((copy.grad for copy in copies if copy.grad is not None), start=gradient)


def _with_images(prompts: Iterable[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.pixel_values is not None]


def _key(prompt: Prompt) -> int:
    return id(prompt.pixel_values)


def accepts_features(hf: Any) -> bool:
    """Whether a transformers model's backbone accepts image features in place of pixels."""
    visual = model_modules(hf).get("vision")
    # With a deepstack (Qwen3-VL) there is more than one tensor for each image.
    if visual is None or hasattr(visual, "deepstack_merger_list"):
        return False
    return "mm_encoder_outputs" in inspect.signature(hf.base_model.forward).parameters


def pixel_inputs(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """The backbone's arguments for the images of `prompts` as pixels; none without images."""
    inputs = {}
    for name in ("pixel_values", "image_grid_thw"):
        tensors = [value for each in prompts if (value := getattr(each, name)) is not None]
        if tensors:
            inputs[name] = torch.cat(tensors).to(device)
    return inputs


def feature_inputs(features: Features) -> dict[str, Any]:
    """The backbone's arguments for images whose features are known already."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(pooler_output=tuple(features))  # type: ignore[arg-type]
    return {"mm_encoder_outputs": {"image": output}}


def encode_images(backbone: Any, prompts: Sequence[Prompt], device: torch.device) -> list[Features]:
    """The features of each prompt's images by one pass through the vision tower."""
    encoded = backbone.get_image_features(**pixel_inputs(prompts, device), return_dict=True)
    features = iter(encoded.pooler_output)
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return [list(itertools.islice(features, len(grid))) for grid in grids]


@contextlib.contextmanager
def dummy_image_forward(hf: Any, device: torch.device) -> Iterator[None]:
    """Forward passes inside run the vision tower on a blank image and add 0 times its output.

    For a rank whose micro-batch has no images while the tower is trained: the other ranks wait for its share in
    gathering the tower's weights and in summing its gradients. The 0 is added to the embeddings, where image features
    go in, so that the forward and backward pass make the same collective calls in the same order.
    """
    zero = _zero_from_vision_tower(hf, device)
    embeddings = hf.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: output + zero)
    try:
        yield
    finally:
        hook.remove()


def _zero_from_vision_tower(hf: Any, device: torch.device) -> Tensor:
    tower: Any = model_modules(hf)["vision"]
    # Values of one patch: the first weight of the patch embedding is [channels, *patch].
    patch = next(p.shape[1:].numel() for p in tower.patch_embed.parameters() if p.dim() > 1)
    size = hf.config.vision_config.spatial_merge_size
    blank = torch.zeros(size * size, patch, device=device)
    grid_13 = torch.tensor([[1, size, size]], device=device)
    output = dict(hf.base_model.get_image_features(blank, grid_13, return_dict=True))
    output.pop("last_hidden_state", None)  # before the merger: not used for real images either
    return sum(0 * tensor.float().sum() for tensor in _tensors(output))  # type: ignore[return-value]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
