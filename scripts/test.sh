#!/usr/bin/env bash
# Set up .venv and run every check: ruff, mypy, import rules, pytest. The last line is pytest's closing line.
# Arguments go to pytest, e.g. scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh image,robot,dev

# Nothing may reach the network, a display or the user's caches; small tensors are fastest on one thread.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME="$scratch" HF_LEROBOT_HOME="$scratch" HF_LEROBOT_CALIBRATION="$scratch"
export WANDB_MODE=offline TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
if [ "$(uname -s)" = Linux ]; then export MUJOCO_GL="${MUJOCO_GL:-egl}"; fi

bin=.venv/bin
echo "==> ruff"
"$bin/ruff" check --quiet .
echo "==> mypy"
"$bin/mypy"
echo "==> import rules"
"$bin/lint-imports"
echo "==> pytest"
"$bin/python" -m pytest --quiet "$@"
