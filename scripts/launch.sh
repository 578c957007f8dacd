# Sourced by train_vlm.sh, train_llm.sh and evaluate.sh: installs, and starts mm-agrae in as many
# processes as there are GPUs, or as PROCESSES says. PARALLEL=fsdp2 shards the model over them,
# PARALLEL=fsdp2_offload keeps the shards in the CPU's memory.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

wants_help() { [ $# -eq 0 ] || [ "$1" = "--help" ] || [ "$1" = "-h" ]; }

show_help() { # the comment at the head of a script
    awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "scripts/$(basename "$1")"
}

count_gpus() { python -c 'import torch; print(torch.cuda.device_count())'; }

launch() { # arguments of mm-agrae
    local gpus processes parallel="${PARALLEL:-multi_gpu}"
    if [ "$parallel" = zero3 ]; then
        echo "PARALLEL=zero3 is gone; PARALLEL=fsdp2_offload (fsdp_offload_params) does its work" >&2
        exit 2
    fi
    if [ ! -f "configs/accelerate/$parallel.yaml" ]; then
        echo "PARALLEL=$parallel: no configs/accelerate/$parallel.yaml" >&2
        exit 2
    fi
    gpus="$(count_gpus)"
    processes="${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
    [ "$processes" -gt 1 ] || parallel=one
    echo "processes: $processes ($parallel), GPUs: $gpus"
    # On a CPU more threads than cores in all slow every process down.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [ "$gpus" -eq 0 ] && [ "$processes" -gt 1 ]; then
        # accelerate starts several processes on a CPU only with an MPI.
        case "$parallel" in
            fsdp2*) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 ;;
        esac
        if [ "$parallel" = fsdp2_offload ]; then export FSDP_OFFLOAD_PARAMS=true; fi
        exec torchrun --standalone --nproc_per_node "$processes" -m mm_agrae.cli "$@"
    fi
    exec accelerate launch --num_processes "$processes" \
        --config_file "configs/accelerate/$parallel.yaml" -m mm_agrae.cli "$@"
}
