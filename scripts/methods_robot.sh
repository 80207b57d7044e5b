#!/usr/bin/env bash
# Every method on Meta-World pick-place from one cloned policy a seed, then the table and the figure of docs/methods.md.
#   bash scripts/methods_robot.sh 0 1 2          (about 70 CPU minutes a seed; OUT=folder, METHODS="dppo awm" to choose)
# What was interrupted goes on, what is finished is kept. One seed in each of several shells uses as many cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-runs/methods-robot}
methods=${METHODS:-dppo awm nft guard noise_ppo seppo dsrl_sac dsrl_na residual residual_step expo rerank}
configs=configs/robot
source scripts/methods_run.bash

fresh() {  # NAME: 300 episodes that training never saw
  local folder=$out/$1-$seed
  if [ ! -f "$folder/fresh.json" ]; then
    diffalign evaluate "$folder" --seed 100 --episodes 300 --json > "$folder/fresh.partial"
    mv "$folder/fresh.partial" "$folder/fresh.json"
  fi
}

for seed in "$@"; do
  run collect pick_place_collect "seed=$seed"
  run bc pick_place_bc "seed=$seed" "base=$out/collect-$seed" workers=1
  fresh bc
  for method in $methods; do
    case $method in
      rerank)
        run rollouts pick_place_base_rollouts "seed=$seed" "policy=$out/bc-$seed"
        run rerank pick_place_rerank "seed=$seed" "base=$out/bc-$seed" "demonstrations=[$out/rollouts-$seed,$out/collect-$seed]" workers=1 ;;
      residual | residual_step | expo | dsrl_na)
        run "$method" "pick_place_$method" "seed=$seed" "base=$out/bc-$seed" "demonstrations=[$out/collect-$seed]" workers=1 ;;
      seppo) run seppo pick_place_seppo "seed=$seed" "base=$out/bc-$seed" "demonstrations=[$out/collect-$seed]" workers=1 ;;
      *) run "$method" "pick_place_$method" "seed=$seed" "base=$out/bc-$seed" workers=1 ;;
    esac
    fresh "$method"
  done
done
python scripts/methods_figure.py "$out" --png docs/methods_robot.png
