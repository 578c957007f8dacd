#!/usr/bin/env bash
# Trains a text model on every GPU of this machine, or on its CPU if it has none.
#
#   ./scripts/train_llm.sh [CONFIG] [key=value | FILE.yaml …]
#
#   ./scripts/train_llm.sh configs/paper/math_qwen2.5_math_7b.yaml
#   ./scripts/train_llm.sh configs/paper/math_qwen2.5_math_7b.yaml configs/with/dapo_agrae.yaml
#   ./scripts/train_llm.sh configs/paper/math_llama_3.2_3b.yaml configs/with/lora_24gb.yaml
#   ./scripts/train_llm.sh configs/paper/math_qwen2.5_math_7b.yaml configs/with/lora_24gb.yaml rollout.engine=hf
#   PROCESSES=2 ./scripts/train_llm.sh configs/quickstart_text.yaml train.steps=2 --overwrite
#
# What a config needs is shown beforehand by `mm-agrae doctor CONFIG`. The same command again goes on
# with the run. PROCESSES: how many; not set: one a GPU. PARALLEL: multi_gpu (a copy on each), fsdp2
# (sharded) or fsdp2_offload; not set: fsdp2 for full tuning, multi_gpu for LoRA.
source "$(dirname "$0")/launch.sh"
if wants_help "$@"; then show_help "$0"; exit 0; fi
launch train "$@"
