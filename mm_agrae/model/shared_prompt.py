"""The update without repeated prompts: `[prompt + images][completion 1]…[completion G]` in a row.

The completions of a group share their prompt, so its tokens and images need to go through the model once, not G times.
All groups of a micro-batch stand one after another in one row, each prompt followed by its completions. A completion
attends to its prompt and to itself, and its positions continue from the prompt's end, so log-probabilities and
gradients equal those of the repeated batch. The last token of a completion predicts nothing and is left out.

A prompt of 5 tokens with completions of 3, 1 and 2 tokens becomes a row of 8:

    prompt        11 12 13 14 15
    completions   21 22 23 | 31 | 41 42

    input_ids     11 12 13 14 15 | 21 22 | 41
    position_ids   0  1  2  3  4 |  5  6 |  5

    source_N       4  5  6 |  4 |  4  7     index in the row of the state that predicts a token
    target_N      21 22 23 | 31 | 41 42     that token
    row_N          0  0  0 |  1 |  2  2     its place in token_BT of the micro-batch
    column_N       0  1  2 |  0 |  0  1

The prompt's last token (index 4) predicts the first token of all three completions; the one token of the second needs
no place in the row. A second group would follow from index 8 on, its positions from 0.

The model's classes stay as they are: `install` selects an attention function from transformers' registry that does
what `sdpa` does unless a forward call brings a `PackedLayout` as keyword argument.

    install(hf)                                  # once, where unsupported_reason(hf) is None
    packed = pack(hf.base_model, batch)
    hidden_NH = hidden_states(hf.base_model, packed)
    logp_N, entropy_N = head_logprobs(hf.get_output_embeddings(), hidden_NH, packed.target_N)
    logp_BT = packed.unpack(logp_N)

`packed_layout` describes the row to attention, `shared_attention` computes it, and `last_layer`
skips what nothing is predicted from.

Shapes: S tokens of the row, N predicted tokens; P tokens of a prompt; H heads of size D; B and T as in a MicroBatch.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_agrae.errors import DataError, ModelError, one_line
from mm_agrae.model import last_layer, shared_attention
from mm_agrae.model.activations import recompute_elementwise
from mm_agrae.model.image_features import pixel_inputs
from mm_agrae.model.packed_layout import GroupSpans, PackedLayout
from mm_agrae.types import Example, MicroBatch, Prompt

ATTENTION = "mm_agrae_shared_prompt"
"""Name of the attention function in transformers' registry."""

PLACEHOLDERS = ("image_token_id", "video_token_id")
"""Config fields that name the tokens which stand for image features."""


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A micro-batch as one row of model inputs, and where its N predictions belong.

    `input_ids` are [1,S], `position_ids` [3,1,S] for models with images, else [1,S]. The hidden
    state at `source_N` predicts token `target_N`, which stands at `row_N`, `column_N` of [B,T].
    `prompts` are in the order of the row, those without any completion tokens left out.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    source_N: Tensor
    target_N: Tensor
    row_N: Tensor
    column_N: Tensor
    shape: torch.Size
    prompts: tuple[Prompt, ...]

    def unpack(self, value_N: Tensor) -> Tensor:
        """One value per prediction -> [B,T], zeros on padding."""
        return value_N.new_zeros(self.shape).index_put((self.row_N, self.column_N), value_N)


def pack(backbone: Any, batch: MicroBatch) -> PackedRow:
    """Lay the micro-batch out in one row, on the device of its tokens.

    `backbone` is the model below the vocabulary head (`hf.base_model`), asked for its config and positions.
    Completions without tokens are left out. Raises DataError naming the example if image placeholders,
    `mm_token_type_ids` and image sizes do not agree, or if a completion holds an image placeholder.
    """
    device = batch.token_BT.device
    _require_no_placeholder(backbone.config, batch)
    length_B = batch.length_B.tolist()
    members: dict[int, list[int]] = {}  # prompt index -> rows of its completions
    for row, index in enumerate(batch.prompt_index_B.tolist()):
        if length_B[row]:
            members.setdefault(index, []).append(row)
    # A rank without tokens runs the model all the same, to take part in the collective calls.
    members = members or {0: []}
    ids, positions, groups = [], [], []
    places: list[tuple[int, int, int]] = []  # of each prediction: source, row, column
    end = 0
    for index, rows in members.items():
        prompt = batch.prompts[index]
        _require_matching_images(backbone.config, prompt)
        position_3P = _positions(backbone, prompt)
        # Image tokens share positions, so the next one is not simply the prompt's length.
        following = int(position_3P.max()) + 1
        ids.append(prompt.token_ids.to(device))
        positions.append(position_3P)
        prompt_span = (end, end + len(prompt))
        end += len(prompt)
        spans = []
        for row in rows:
            # Each token is predicted from the one before it, the first from the prompt's last.
            # The completion's last token predicts nothing, so `inside` tokens go into the row.
            inside = length_B[row] - 1
            ids.append(batch.token_BT[row, :inside])
            positions.append(torch.arange(following, following + inside).expand(3, -1))
            sources = (prompt_span[1] - 1, *range(end, end + inside))
            places += [(source, row, column) for column, source in enumerate(sources)]
            if inside:
                spans.append((end, end + inside))
            end += inside
        groups.append(GroupSpans(prompt_span, tuple(spans)))
    position_31S = torch.cat(positions, dim=1)[:, None].to(device)
    # One transfer to the device instead of three.
    place_3N = torch.tensor(places, dtype=torch.long).view(-1, 3).T.to(device)
    source_N, row_N, column_N = place_3N.contiguous()
    return PackedRow(
        input_ids=torch.cat(ids)[None],
        position_ids=position_31S if hasattr(backbone, "get_rope_index") else position_31S[0],
        layout=PackedLayout(groups, device),
        source_N=source_N,
        target_N=batch.token_BT[row_N, column_N],
        row_N=row_N,
        column_N=column_N,
        shape=batch.token_BT.shape,
        prompts=tuple(batch.prompts[index] for index in members),
    )


def hidden_states(backbone: Any, packed: PackedRow, images: Mapping[str, Any] | None = None) -> Tensor:
    """Last hidden states [N, hidden size] from which `packed.target_N` are predicted.

    `images` are the backbone's keyword arguments for the images of `packed.prompts` in order, for
    callers that have their features; without them the pixels go through the vision tower.
    """
    device = packed.input_ids.device
    if images is None:
        images = pixel_inputs(packed.prompts, device)
    with recompute_elementwise():
        hidden_1SH = backbone(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # transformers passes a four-dimensional mask on as it is, and an empty one makes every
            # attention function but ours fail instead of computing something else.
            attention_mask=torch.empty(1, 1, 0, 0, device=device),
            use_cache=False,
            shared_prompt=packed.layout,
            **images,
        ).last_hidden_state
    return hidden_1SH[0].index_select(0, packed.source_N)


def _positions(backbone: Any, prompt: Prompt) -> Tensor:
    """Positions [3,P] of a prompt: time, height and width of image tokens, else all the same."""
    if prompt.image_grid_thw is None:
        return torch.arange(len(prompt)).expand(3, -1)
    assert prompt.mm_token_type_ids is not None
    positions_31P, _ = backbone.get_rope_index(
        prompt.token_ids[None].cpu(),
        mm_token_type_ids=prompt.mm_token_type_ids[None].cpu(),
        image_grid_thw=prompt.image_grid_thw.cpu(),
    )
    return positions_31P[:, 0]


def _require_matching_images(config: Any, prompt: Prompt) -> None:
    where = f"example {prompt.example.id!r} {prompt.example.origin}".rstrip()
    grid_N3, kinds = prompt.image_grid_thw, prompt.mm_token_type_ids
    placeholder = getattr(config, "image_token_id", None)
    placeholders = 0 if placeholder is None else int((prompt.token_ids == placeholder).sum())
    if (grid_N3 is None) != (prompt.pixel_values is None):
        raise DataError(f"{where}: pixel_values and image_grid_thw must be given together")
    if grid_N3 is None:
        if placeholders:
            raise DataError(f"{where}: {placeholders} image placeholder tokens, but no image")
        return
    if not hasattr(config, "vision_config"):
        raise DataError(f"{where}: has images, but the model takes text only")
    if kinds is None:
        raise DataError(
            f"{where}: has images but no mm_token_type_ids, without which its tokens would get "
            "one-dimensional positions; process it with return_mm_token_type_ids=True"
        )
    merge = config.vision_config.spatial_merge_size
    expected = int(grid_N3.prod(-1).sum()) // merge**2
    if not placeholders == int((kinds == 1).sum()) == expected:
        raise DataError(
            f"{where}: {placeholders} image placeholder tokens, {int((kinds == 1).sum())} tokens "
            f"marked as image, but the images give {expected} features"
        )


def _require_no_placeholder(config: Any, batch: MicroBatch) -> None:
    forbidden = [token for name in PLACEHOLDERS if (token := getattr(config, name, None)) is not None]
    if not forbidden:
        return
    device = batch.token_BT.device
    found_BT = torch.isin(batch.token_BT, torch.tensor(forbidden, device=device)) & batch.mask_BT.bool()
    if found_BT.any():
        row, column = found_BT.nonzero()[0].tolist()
        raise DataError(
            f"example {batch.prompts[int(batch.prompt_index_B[row])].example.id!r}: a completion holds token "
            f"{int(batch.token_BT[row, column])}, which stands for an image; exclude that id from sampling"
        )


def unsupported_reason(hf: Any, autocast: Callable[[], Any] = contextlib.nullcontext) -> str | None:
    """Why prompts cannot be shared for this model, in one line; None if they can.

    Looks at the config and then lets the model itself judge: two short completions, packed and one by one, must give
    the same hidden states, under `autocast` and, where the weights are not in 16 bits, strictly in their precision.
    Call it on the transformers model (below PEFT) before it is sharded over devices.
    """
    name, config = type(hf).__name__, hf.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"{name} has layers of kind {', '.join(sorted(other))}"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"model.attn_implementation is {config._attn_implementation}; it takes sdpa"
    if getattr(config, "use_bidirectional_attention", None):
        return f"{name} attends in both directions"
    if hasattr(hf.config, "vision_config") and not hasattr(hf.base_model, "get_rope_index"):
        return f"{name} does not say how it numbers image tokens (get_rope_index)"
    training, installed = hf.training, config._attn_implementation == ATTENTION
    hf.eval()
    try:
        install(hf)
        with autocast():
            errors = [(_probe(hf.base_model), 0.1)]
        if next(hf.parameters()).dtype.itemsize > 2:
            errors.append((_probe(hf.base_model), 1e-3))
    except Exception as failure:  # a foreign model class may fail in any way
        reason = f"{type(failure).__name__}: {one_line(failure)}"
        return f"{name} does not take a packed row ({reason})"
    finally:
        hf.train(training)
        if not installed:
            uninstall(hf)
    if wrong := [error for error, allowed in errors if not error < allowed]:
        return f"{name} computes something else on a packed row (relative difference {wrong[0]:.2g})"
    return None


@torch.no_grad()
def _probe(backbone: Any) -> float:
    """Relative difference of hidden states, packed against one by one."""
    device = next(backbone.parameters()).device
    images = {getattr(backbone.config, name, None) for name in PLACEHOLDERS}
    ids = torch.tensor([index for index in range(20) if index not in images][:13])
    token_BT = ids[5:13].view(2, 4).to(device)
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=device)
    prompt = Prompt(Example("probe", "", ""), "", ids[:5])
    nothing = mask_BT[:, 0].float()
    batch = MicroBatch([prompt], mask_BT[:, 0] * 0, token_BT, mask_BT, nothing, nothing)
    packed = pack(backbone, batch)
    ours = hidden_states(backbone, packed).float()
    theirs = []
    for token_T, mask_T in zip(token_BT, mask_BT, strict=True):
        ids = torch.cat([prompt.token_ids.to(device), token_T[mask_T.bool()]])[None]
        output = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        theirs.append(output[len(prompt) - 1 : -1].float())
    return float((ours - torch.cat(theirs)).norm() / torch.cat(theirs).norm())


def require_agreement(
    shared_BT: Tensor, repeated_BT: Tensor, mask_BT: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Compare log-probabilities (nats) of both ways. Raises ModelError if they disagree.

    Meant for the first micro-batch of a run, with real prompts and images. `dtype` is the
    precision that the model computes in.
    """
    error_N = (shared_BT - repeated_BT).detach().abs()[mask_BT.bool()].float()
    if not error_N.numel():
        return
    mean, largest = float(error_N.mean()), float(error_N.max())
    # Image tokens with wrong positions move log-probabilities by as little as 2e-3.
    allowed = (1e-4, 1e-3) if dtype.itemsize > 2 else (3e-2, 1.0)
    if not (mean <= allowed[0] and largest <= allowed[1]):
        raise ModelError(
            f"the shared-prompt update differs from the repeated batch: log-probabilities by "
            f"{mean:.1e} on average and {largest:.1e} at most (allowed {allowed[0]:.0e} and "
            f"{allowed[1]:.0e}); set update.shared_prompt=off"
        )


def install(hf: Any) -> None:
    """Let the model's text layers take a `PackedLayout`; without one they go on using sdpa.

    `hf` is the transformers model (below PEFT). Generation and plain forwards are unchanged.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    _set_attention(hf, ATTENTION)
    last_layer.install(hf)


def uninstall(hf: Any) -> None:
    """Undo `install`."""
    _set_attention(hf, "sdpa")
    last_layer.uninstall(hf)


def _set_attention(hf: Any, name: str) -> None:
    key = "" if hf.config.get_text_config() is hf.config else "text_config"
    hf.set_attn_implementation({key: name})


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared_prompt: PackedLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' registry: [1,H,S,D] -> [1,S,H,D].

    Raises ModelError if the layer asks for something that is not computed here (soft-capping,
    attention sinks, a position bias).
    """
    if shared_prompt is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
    special = ("softcap", "s_aux", "sinks", "position_bias")
    if asked := [name for name in special if others.get(name) is not None]:
        raise ModelError(
            f"{type(module).__name__} cannot share prompts: its attention has "
            f"{', '.join(asked)}; set update.shared_prompt=off"
        )
    last_layer.announce(module, shared_prompt.predicting, shared_prompt.length)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_attention.attention(
        query, key, value, shared_prompt,
        scale=scale, window=sliding_window or None, dropout=dropout,
    ), None  # fmt: skip
