#!/usr/bin/env bash
# The main job on this machine, nothing else needed: the four objectives and their mix on embedded arithmetic.
# Extra arguments go to `kdjax study configs/quickstart.py`, for example --folder runs/again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
install ""
# Two CPU devices: rollouts don't fill two cores from one device, and the data mesh is the one of a real run.
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-2}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/cache/xla}"
exec .venv/bin/kdjax study configs/quickstart.py "$@"
