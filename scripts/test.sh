#!/usr/bin/env bash
# Installs and runs every check: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
prepare_environment dev
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # two test processes, one thread each
ruff check .
ruff format --check .
mypy
python -m pytest --numprocesses 2 "$@"
