#!/usr/bin/env bash
# One run in several processes on this machine: one a GPU, or on CPU as many as --processes says (2).
#   launch/local.sh [--processes N] CONFIG [--field VALUE ...]
# The first that fails ends the others, and gives the exit code; SIGTERM and SIGINT are passed on to all of them, and
# they end by themselves when this script is killed outright.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
usage="usage: launch/local.sh [--dry-run] [--processes N] [--port PORT] [--grace SECONDS] CONFIG [--field VALUE ...]"

dry_run=false processes="" port=$((20000 + $$ % 10000)) grace=15
while [[ ${1:-} == -* ]]; do
  case "$1" in
    -h | --help) echo "$usage"; exit ;;
    --dry-run) dry_run=true; shift ;;
    --processes) processes="$(number "$1" "${2:-}")"; shift 2 ;;
    --port) port="$(number "$1" "${2:-}")"; shift 2 ;;
    --grace) grace="$(number "$1" "${2:-}")"; shift 2 ;;
    *) mistake "unknown option $1; $usage" ;;
  esac
done
(($# > 0)) || mistake "$usage"
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || mistake "bash 5.1 or newer is needed, this is $BASH_VERSION"
find_kdjax

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
fi
processes="${processes:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 2))}"
((processes > 0)) || mistake "--processes must be at least 1, got $processes"
((${#gpus[@]} == 0 || processes <= ${#gpus[@]})) || mistake "--processes $processes, but there are ${#gpus[@]} GPUs"

config=("$@")
command_of() {  # sets `command` to that of process $1
  local device="JAX_PLATFORMS=cpu"
  if ((${#gpus[@]} > 0)); then device="CUDA_VISIBLE_DEVICES=${gpus[$1]}"; fi
  command=(env "$device" kdjax train "${config[@]}"
    --coordinator "127.0.0.1:$port" --processes "$processes" --process "$1")
}
if $dry_run; then
  for ((i = 0; i < processes; i++)); do command_of "$i"; quoted "${command[@]}"; done
  exit
fi

pids=() stopping=false
signal_all() { stopping=true; kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap "signal_all INT" INT
trap "signal_all TERM" TERM HUP
pipe="$(mktemp -u)"
mkfifo "$pipe"
exec {both}<>"$pipe"  # or the next two wait for one another
# shellcheck disable=SC2094  # a pipe is read and written
exec {told}>"$pipe" {lives}<"$pipe"  # told is held here alone: lives ends with this script
exec {both}>&-
rm "$pipe"
export KDJAX_PARENT="$lives"
set -m  # a process group each: Ctrl-C reaches this script alone, which passes it on once
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  "${command[@]}" </dev/null {told}>&- &
  pids+=($!)
done

code=0 killer=""
while ((${#pids[@]} > 0)); do
  status=0 ended=""
  wait -n -p ended "${pids[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue  # a signal came, and was passed on
  for i in "${!pids[@]}"; do if [[ ${pids[i]} == "$ended" ]]; then unset "pids[i]"; fi; done
  if ((status != 0 && code == 0)); then
    code=$status
    if ((${#pids[@]} > 0)); then
      $stopping || { echo "kdjax: a process ended with $code; the others are ended" >&2; signal_all TERM; }
      { exec {told}>&-; sleep "$grace" && kill -s KILL -- "${pids[@]/#/-}"; } 2>/dev/null &  # with their own children
      killer=$!
    fi
  fi
done
[[ -z $killer ]] || kill -- "-$killer" 2>/dev/null || true
exit "$code"
