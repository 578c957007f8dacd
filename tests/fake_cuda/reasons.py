"""Why the host reads from the device: each place at which it waits during an update or while sampling."""

_GRID = "transformers takes the sizes of images from the tensor that it gets, which is on the device"
_COUNT = "transformers compares the number of placeholders with that of features, and writes a message in any case"

REASONS = {
    "model/shared_prompt.py:_require_no_placeholder": "a completion with an image placeholder is refused by name",
    "step.py:UpdateTotals.read": "statistics of all micro-batches at once, for the metrics",
    "parallel/strategies.py:Replicated.clip": "a gradient that is not finite must not reach the optimiser",
    "rollout/hf.py:HFEngine._generate": "which completions have ended: when to stop, and which rows leave the batch",
    "rollout/hf.py:HFEngine._completions": "the sampled tokens and their log-probabilities, at the end",
    "transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py:Qwen2_5_VLModel.get_image_features": _GRID,
    "transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py:Qwen2_5_VLModel.get_rope_index": _GRID,
    "transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py:Qwen2_5_VLModel.get_vision_position_ids": _GRID,
    "transformers/vision_utils.py:get_vision_position_ids": _GRID,
    "transformers/vision_utils.py:get_vision_window_index": _GRID,
    "transformers/vision_utils.py:get_vision_cu_seqlens": _GRID,
    "transformers/utils/generic.py:get_max_seqlen": "the longest window, from the bounds on the device",
    "transformers/utils/import_utils.py:torch_compilable_check": _COUNT,
    "transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py:Qwen2_5_VLModel.get_placeholder_mask": _COUNT,
}
"""Place -> reason. A place that is not here fails the test; so does one here that is gone."""
