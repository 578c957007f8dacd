#!/usr/bin/env bash
# Evaluates checkpoints side by side: pass@k with intervals, greedy accuracy, length, entropy.
#
#   ./scripts/evaluate.sh MODEL [MODEL …] [--config CONFIG] [--out FOLDER] [key=value …]
#
#   ./scripts/evaluate.sh runs/paper/geometry3k_qwen2.5_vl_3b
#   ./scripts/evaluate.sh Qwen/Qwen2.5-VL-3B-Instruct runs/paper/geometry3k_qwen2.5_vl_3b \
#       --config configs/paper/geometry3k_qwen2.5_vl_3b.yaml --out runs/compare
#   ./scripts/evaluate.sh runs/paper/math_qwen2.5_math_7b evaluate.samples=256
#
# MODEL is a run folder (its newest checkpoint), a checkpoint, or a model's folder or hub id. Without
# --config the benchmarks and settings are those of the first MODEL's run. One process on one GPU.
source "$(dirname "$0")/launch.sh"
if wants_help "$@"; then show_help "$0"; exit 0; fi
PROCESSES=1 launch eval "$@"
