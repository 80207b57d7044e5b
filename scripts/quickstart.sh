#!/usr/bin/env bash
# Set up .venv and run both main jobs: runs/demo-robot/report.html and runs/demo-image/report.html show before and after.
# Arguments go to `diffalign demo`, e.g. scripts/quickstart.sh robot
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh image,robot
echo "==> diffalign demo $*"
.venv/bin/diffalign demo "$@"
