#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes from a plain checkout: the gpu tests, the kernel bench, the training bench.
#
#   bench/gpu/qualify.sh                  one dated JSON and one Markdown in $OUT, or in bench/results where OUT is not set
#   bench/gpu/qualify.sh --rehearse DIR   the same road at tiny sizes on a CPU, into DIR: does the script itself work?
#
# Needs Python with torch and what fasttrain imports; pytest and the peers are used where they are, and said where they are not.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
rehearse=no
out=${OUT:-bench/results}
if [ "${1:-}" = "--rehearse" ]; then
  rehearse=yes
  out=${2:?--rehearse wants a folder}
fi

if ! "$python" -c 'import torch, fasttrain'; then
  echo "This Python cannot import torch and fasttrain: give another in PYTHON." >&2
  exit 2
fi
if [ "$rehearse" = no ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "There is no CUDA device on this machine, so nothing was measured and nothing is written." >&2
  exit 3
fi

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

# part NAME SECONDS COMMAND...: its output, exit status and seconds are kept, whatever becomes of it.
part() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  echo "=== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$parts/$name.log"
  status=${PIPESTATUS[0]}
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$*" >>"$parts/parts.tsv"
}

# Without pytest-timeout the settings of pyproject.toml are an error of their own: the tests run without them then.
settings=()
"$python" -c 'import pytest_timeout' 2>/dev/null || settings=(-c /dev/null --rootdir=. --import-mode=importlib)

if [ "$rehearse" = yes ]; then
  tests=(tests/gpu/test_graph_rung.py)
  kernels=(--quick --device cpu --threads 1)
  training=(logistic_regression --quick --sides fasttrain plain lightning captured-by-hand)
else
  tests=(tests/gpu)
  kernels=(--device cuda)
  training=(small_tensors char_gpt resnet18 autoencoder gpt2_124m "autoencoder+fp16" --rounds 3 --seconds 190 --sides
    fasttrain fasttrain-graph fasttrain-compile plain plain-fused plain-compiled captured-by-hand lightning lightning-compile)
fi

if "$python" -c 'import pytest' 2>/dev/null; then
  part tests 150 "$python" -m pytest "${settings[@]}" -q -p no:cacheprovider -m gpu "${tests[@]}"
else
  echo "pytest is not installed here: the gpu tests did not run." | tee "$parts/tests.log"
  printf 'tests\t127\t0\tpytest is not installed\n' >>"$parts/parts.tsv"
fi
part kernels 90 "$python" bench/kernels.py "${kernels[@]}" --out "$parts/kernels.md"
part training 270 "$python" -m bench.compare "${training[@]}" --json "$parts/training.json"

"$python" -m bench.gpu.record "$parts" "$out"
