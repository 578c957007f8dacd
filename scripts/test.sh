#!/usr/bin/env bash
# Installs and runs every check: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
prepare_environment dev
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
