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
        echo "$want" > "$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}
