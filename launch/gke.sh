#!/usr/bin/env bash
# One run on a TPU slice of GKE: fills launch/gke.yaml (a JobSet) and applies it. --dry-run prints it.
#   launch/gke.sh --name NAME --image IMAGE --claim CLAIM --accelerator tpu-v5-lite-podslice --topology 4x4 \
#     CONFIG --run /runs/NAME [--field VALUE ...]
# IMAGE has kdjax on its PATH; CLAIM is a volume that many nodes write (ReadWriteMany), mounted at /runs.
# Not run on GKE: its manifest is checked against JobSet's models. It starts again by itself, at most --restarts times.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
usage="usage: launch/gke.sh [--dry-run] --name NAME --image IMAGE --claim CLAIM --accelerator ACCELERATOR --topology 4x4
  [--chips 4 (of a host)] [--spot] [--restarts 10] CONFIG [--field VALUE ...]"

dry_run=false spot=false chips=4 restarts=10 name="" image="" claim="" accelerator="" topology=""
while [[ ${1:-} == -* ]]; do
  case "$1" in
    -h | --help) echo "$usage"; exit ;;
    --dry-run) dry_run=true; shift ;;
    --spot) spot=true; shift ;;
    --chips) chips="$(number "$1" "${2:-}")"; shift 2 ;;
    --restarts) restarts="$(number "$1" "${2:-}")"; shift 2 ;;
    --name | --image | --claim | --accelerator | --topology)
      [[ ${2:-} =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || mistake "$1 needs a plain word, got '${2:-}'"
      declare "${1#--}=$2"; shift 2 ;;
    *) mistake "unknown option $1; $usage" ;;
  esac
done
[[ -n $name && -n $image && -n $claim && -n $accelerator && $# -gt 0 ]] || mistake "$usage"
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || mistake "--topology must be like 4x4 or 2x2x4, got '$topology'"
all=$((${topology//x/*}))
((chips > 0 && all % chips == 0)) || mistake "--topology $topology has $all chips, not a multiple of --chips $chips"

words() {  # a JSON list of strings
  local word list=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || mistake "an argument of several lines: $word"
    word="${word//\\/\\\\}"
    list+=", \"${word//\"/\\\"}\""
  done
  echo "[${list#, }]"
}
manifest="$(<launch/gke.yaml)"
# A spot node gives its pods 15 seconds: enough for a step and a save of a small model, else the last save counts.
if $spot; then grace=15; else grace=300; manifest="$(sed '/ # spot$/d' <<<"$manifest")"; fi
fill() { manifest="${manifest//": $1"/": $2"}"; }
fill NAME "\"$name\""
fill IMAGE "\"$image\""
fill CLAIM "\"$claim\""
fill ACCELERATOR "\"$accelerator\""
fill TOPOLOGY "\"$topology\""
fill HOSTS $((all / chips))
fill CHIPS "$chips"
fill GRACE "$grace"
fill RESTARTS "$restarts"
fill COMMAND "$(words kdjax train "$@" --distributed)"
if $dry_run; then echo "$manifest"; exit; fi
kubectl apply --filename - <<<"$manifest"
