#!/usr/bin/env bash
# Run everything that needs a GPU, in under ten minutes, with the results in one folder: the devices, the tests, the comparison
# with other ways to find a batch size, and recordings of searches.
#
#     bash benchmarks/on_gpu.sh FOLDER [--device cpu] [--part tests|benchmark|recordings]
#
# It needs autobatch, Lightning and pytest in the environment of `python3`. Each part has a time limit, leaves unused time to the
# parts after it, and does not stop them if it fails. `--device cpu` runs a small version without a GPU, as a check of the script.
# With `--part` one part has all the time.
set -uo pipefail

folder=${1:?a folder for the results is missing: bash benchmarks/on_gpu.sh FOLDER}
where=cuda only=
shift
while (($#)); do
  case "$1 ${2:-}" in
  "--device cuda" | "--device cpu") where=$2 ;;
  "--part tests" | "--part benchmark" | "--part recordings") only=$2 ;;
  *)
    echo "$* is none of: --device cuda|cpu, --part tests|benchmark|recordings" >&2
    exit 2
    ;;
  esac
  shift 2
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 PYTHONIOENCODING=utf-8
if ! python3 -c 'import importlib.metadata as m, pydantic, pynvml, pytest, rich, autobatch; m.version("lightning-autobatch")'; then
  echo "$(command -v python3) lacks the module named above: install autobatch with its dependencies, and pytest." >&2
  exit 2
fi
whole=575 first=50 # seconds, of all parts and of the first one
# Quick tests first; those that start processes and compile are the last of test_gpu.py
tests=(tests/test_probes.py tests/test_gpu_lightning.py tests/test_gpu.py)
marked=gpu brief=()
if [ "$where" = cpu ]; then
  whole=1200 first=200 # a busy machine may be slower than any with a GPU
  marked="not gpu and not slow and not sweep" brief=(--brief --only U-Net)
  tests=(tests/test_probes.py) # the default tests run the others without a GPU
fi
outcomes=()

part() { # seconds, name, command
  local seconds=$1 name=$2 began=$SECONDS
  [ -n "$only" ] && [ "$only" != "$name" ] && return
  [ -n "$only" ] && seconds=$(left 10)
  printf '\n=== %s: %s\n' "$name" "${*:3}"
  # An interrupted pytest still lists the failures so far
  timeout --signal=INT --kill-after=10 "$seconds" "${@:3}"
  local status=$?
  case $status in
  0) outcomes+=("$name: went well, $((SECONDS - began)) s") ;;
  124 | 137) outcomes+=("$name: stopped after $seconds s") ;;
  *) outcomes+=("$name: ended with $status after $((SECONDS - began)) s") ;;
  esac
}

left() { # seconds left, minus those kept for later parts
  echo $((whole - SECONDS - $1))
}

all() {
  # The first import of torch on a machine may read gigabytes from its disk
  part "$first" "what autobatch sees" python3 -m autobatch probe
  part 300 "tests" python3 -m pytest -m "$marked" -p no:cacheprovider -W default -o timeout=150 -v -rPfEs --durations=15 \
    "${tests[@]}"
  part "$(left 80)" "benchmark" python3 benchmarks/gpu.py --device "$where" "${brief[@]}" \
    --json "$folder/gpu.json" --markdown "$folder/gpu.md"
  part "$(left 10)" "recordings" python3 benchmarks/record.py "$folder" --device "$where" "${brief[@]}"
  printf '\n=== in short\n'
  printf '%s\n' "${outcomes[@]}"
}

log=$folder/log${only:+-$only}.txt
all 2>&1 | tee "$log"
grep -qE '^(tests|benchmark|recordings|what autobatch sees): (stopped|ended)' "$log" && exit 1
exit 0
