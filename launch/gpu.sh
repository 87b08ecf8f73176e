#!/usr/bin/env bash
# What is to be known of a GPU, in one call: correctness first, then the benches of head and sampler at the paper's
# sizes, then the main job. Figures go to runs/gpu (or to the folder given). PYTHON must have jax with CUDA.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out="${1:-runs/gpu}" python="${PYTHON:-python3}"
mkdir -p "$out"
export PYTHONPATH="$PWD" JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/xla}"
kdjax() { "$python" -m kdjax "$@" 2>&1 | tee -a "$out/log.txt"; }
"$python" -c 'import jax; print(jax.__version__, jax.devices())' | tee "$out/log.txt"
kdjax evaluate kdjax:student --teacher kdjax:teacher --out "$out/evaluation.json"  # 16.0 +- 2.1 % on a CPU
kdjax bench head --targets here --skip precision --tokens 16384 --vocabulary 151936 --student_width 1024 \
  --teacher_width 2560 --dtype bfloat16 --chunk 1024 --out "$out/head.json"
kdjax bench rollout --model Qwen/Qwen3-0.6B-Base --dtype bfloat16 --batches 64 128 256 --window 1024 --rows 512 \
  --limit 2048 --soak 1000 --out "$out/rollout.json"
kdjax train configs/student_reverse.py --run "$out/student_reverse" --cache "$out/cache"
