#!/usr/bin/env bash
# Make or complete the virtual environment .venv of this checkout: scripts/setup.sh EXTRAS, e.g. scripts/setup.sh image,robot
# Needs Python 3.11 or 3.12 with the venv module, and a package index. An existing .venv is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:?give the extras to install, e.g. image,robot}"

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
  for python in python3.12 python3.11 python3 python; do
    if suits "$python"; then break; fi
    python=""
  done
  [ -n "$python" ] || fail "Python 3.11 or 3.12 is needed, and python3 here is $(python3 --version 2>&1 || true). Install one, then run this again."
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv || { rm -rf .venv; fail "'$python -m venv' did not work; on Debian or Ubuntu: apt-get install python3-venv"; }
fi
suits .venv/bin/python || fail ".venv has $(.venv/bin/python --version 2>&1), but Python 3.11 or 3.12 is needed. Remove .venv, then run this again."

if [ -x .venv/bin/uv ]; then
  uv=.venv/bin/uv
elif command -v uv >/dev/null; then
  uv=uv
else
  say "installing uv into .venv"
  .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
  uv=.venv/bin/uv
fi

say "installing diffalign with [$extras] (the first time this downloads about 3 GB)"
"$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt --build-constraint constraints.txt --editable ".[$extras]"

if [ "$(uname -s)" = Linux ] && [ -z "${DISPLAY:-}" ] && [ -z "${MUJOCO_GL:-}" ]; then
  if ! .venv/bin/python -c 'import ctypes.util as u, sys; sys.exit(not (u.find_library("EGL") or u.find_library("OSMesa")))'; then
    say "no EGL library: robot videos need one. Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"
  fi
fi
