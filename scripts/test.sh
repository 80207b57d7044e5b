#!/usr/bin/env bash
# Set up .venv and run every check: ruff, mypy, import rules, pytest. All run; the last line is pytest's closing line.
# Arguments go to pytest, e.g. scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh image,robot,dev

# Nothing may reach the network or the user's caches; small tensors are fastest on one thread. Two processes share the test files;
# --numprocesses 0 among the arguments runs them one after the other.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME="$scratch" HF_LEROBOT_HOME="$scratch" HF_LEROBOT_CALIBRATION="$scratch"
export WANDB_MODE=offline TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

failed=""
check() {
  echo "==> $1"
  "${@:2}" || failed="$failed $1"
}
check ruff .venv/bin/ruff check --quiet --output-format concise .
check mypy .venv/bin/mypy
check lint-imports .venv/bin/lint-imports --no-logo
if [ -n "$failed" ]; then echo "==> failed so far:$failed"; fi
check pytest .venv/bin/python -m pytest --quiet --numprocesses 2 --dist loadfile "$@"
[ -z "$failed" ]
