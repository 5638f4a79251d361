#!/usr/bin/env bash
# Every speed figure of one machine with a GPU, in under ten minutes on a recent one: JSON files in a folder, each with
# device, versions and commit.
#
#     benchmarks/gpu.sh [FOLDER]        default: build/gpu
#
# DEVICE=cpu SHAPES=small COMPILED="--layers 2 --width 64" RECOMMEND="--model-shape 7b --layers 1" tries the script itself
# without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-build/gpu}" device="${DEVICE:-cuda}" python="${PYTHON:-python}"
shapes="${SHAPES:-lisa-7b glamm-7b pixellm-7b}" rounds="${ROUNDS:-5}" recommend="${RECOMMEND:---model-shape 7b}"
mkdir -p "$out"

"$python" - "$device" "$out/machine.json" <<'PY'
import json
import subprocess
import sys

import torch

from tokenprune.evaluation.environment import describe

device, file = sys.argv[1:]
if device.startswith("cuda") and not torch.cuda.is_available():
    sys.exit("no GPU: torch.cuda.is_available() is False; install a CUDA build of torch, or set DEVICE=cpu to try the script")
found = describe(torch.nn.Linear(1, 1).to(device))
found["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
found["changed_files"] = len(subprocess.run(["git", "status", "--short"], capture_output=True, text=True).stdout.splitlines())
if device.startswith("cuda"):
    query = "clocks.current.sm,clocks.max.sm,clocks.current.memory,power.limit,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
json.dump(found, open(file, "w"), indent=1)
PY

for shape in $shapes; do
    "$python" benchmarks/pipeline.py --shape "$shape" --device "$device" --rounds "$rounds" --json "$out/pipeline-$shape.json"
done
"$python" benchmarks/engine_overhead.py --device "$device" --rounds "$rounds" --sizes "${SIZE:-7B layers}" --json "$out/overhead.json"
compiled=("$python" benchmarks/compiled.py --device "$device" --rounds "$rounds")
# shellcheck disable=SC2086
"${compiled[@]}" ${COMPILED:---width 4096} --json "$out/compiled.json"
# shellcheck disable=SC2086
"${compiled[@]}" ${COMPILED:---width 4096} --mode reduce-overhead --caches static --eager-prefill --json "$out/cuda-graphs.json" ||
    echo "no figures of CUDA graphs: the run failed"
# shellcheck disable=SC2086
"$python" -m tokenprune recommend $recommend --device "$device" --seconds 60 --out "$out/recommend.json"
ls -l "$out"
