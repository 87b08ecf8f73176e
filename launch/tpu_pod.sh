#!/usr/bin/env bash
# One run on all workers of a Cloud TPU slice, over ssh; each has kdjax's repository in the folder `kdjax`.
#   launch/tpu_pod.sh --tpu NAME --zone ZONE CONFIG --run FOLDER_THAT_ALL_WORKERS_SEE [--field VALUE ...]
# Not tested on a TPU: only its dry run is. Nothing starts the run again; the same command resumes it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
usage="usage: launch/tpu_pod.sh [--dry-run] --tpu NAME --zone ZONE [--folder kdjax] CONFIG [--field VALUE ...]"

dry_run=false tpu="" zone="" folder=kdjax
while [[ ${1:-} == -* ]]; do
  case "$1" in
    -h | --help) echo "$usage"; exit ;;
    --dry-run) dry_run=true; shift ;;
    --tpu | --zone | --folder) (($# > 1)) || mistake "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
    *) mistake "unknown option $1; $usage" ;;
  esac
done
[[ -n $tpu && -n $zone && $# -gt 0 ]] || mistake "$usage"

# A worker's disk is its own, so each installs; PYTHON names one that is new enough, as in `PYTHON=python3.12 launch/...`.
remote="cd $(quoted "$folder") && ${PYTHON:+export PYTHON=$(quoted "$PYTHON") && }. launch/environment.sh && install tpu"
remote+=" && exec .venv/bin/kdjax train $(quoted "$@") --distributed"
command=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone" --worker=all "--command=$remote")
if $dry_run; then quoted "${command[@]}"; exit; fi
exec "${command[@]}"
