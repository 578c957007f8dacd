#!/usr/bin/env bash
# Installs and runs every check: lint, format, types, tests. Arguments go to pytest; without any,
# the tests of vLLM, of the verl plug-in and of DeepSpeed run too, in environments of their own
# (MM_AGRAE_VLLM=0, MM_AGRAE_VERL=0 and MM_AGRAE_DEEPSPEED=0 leave them out).
source "$(dirname "$0")/environment.sh"
prepare_environment dev
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # two test processes, one thread each
ruff check .
ruff format --check .
mypy
python -m pytest --numprocesses 2 "$@"
if [ $# -eq 0 ] && [ "${MM_AGRAE_VLLM:-1}" != 0 ] && prepare_vllm; then
    # The tests of a file share engines and servers, and their order matters.
    "$(vllm_environment)/bin/python" -m pytest --numprocesses 2 --dist loadfile \
        tests/rollout/test_rollout_vllm.py tests/rollout/test_rollout_vllm_server.py tests/rollout/test_training_vllm.py
fi
if [ $# -eq 0 ] && [ "${MM_AGRAE_VERL:-1}" != 0 ]; then
    scripts/test_verl.sh
fi
if [ $# -eq 0 ] && [ "${MM_AGRAE_DEEPSPEED:-1}" != 0 ]; then
    scripts/test_deepspeed.sh
fi
