#!/usr/bin/env bash
# Compile the loss head for an H100 and for TPUs, none of which need be here, and test what it would hold there.
# An environment of its own: with libtpu installed, a plain `import jax` looks for a TPU first.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
install "aot,test" .venv-aot
export JAX_PLATFORMS=cpu CI=false  # the parity tests, which CI insists on, are not of this run
export KDJAX_AOT=true  # a compiler that is missing here fails its tests, instead of leaving them out
exec .venv-aot/bin/python -m pytest tests/runtime/test_topology.py "$@"
