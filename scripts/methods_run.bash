# Sourced by methods_robot.sh and methods_image.sh, which set out, seed and configs.
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

run() {  # NAME CONFIG OVERRIDES...: train in $out/NAME-$seed unless it is finished
  local folder=$out/$1-$seed config=$configs/$2.yaml resume=
  shift 2
  if [ -f "$folder/finished.json" ]; then return; fi
  if [ -f "$folder/config.yaml" ]; then resume=--resume; fi
  diffalign train "$config" "$@" --run "$folder" $resume
}
