#!/usr/bin/env bash
# robomimic's diffusion policy trained by robomimic, improved by diffalign, reloaded by robomimic: the figures of docs/robomimic.md.
#   scripts/robomimic.sh [FOLDER]      in the environment of docs/robomimic.md, its patch applied; FOLDER must be new; 15 CPU minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive  # robomimic's train.py takes two threads whatever it is told
out=${1:-runs/robomimic}
diffalign collect configs/robot/push_collect.yaml --run "$out/collect"
diffalign data convert "$out/collect" --to "robomimic:$out/push.hdf5"
python scripts/robomimic_train.py "$out/push.hdf5" "$out/policy.pth" --steps 1500 --down-dims 32 64
diffalign train configs/robot/robomimic_import.yaml "source=robomimic:$out/policy.pth" --run "$out/import"
diffalign train configs/robot/robomimic_dppo.yaml "base=$out/import" --run "$out/dppo"
diffalign export "$out/dppo" --to "robomimic:$out/improved.pth"
python scripts/robomimic_compare.py "$out/dppo" "$out/improved.pth" "$out/collect"
diffalign evaluate "$out/import" --episodes 200 --seed 1
diffalign evaluate "$out/dppo" --episodes 200 --seed 1
