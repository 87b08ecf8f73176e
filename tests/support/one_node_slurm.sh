#!/usr/bin/env bash
# A real Slurm of one node, as root; all its files lie in one folder, of an absolute path.
#   tests/support/one_node_slurm.sh start FOLDER CONTROLLER_PORT NODE_PORT
#   tests/support/one_node_slurm.sh stop FOLDER
# Needs: apt-get install --no-install-recommends slurm-wlm munge. Clients need SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
action="$1" folder="$2" host="$(hostname -s)"
export PATH="$PATH:/usr/sbin" SLURM_CONF="$2/slurm.conf"

if [[ $action == stop ]]; then
  for daemon in slurmd slurmctld munged; do
    if [[ -s $folder/$daemon.pid ]]; then kill "$(<"$folder/$daemon.pid")" || true; fi
  done
  exit
fi
mkdir -p "$folder"/{state,spool}
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
# cred_expire is also how long a requeued job waits: 120 seconds by default, 5 at least.
cat >"$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=$3
SlurmdPort=$4
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=32 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
slurmctld
slurmd
for _ in $(seq 100); do
  if sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then exit; fi
  sleep 0.1
done
tail -n 5 "$folder"/*.log >&2
echo "Slurm did not start in 10 seconds" >&2
exit 1
