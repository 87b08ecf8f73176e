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
