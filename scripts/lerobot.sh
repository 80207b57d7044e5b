#!/usr/bin/env bash
# LeRobot's DiffusionPolicy trained by lerobot, improved by diffalign, reloaded by lerobot: the figures of docs/lerobot.md.
#   scripts/setup.sh robot,lerobot
#   scripts/lerobot.sh [FOLDER]        FOLDER must be new; about 15 CPU minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
out=${1:-runs/lerobot}
diffalign collect configs/robot/push_collect.yaml --run "$out/collect"
diffalign data convert "$out/collect" --parts state=4,environment_state=35 --rate-hz 80 --to "lerobot:$out/data"
python scripts/lerobot_train.py "$out/data" "$out/policy" --steps 1500
diffalign train configs/robot/lerobot_import.yaml "source=lerobot:$out/policy" --run "$out/import"
diffalign train configs/robot/lerobot_dppo.yaml "base=$out/import" --run "$out/dppo"
diffalign export "$out/dppo" --to "lerobot:$out/improved"
python scripts/lerobot_compare.py "$out/dppo" "$out/improved" "$out/collect"
