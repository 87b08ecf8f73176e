#!/usr/bin/env bash
# One run on a Slurm cluster: one task a GPU, or one a node. Slurm starts it again where it was preempted, or fell.
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh CONFIG [--field VALUE ...]
#SBATCH --job-name=kdjax
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to every kdjax (not to this shell) five minutes before the time limit: they save and exit with 85.
#SBATCH --signal=TERM@300
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] || cd "$(dirname "$0")/.."  # Slurm runs a copy of this file, in the folder of sbatch
. launch/environment.sh || { echo "run sbatch in kdjax's own folder, or with --chdir" >&2; exit 64; }
usage="usage: sbatch [SBATCH OPTIONS] launch/slurm.sh [--dry-run] [--restarts 10] CONFIG [--field VALUE ...]"

dry_run=false restarts=10
while [[ ${1:-} == -* ]]; do
  case "$1" in
    -h | --help) echo "$usage"; exit ;;
    --dry-run) dry_run=true; shift ;;
    --restarts) restarts="$(number "$1" "${2:-}")"; shift 2 ;;
    *) mistake "unknown option $1; $usage" ;;
  esac
done
(($# > 0)) || mistake "$usage"
$dry_run || [[ -n ${SLURM_JOB_ID:-} ]] || mistake "not in a Slurm job; $usage"
find_kdjax

job="${SLURM_JOB_ID:-0}" restarted="${SLURM_RESTART_COUNT:-0}"
nodes="${SLURM_JOB_NUM_NODES:-1}" gpus="${SLURM_GPUS_ON_NODE:-0}"
tasks="${SLURM_NTASKS:-$nodes}" each=$((${SLURM_NTASKS:-$nodes} / nodes))
# JAX would take a port from the job's number alone, where a restarted job may find its own last coordinator.
environment=("JAX_COORDINATOR_PORT=$((61440 + (16 * job + restarted) % 4096))")
# Not --kill-on-bad-exit: it ends the others while they save, and hides the first one's exit code behind theirs.
step=(srun --ntasks="$tasks" --ntasks-per-node="$each" --label --wait=60)
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
if ((gpus > 0)); then
  step+=(--gpu-bind=none)  # a task sees its node's GPUs, and JAX takes the one with the task's number
  if ((each == 1)); then
    environment+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))")
  elif ((each != gpus)); then
    mistake "$each tasks on a node of $gpus GPUs; take --ntasks-per-node $gpus (one a GPU) or 1 (one a node)"
  fi
fi
command=(env "${environment[@]}" "${step[@]}" kdjax train "$@" --distributed)
if $dry_run; then quoted "${command[@]}"; exit; fi

trap : TERM  # this shell decides after its tasks
code=0
"${command[@]}" || code=$?

requeue() {  # but for a job that was cancelled, or that Slurm itself requeues: those are not RUNNING any more
  [[ $(squeue --noheader --job "$job" --format %T) == RUNNING ]] || return 0
  echo "kdjax ended with $code after $restarted restarts: requeued"
  scontrol requeue "$job"
}
case "$code" in
  85) requeue ;;  # preempted, and saved
  75 | 124 | 134 | 137 | 143)  # not all tasks came, the watchdog's, or ended by a signal
    if ((restarted < restarts)); then requeue; else echo "kdjax ended with $code; no restart is left" >&2; fi ;;
esac
exit "$code"
