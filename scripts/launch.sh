# Sourced by train_vlm.sh, train_llm.sh and evaluate.sh: installs what the config needs, and starts
# mm-agrae in as many processes as there are GPUs, or as PROCESSES says. `mm-agrae … --launch-plan`
# decides the rest: on several GPUs full tuning is sharded (FSDP2), LoRA copied (DDP). PARALLEL names
# another file of configs/accelerate: multi_gpu copies, fsdp2 shards, fsdp2_offload keeps the shards in
# the CPU's memory.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

wants_help() { [ $# -eq 0 ] || [ "$1" = "--help" ] || [ "$1" = "-h" ]; }

show_help() { # the comment at the head of a script
    awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "scripts/$(basename "$1")"
}

launch() { # arguments of mm-agrae
    local plan processes gpus parallel threads needs
    if [ "${PARALLEL:-}" = zero3 ]; then
        echo "PARALLEL=zero3 is gone; PARALLEL=fsdp2_offload (fsdp_offload_params) does its work" >&2
        exit 2
    fi
    if [ ! -f "configs/accelerate/${PARALLEL:-one}.yaml" ]; then
        echo "PARALLEL=$PARALLEL: no configs/accelerate/$PARALLEL.yaml" >&2
        exit 2
    fi
    prepare_environment "${MM_AGRAE_EXTRA:-$(gpu_extra)}"
    plan="$(python -m mm_agrae.cli "$@" --launch-plan)" || exit
    # Code that the config names may print something before it.
    read -r processes gpus parallel threads needs <<< "$(tail -n 1 <<< "$plan")"
    if [ "$needs" = vllm ]; then
        prepare_vllm || { echo "rollout.engine=hf does without vLLM, and is slower" >&2; exit 1; }
        # shellcheck disable=SC1091
        source "$vllm_venv/bin/activate"
    fi
    echo "processes: $processes ($parallel), GPUs: $gpus, threads of each: $threads"
    export OMP_NUM_THREADS="$threads"
    if [ "$gpus" -eq 0 ] && [ "$processes" -gt 1 ]; then
        # accelerate starts several processes on a CPU only with an MPI.
        case "$parallel" in
            fsdp2*) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 ;;
        esac
        if [ "$parallel" = fsdp2_offload ]; then export FSDP_OFFLOAD_PARAMS=true; fi
        exec python scripts/launch.py torchrun --standalone --nproc_per_node "$processes" -m mm_agrae.cli "$@"
    fi
    exec python scripts/launch.py accelerate launch --num_processes "$processes" \
        --config_file "configs/accelerate/$parallel.yaml" -m mm_agrae.cli "$@"
}
