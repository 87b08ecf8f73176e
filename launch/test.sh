#!/usr/bin/env bash
# Lint, types and the tests, in the same .venv as the quickstart. Arguments go to pytest; --all adds what is for a release.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
install "test"

# Parity tests compare with transformers and peft in torch. Only a CPU build is taken: CUDA builds bring gigabytes.
torch="torch==2.13.0" peft="peft==0.21.2"
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --dry-run --no-deps --report .venv/torch.json \
    "$torch" >/dev/null 2>&1 || true
  if .venv/bin/python - <<'PY'
import json, sys
try:
    wheel = json.load(open(".venv/torch.json"))["install"][0]["metadata"]
except (OSError, ValueError, LookupError):
    sys.exit(1)
sys.exit(sys.platform == "linux" and any("nvidia" in r or "cuda" in r for r in wheel.get("requires_dist", [])))
PY
  then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$torch"
  else
    echo "No CPU build of $torch for $(.venv/bin/python -V): the parity tests are LEFT OUT of this run."
  fi
fi
if .venv/bin/python -c 'import torch' 2>/dev/null && ! .venv/bin/python -c 'import peft' 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock "$peft"
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
