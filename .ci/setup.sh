#!/bin/sh
# Makes .venv, or brings it up to date: one environment for the demo, the tests and the checks.
# With arguments another one: its folder, and what uv is to install there.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
if [ $# -gt 0 ]; then shift; fi
if [ $# -eq 0 ]; then
    set -- --editable ".[lerobot,ogbench,serve,plots,docs,dev]" \
        --editable "./adapters/lerobot_policy_qsteer[async]" "lerobot[diffusion]"
fi
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
version=$(cat .python-version)
.ci/uv --version >/dev/null

# The first interpreter that runs: a pyenv shim may stand for one that is not selected here. Else uv searches, or fetches it.
find_python() {
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python; do
        if "$python" -c 'import sys; print(sys.executable)' 2>/dev/null; then return; fi
    done
    echo "$version"
}

is_current='import sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])'
if ! "$venv/bin/python" -c "$is_current" "$version" 2>/dev/null; then
    python=$(find_python)
    echo "setup: making $venv with Python $version"
    rm -rf "$venv"
    .ci/uv venv --quiet --python "$python" "$venv" || {
        echo "setup: no Python $version was found, and uv could not fetch it. Install it, for example with" >&2
        echo "    pyenv install $version  |  brew install python@$version  |  apt install python$version" >&2
        echo "so that 'python$version' runs, and try again." >&2
        exit 1
    }
fi

echo "setup: installing qsteer and its dependencies into $venv (the first time this fetches several GB)"
quiet=--quiet
if [ -t 2 ]; then quiet=; fi # a person sees uv's progress, a log does not
.ci/uv pip install $quiet --python "$venv/bin/python" "$@"
