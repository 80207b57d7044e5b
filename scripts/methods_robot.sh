#!/usr/bin/env bash
# Every method on one task from one cloned policy a seed, then the table and the figure of docs/methods.md.
#   bash scripts/methods_robot.sh 0 1 2          (about 90 CPU minutes a seed; OUT=folder, METHODS="dppo awm" to choose)
#   TASK=push METHODS="dppo group flow_sde reinflow fpo fpo_plus" bash scripts/methods_robot.sh 0 1 2
# Tasks: pick_place, push, fetch (extra [fetch]); the on-policy methods run on all. Those that the last line names after group
# start from a flow policy, cloned from the same demonstrations.
# What was interrupted goes on, what is finished is kept. One seed in each of several shells uses as many cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
task=${TASK:-pick_place}
out=${OUT:-runs/methods-$task}
methods=${METHODS:-dppo group flow_sde reinflow fpo fpo_plus awm nft guard noise_ppo seppo dsrl_sac dsrl_na residual residual_step expo rerank gpc gpc_biased}
configs=configs/robot
source scripts/methods_run.bash

case $task in  # where, for the recipes that are written for pick-place, and how long the flow is cloned
  pick_place) there=() flow_steps=250 ;;
  push) there=(environment.task=push-v3) flow_steps=900 ;;
  fetch) there=('environment={type: gymnasium, id: "gymnasium_robotics:FetchPickAndPlace-v4", horizon: 50}') flow_steps=1000 ;;
  *) echo "TASK must be pick_place, push or fetch, got $task" >&2; exit 2 ;;
esac

clone() {  # NAME CONFIG-OVERRIDES OF ITS DATA... -- THOSE OF THE POLICY...: a parent of a composition, from data of its own
  local name=$1 data=()
  shift
  while [ "$1" != -- ]; do data+=("$1"); shift; done
  run "collect_$name" pick_place_collect "${data[@]}"
  run "bc_$name" pick_place_bc "base=$out/collect_$name-$seed" workers=1 "${@:2}"
  fresh "bc_$name" 300
}

for seed in "$@"; do
  run collect "${task}_collect" "seed=$seed"
  run bc "${task}_bc" "seed=$seed" "base=$out/collect-$seed" workers=1
  fresh bc 300
  for method in $methods; do
    case $method in
      rerank)
        run rollouts pick_place_base_rollouts "seed=$seed" "policy=$out/bc-$seed"
        run rerank pick_place_rerank "seed=$seed" "base=$out/bc-$seed" "demonstrations=[$out/rollouts-$seed,$out/collect-$seed]" workers=1 ;;
      residual | residual_step | expo | dsrl_na)
        run "$method" "pick_place_$method" "seed=$seed" "base=$out/bc-$seed" "demonstrations=[$out/collect-$seed]" workers=1 ;;
      dppo) run dppo "${task}_dppo" "seed=$seed" "base=$out/bc-$seed" workers=1 ;;
      seppo) run seppo pick_place_seppo "seed=$seed" "base=$out/bc-$seed" "demonstrations=[$out/collect-$seed]" workers=1 ;;
      flow_sde | reinflow | fpo | fpo_plus)
        run bc_flow pick_place_bc_flow "seed=$seed" "base=$out/collect-$seed" "${there[@]}" "pretraining.steps=$flow_steps" workers=1
        fresh bc_flow 300
        run "$method" "pick_place_$method" "seed=$seed" "base=$out/bc_flow-$seed" "${there[@]}" workers=1 ;;
      gpc)  # with a policy cloned from other demonstrations of the same controller
        clone other "seed=$((seed + 100))" -- "seed=$((seed + 100))" "normalizers_of=$out/bc-$seed"
        run gpc pick_place_compose "seed=$seed" "parents=[$out/bc-$seed,$out/bc_other-$seed]" "data=$out/collect-$seed" grid=5 workers=1 ;;
      gpc_biased)  # of two policies cloned from controllers that err in opposite directions
        clone plus "seed=$seed" "action_bias=[0,0.18,0,0]" -- "seed=$seed" pretraining.steps=1500
        clone minus "seed=$((seed + 100))" "action_bias=[0,-0.14,0,0]" -- "seed=$((seed + 100))" pretraining.steps=1500 \
          "normalizers_of=$out/bc_plus-$seed"
        run gpc_biased pick_place_compose_biased "seed=$seed" "parents=[$out/bc_plus-$seed,$out/bc_minus-$seed]" \
          "data=$out/collect_plus-$seed" workers=1 ;;
      *) run "$method" "pick_place_$method" "seed=$seed" "base=$out/bc-$seed" "${there[@]}" workers=1 ;;
    esac
    fresh "$method" 300
  done
done
python scripts/methods_figure.py "$out" --png "docs/methods_$task.png"
