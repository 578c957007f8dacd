#!/usr/bin/env bash
# Trains a vision-language model on every GPU of this machine, or on its CPU if it has none.
#
#   ./scripts/train_vlm.sh [CONFIG] [key=value | FILE.yaml …]
#
#   ./scripts/train_vlm.sh configs/paper/geometry3k_qwen2.5_vl_3b.yaml
#   ./scripts/train_vlm.sh configs/paper/geometry3k_qwen2.5_vl_3b.yaml configs/with/dapo_agrae.yaml
#   ./scripts/train_vlm.sh configs/paper/medical_mri_qwen2.5_vl_3b.yaml configs/with/lora_24gb.yaml
#   PROCESSES=2 ./scripts/train_vlm.sh configs/quickstart.yaml train.steps=2 --overwrite
#
# What a config needs is shown beforehand by `mm-agrae doctor CONFIG`. The same command again goes on
# with the run. PROCESSES: how many; not set: one a GPU. PARALLEL: multi_gpu (a copy on each), fsdp2
# (sharded) or fsdp2_offload; not set: fsdp2 for full tuning, multi_gpu for LoRA.
source "$(dirname "$0")/launch.sh"
if wants_help "$@"; then show_help "$0"; exit 0; fi
launch train "$@"
