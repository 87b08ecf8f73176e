#!/usr/bin/env bash
# Lint, types and the tests, in the same .venv as the quickstart. Arguments go to pytest; --all adds what is for a release.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
install "test"

# Parity tests compare with transformers and peft in torch. Only a CPU build is taken: CUDA builds bring gigabytes.
peft="peft==0.21.2"
install_torch || echo "The parity tests are LEFT OUT of this run."
if .venv/bin/python -c 'import torch' 2>/dev/null && ! .venv/bin/python -c 'import peft' 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock "$peft"
fi
if [[ " $* " == *" --all "* ]]; then  # the model of tests/real, made once
  .venv/bin/python launch/smollm2.py >/dev/null || echo "The tests on SmolLM2 are LEFT OUT of this run."
fi

export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/shellcheck -x launch/*.sh .ci/run tests/support/*.sh
echo "mypy runs beside the tests; what it finds is printed last"
.venv/bin/mypy kdjax >.venv/mypy.txt 2>&1 &
types=$! failed=0
.venv/bin/python -m pytest -n 2 --dist worksteal "$@" || failed=$?  # worksteal: neighbours stay in one process, which traces once
wait "$types" || { failed=$?; cat .venv/mypy.txt; }
exit "$failed"
