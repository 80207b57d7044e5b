#!/usr/bin/env bash
# Hopper-v5 from mediocre data: random actions, a Gaussian policy, PPO until it is mediocre, 200 of its episodes, cloned, DPPO.
#   bash scripts/hopper.sh 0 1 2                 (about 25 CPU minutes a seed; OUT=folder)
# Then the table and the figure of docs/hopper.md: returns of 100 fresh episodes a seed. What was interrupted goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-runs/hopper}
configs=configs/robot
source scripts/methods_run.bash

for seed in "$@"; do
  run random hopper_random "seed=$seed"
  run start hopper_start "seed=$seed" "base=$out/random-$seed" workers=1
  run ppo hopper_ppo "seed=$seed" "base=$out/start-$seed" workers=1
  run collect hopper_collect "seed=$seed" "policy=$out/ppo-$seed"
  run bc hopper_bc "seed=$seed" "base=$out/collect-$seed" workers=1
  fresh bc 100
  run dppo hopper_dppo "seed=$seed" "base=$out/bc-$seed" workers=1
  fresh dppo 100
done
python scripts/methods_figure.py "$out" --value return --png docs/hopper.png
