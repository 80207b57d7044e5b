#!/usr/bin/env bash
# Every method on the captioned shapes from one pre-trained model a seed, then the table and the figure of docs/methods.md.
#   bash scripts/methods_image.sh 0 1 2          (about 110 CPU minutes a seed; OUT=folder, METHODS="awm nft" to choose)
#   OUT=runs/methods-jpeg PNG=docs/methods_jpeg.png METHODS="jpeg_alone jpeg_alone_guard" bash scripts/methods_image.sh 0 1 2
#   python scripts/methods_figure.py runs/methods-jpeg --at held_out/jpeg_kb=0.8 --png docs/methods_jpeg.png
# What was interrupted goes on, what is finished is kept. One seed in each of several shells uses as many cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-runs/methods-image}
methods=${METHODS:-ddpo dpok loop flow_grpo dance_grpo cps flow_grpo_fast mix_grpo guard awm nft orw seppo dpo noise_ppo rlcm best_of}
configs=configs/image
source scripts/methods_run.bash

for seed in "$@"; do
  run pretrain shapes_pretrain "seed=$seed"
  for method in $methods; do
    case $method in
      rlcm)
        run distill shapes_distill "base=$out/pretrain-$seed" "seed=$seed"
        run rlcm shapes_rlcm "base=$out/distill-$seed" "seed=$seed" ;;
      best_of) run best_of shapes_best_of "base=$out/pretrain-$seed" ;;
      *) run "$method" "shapes_$method" "base=$out/pretrain-$seed" "seed=$seed" ;;
    esac
  done
done
python scripts/methods_figure.py "$out" --png "${PNG:-docs/methods_image.png}"
