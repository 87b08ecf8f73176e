# shellcheck shell=bash
# Sourced by the other scripts: `install EXTRAS [VENV]` makes .venv (with uv where it is, else venv and pip) and
# installs kdjax at the locked versions. A second call reuses what is there. PYTHON chooses the interpreter.

install() {
  local extras="$1" venv="${2:-.venv}" python="${PYTHON:-python3}"
  local stamp="$venv/installed-${1:-core}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "kdjax needs Python 3.11 or newer; set PYTHON to one (found: $("$python" -V 2>&1 || echo none))" >&2
    return 64
  fi
  if [ ! -x "$venv/bin/python" ]; then
    echo "Making $venv with $("$python" -V)"
    if command -v uv >/dev/null; then
      uv venv --quiet --seed --python "$python" "$venv"
    elif ! "$python" -m venv "$venv"; then
      rm -rf "$venv"
      echo "venv failed; install uv, or the venv package of your Python (python3-venv on Debian)" >&2
      return 64
    fi
  fi
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ requirements.lock -nt "$stamp" ]; then
    echo "Installing kdjax${extras:+[$extras]} (once; a few minutes)"
    local wanted=(--quiet -c requirements.lock -e ".${extras:+[$extras]}")
    if command -v uv >/dev/null; then
      uv pip install --python "$venv/bin/python" "${wanted[@]}"
    else
      "$venv/bin/python" -m pip install --disable-pip-version-check "${wanted[@]}"
    fi
    touch "$stamp"
  fi
}

# torch, at the version of pyproject's [parity], where it has a CPU build (CUDA builds bring gigabytes); 1 where not.
install_torch() {
  local venv="${1:-.venv}" torch="torch==2.13.0"
  if "$venv/bin/python" -c 'import torch' 2>/dev/null; then return; fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --dry-run --no-deps \
    --report "$venv/torch.json" "$torch" >/dev/null 2>&1 || true
  if "$venv/bin/python" - "$venv/torch.json" <<'PY'
import json, sys
try:
    wheel = json.load(open(sys.argv[1]))["install"][0]["metadata"]
except (OSError, ValueError, LookupError):
    sys.exit(1)
sys.exit(sys.platform == "linux" and any("nvidia" in r or "cuda" in r for r in wheel.get("requires_dist", [])))
PY
  then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
  else
    echo "No CPU build of $torch for $("$venv/bin/python" -V)" >&2
    return 1
  fi
}

# What the scripts for several processes share: compute nodes install nothing, they use what is there.
mistake() { echo "kdjax: $1" >&2; exit 64; }
number() { if [[ $2 =~ ^[0-9]+$ ]]; then echo "$2"; else mistake "$1 needs a whole number, got '$2'"; fi; }
quoted() { local line; line="$(printf ' %q' "$@")"; echo "${line:1}"; }  # a command as one could type it
find_kdjax() {  # the kdjax of an active environment, else .venv's
  PATH="$PATH:$PWD/.venv/bin"
  command -v kdjax >/dev/null || mistake "no kdjax on PATH; install it: bash -c '. launch/environment.sh && install cuda'"
}
