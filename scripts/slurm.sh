#!/usr/bin/env bash
# A real Slurm of one node on this machine, to try a cluster's launcher without a cluster. Needs Debian's slurm-wlm and munge,
# and no root: its key, its state and its ports are its own, and it runs jobs as whoever starts it.
#
#   eval "$(scripts/slurm.sh start DIR)"   starts it; from then on this shell's sbatch, squeue and scontrol talk to it
#   scripts/slurm.sh status DIR            its node and its jobs
#   scripts/slurm.sh stop DIR              ends its jobs and its daemons; DIR stays, with their logs
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where Debian has the daemons, not everybody's PATH

refuse() {
    echo "slurm.sh: $1" >&2
    exit 2
}

running() { # DAEMON: whether it runs
    [ -f "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null
}

# Another Slurm of this machine may have the usual ones.
free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() {
    local node
    node=$(hostname -s)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=zipeval
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A job that was requeued waits until its credentials are old: by default two minutes.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# Plain processes: cgroups need root, and accounting a database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# A job that was told to end has as many seconds.
KillWait=2
SchedulerParameters=sched_interval=5
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || refuse "$program is not here. As root: apt-get install slurm-wlm munge"
    done
    if running slurmctld; then
        refuse "$dir: one is running there. End it first: scripts/slurm.sh stop $dir"
    fi
    mkdir -p "$dir/state" "$dir/spool"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    configure
    # By force: it wants a socket that all users of a machine can reach. This one is its owner's.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>>"$dir/munged.log"
    slurmctld -f "$dir/slurm.conf" -c
    slurmd -f "$dir/slurm.conf"
    for _ in $(seq 90); do
        if [ "$(SLURM_CONF=$dir/slurm.conf sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$dir/slurm.conf"
            return
        fi
        sleep 1
    done
    stop
    refuse "$dir: the node did not come up in 90 s. See $dir/*.log"
}

stop() {
    local daemon pids=()
    export SLURM_CONF=$dir/slurm.conf
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 20); do # or slurmd would wait for its jobs, which nobody is there to end
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 1
    done
    for daemon in slurmd slurmctld munged; do
        if running "$daemon"; then
            pids+=("$(cat "$dir/$daemon.pid")")
        fi
    done
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}"
    for _ in $(seq 20); do
        kill -0 "${pids[@]}" 2>/dev/null || return 0
        sleep 1
    done
    refuse "$dir: a daemon did not end in 20 s. See $dir/*.log"
}

[ $# -eq 2 ] || refuse "$*: expected start DIR, status DIR or stop DIR."
dir=$(realpath -m "$2")
case $1 in
    start) start ;;
    stop) stop ;;
    status) SLURM_CONF=$dir/slurm.conf sinfo && SLURM_CONF=$dir/slurm.conf squeue ;;
    *) refuse "$1: expected start, status or stop." ;;
esac
