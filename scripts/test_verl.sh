#!/usr/bin/env bash
# Runs the tests of the verl plug-in inside the real verl, in an environment of its own
# (.venv-verl, 1.7 GB, made once in two minutes): verl needs an older transformers than the trainer.
# Only what verl's driver imports is installed, no inference engine. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
venv="${MM_AGRAE_VERL_VENV:-.venv-verl}"
want="$(cat pyproject.toml constraints.txt scripts/test_verl.sh | cksum)"
if [ "$(cat "$venv/.installed" 2> /dev/null)" != "$want" ]; then
    echo "Installing verl into $venv (once) ..."
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    if ! { "${pip[@]}" "$(grep '^torch==' constraints.txt)" &&
        "${pip[@]}" --no-deps verl==0.9.1 &&
        "${pip[@]}" transformers==5.10.4 tensordict==0.10.0 ray==2.60.0 torchdata==0.11.0 \
            accelerate cachetools codetiming datasets dill fastapi hydra-core numpy pandas peft \
            pillow pylatexenc uvicorn pytest pytest-timeout &&
        "${pip[@]}" --no-deps --editable .; }; then
        echo "verl cannot be installed here: its tests are skipped" >&2
        exit 0
    fi
    echo "$want" > "$venv/.installed"
fi
export OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest tests/adapters/test_adapter_verl.py "$@"
