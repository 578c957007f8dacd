#!/usr/bin/env bash
# Installs and runs the checks: lint, format, types, tests.
#
#   ./scripts/test.sh                        everything but the optional engines, in one environment
#   ./scripts/test.sh tests/tasks -k csv     arguments go to pytest
#   ./scripts/test.sh --all                  also the slow tests, those of vLLM and verl in environments of
#                                            their own, and the numeric ones under other CPU kernels
source "$(dirname "$0")/environment.sh"
all=0
if [ "$*" = --all ]; then
    all=1
    shift
fi
prepare_environment dev
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # two test processes, one thread each
failed=0
stage() { # a command; the others run all the same if it fails
    "$@" || failed=1
}
stage ruff check .
stage ruff format --check .
stage mypy
stage env MM_AGRAE_SLOW="${MM_AGRAE_SLOW:-$all}" python -m pytest --numprocesses 2 "$@"
[ "$all" = 1 ] || exit "$failed"

# Results may depend on the processor only by rounding: the same tests with other kernels.
numeric=(tests/model tests/rollout/test_rollout_hf.py tests/test_advantage.py tests/test_loss.py
    tests/test_loss_trl.py tests/test_mixed_batches.py tests/view/test_playground.py)
for kernels in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
    "ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2"; do
    echo "numeric tests with $kernels"
    # shellcheck disable=SC2086
    stage env $kernels python -m pytest --quiet --numprocesses 2 "${numeric[@]}"
done
if prepare_vllm; then
    # The tests of a file share engines and servers, and their order matters.
    stage "$vllm_venv/bin/python" -m pytest --numprocesses 2 --dist loadfile tests/rollout/*vllm*.py
else
    echo "the tests of vLLM are skipped" >&2
fi
if prepare_verl; then
    stage "$verl_venv/bin/python" -m pytest tests/adapters/test_adapter_verl.py
else
    echo "the tests of verl are skipped" >&2
fi
exit "$failed"
