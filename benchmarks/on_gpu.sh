#!/usr/bin/env bash
# All that proves autobatch on a GPU, in under nine minutes, with the results in one folder: what it sees there, the tests
# that need a GPU, the comparison with other ways to find a batch size, and recordings of searches.
#
#     bash benchmarks/on_gpu.sh FOLDER [--device cpu]
#
# Needs autobatch, Lightning and pytest in the environment of `python3`. Each part has a time of its own, and the next one runs
# whatever became of it. With `--device cpu` the same is run in little, without a GPU: that shows that it runs, nothing else.
set -uo pipefail

folder=${1:?where do the results go: bash benchmarks/on_gpu.sh FOLDER}
where=${3:-cuda}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 PYTHONIOENCODING=utf-8
tests=(tests/test_gpu.py tests/test_gpu_lightning.py tests/test_probes.py)
marked=gpu brief=()
if [ "$where" = cpu ]; then
  marked="not gpu and not slow" brief=(--brief --only U-Net)
fi
outcomes=()

part() { # seconds, name, command
  local seconds=$1 name=$2 began=$SECONDS
  printf '\n=== %s: %s\n' "$name" "${*:3}"
  timeout --kill-after=5 "$seconds" "${@:3}"
  local status=$?
  case $status in
  0) outcomes+=("$name: went well, $((SECONDS - began)) s") ;;
  124 | 137) outcomes+=("$name: stopped after $seconds s") ;;
  *) outcomes+=("$name: ended with $status after $((SECONDS - began)) s") ;;
  esac
}

all() {
  part 20 "what autobatch sees" python3 -m autobatch probe
  part 300 "tests" python3 -m pytest -m "$marked" -p no:cacheprovider -W default -v -rPfEs --durations=15 "${tests[@]}"
  part 140 "benchmark" python3 benchmarks/gpu.py --device "$where" "${brief[@]}" \
    --json "$folder/gpu.json" --markdown "$folder/gpu.md"
  part 60 "recordings" python3 benchmarks/record.py "$folder" --device "$where" "${brief[@]}"
  printf '\n=== in short\n'
  printf '%s\n' "${outcomes[@]}"
}

all 2>&1 | tee "$folder/log.txt"
grep -qE '^(tests|benchmark|recordings|what autobatch sees): (stopped|ended)' "$folder/log.txt" && exit 1
exit 0
