# Sourced by methods_robot.sh, methods_image.sh and hopper.sh, which set out, seed and configs.
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

run() {  # NAME CONFIG OVERRIDES...: train in $out/NAME-$seed unless it is finished
  local folder=$out/$1-$seed config=$configs/$2.yaml resume=
  shift 2
  if [ -f "$folder/finished.json" ]; then return; fi
  if [ -f "$folder/config.yaml" ]; then resume=--resume; fi
  diffalign train "$config" "$@" --run "$folder" $resume
}

fresh() {  # NAME EPISODES: evaluate the run on episodes that training never saw
  local folder=$out/$1-$seed
  if [ -f "$folder/fresh.json" ]; then return; fi
  diffalign evaluate "$folder" --seed 100 --episodes "$2" --json > "$folder/fresh.partial"
  mv "$folder/fresh.partial" "$folder/fresh.json"
}
