#!/bin/sh
# Make or mend the virtual environment. Called by the Makefile, which says where: PYTHON, VENV, READY (the stamp).
set -eu

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

command -v "$PYTHON" >/dev/null 2>&1 ||
    fail "there is no '$PYTHON' here. Install Python 3.11, 3.12 or 3.13, or name yours: make setup PYTHON=python3.12"
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
"$PYTHON" -c "$supported" ||
    fail "splitft needs Python 3.11, 3.12 or 3.13; '$PYTHON' is $("$PYTHON" -V 2>&1). Name another: make setup PYTHON=python3.12"

make_venv() {
    rm -rf "$VENV"
    echo "setup: making $VENV with $("$PYTHON" -V 2>&1)"
    "$PYTHON" -m venv "$VENV" && return
    # Some systems ship venv without the bundled pip; the pip of the machine can put one in.
    rm -rf "$VENV"
    "$PYTHON" -m venv --without-pip "$VENV" && "$PYTHON" -m pip --python "$VENV/bin/python" install pip && return
    rm -rf "$VENV"
    fail "'$PYTHON -m venv' failed. Install your system's venv package (Debian: python3-venv) and call make again."
}

# An environment without a working pip was cut short; one made in another folder has scripts that point there.
if ! "$VENV/bin/python" -c "$supported" 2>/dev/null || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
elif [ -e "$VENV/folder" ] && [ "$(cat "$VENV/folder")" != "$(pwd)" ]; then
    echo "setup: $VENV was made in another folder"
    make_venv
fi
pwd >"$VENV/folder"
rm -f "$VENV"/ready-*

pip() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt "$@" </dev/null ||
        fail "pip could not install: $*. Its message is above; what is already in place is kept, so call make again."
}

# PyTorch first and alone: where a processor-only build is at hand, pip takes it and no GPU package is downloaded for the rest.
torch=$(grep '^torch==' constraints.txt)
echo "setup: installing $torch (the largest part, some minutes)"
pip "$torch"
echo "setup: installing the other packages"
# PyTorch has brought setuptools, so the build needs no environment of its own.
pip --no-build-isolation -e '.[test]'
: >"$READY"
echo "setup: ready"
