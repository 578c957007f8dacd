#!/usr/bin/env bash
# Runs the tests of ZeRO-3 with the real DeepSpeed, on two processes without GPUs. It is installed
# beside the development environment (.venv-deepspeed, 24 MB, ten seconds), and compiles a piece of
# itself for CPUs the first time, for which it needs g++. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
prepare_environment dev
folder="${MM_AGRAE_DEEPSPEED_DIR:-.venv-deepspeed}"
want="$(cksum < scripts/test_deepspeed.sh)"
if [ "$(cat "$folder/.installed" 2> /dev/null)" != "$want" ]; then
    echo "Installing DeepSpeed into $folder (once) ..."
    # Without dependencies: the rest of them is there, in the tested versions.
    if ! python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" \
        deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 \
        py-cpuinfo==9.0.0; then
        echo "DeepSpeed cannot be installed here: its tests are skipped" >&2
        exit 0
    fi
    echo "$want" > "$folder/.installed"
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH="$(realpath "$folder")"
exec python -m pytest tests/test_zero.py "$@"
