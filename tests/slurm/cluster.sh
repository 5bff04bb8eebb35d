#!/usr/bin/env bash
# A real Slurm of N virtual nodes on this one machine: node1 ... nodeN, without systemd, containers, accounting or GPUs.
#
#   cluster.sh install    install Slurm and munge (Debian, Ubuntu; as root)
#   cluster.sh up N       start a cluster of N nodes, partitions main, scratch and urgent, whose jobs preempt the others'
#                         (those of main are requeued, those of scratch are cancelled)
#   cluster.sh lose NODE  as if it lost power: nothing of it answers, and no peer sees a connection close
#   cluster.sh revive NODE switch a lost node on again
#   cluster.sh restart    stop slurmctld, and start it again some seconds later
#   cluster.sh env        print the variables that point Slurm's commands at it: export $(cluster.sh env)
#   cluster.sh down       stop it and all that runs on it, and remove its folder
#
# Settings, as environment variables:
#   SLURM_TEST_DIR     a folder of its own for configuration, state and logs   [/tmp/slurm-test]
#   SLURM_TEST_PORT    the first of the N + 1 TCP ports that it takes          [30000]
set -euo pipefail

FOLDER=$(realpath -m "${SLURM_TEST_DIR:-/tmp/slurm-test}")
PORT=${SLURM_TEST_PORT:-30000}   # above those that jobs take (slurm/tasks.py) and below those of clients
CPUS_PER_NODE=8                  # what a node claims to have
SOCKET=$FOLDER/munge/socket
HOSTS_MARK="# $FOLDER"           # ends our lines in /etc/hosts
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$FOLDER/slurm.conf

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

install() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}

up() {
  local nodes=$1 k
  [ ! -e "$SLURM_CONF" ] || fail "a cluster is in $FOLDER; take it down first: $0 down"
  mkdir -p "$FOLDER"/{munge,state,spool,log}
  write_conf "$nodes"
  for ((k = 1; k <= nodes; k++)); do name_node "node$k"; done

  mungekey --create --keyfile "$FOLDER/munge/key"
  munged --force --socket "$SOCKET" --key-file "$FOLDER/munge/key" --seed-file "$FOLDER/munge/seed" \
    --pid-file "$FOLDER/munge/pid" --log-file "$FOLDER/log/munged.log" 2>> "$FOLDER/log/munged.log"
  wait_for munge --socket "$SOCKET" --no-input
  slurmctld
  wait_for scontrol ping
  for ((k = 1; k <= nodes; k++)); do start_node "node$k"; done
  wait_for all_idle "$nodes"
}

down() {
  local pids
  while pids=$(own_processes) && [ -n "$pids" ]; do # more than once: they may start others meanwhile
    kill -KILL $pids 2> /dev/null || true
    sleep 0.1
  done
  unname_nodes
  if [ -e "$SLURM_CONF" ]; then rm -rf "$FOLDER"; fi
}

write_conf() {
  local nodes=$1 user hostname=localhost k
  user=$(id -un)
  cat > "$SLURM_CONF" << END
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket=$SOCKET,cred_expire=5
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# nodes have what they claim to have
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=10
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=scratch Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
END
  for ((k = 1; k <= nodes; k++)); do
    if own_hostnames; then hostname=$(hostname_of "node$k"); fi
    echo "NodeName=node$k NodeHostname=$hostname NodeAddr=127.0.0.1 Port=$((PORT + k)) CPUs=$CPUS_PER_NODE RealMemory=2000"
  done >> "$SLURM_CONF"
}

name_node() { # jobs connect to the first of their nodes by its name
  if [ -w /etc/hosts ]; then echo "127.0.0.1 $1 $(hostname_of "$1") $HOSTS_MARK" >> /etc/hosts; fi
  getent hosts "$1" > /dev/null || fail "$1: unknown host; run this as root, or add to /etc/hosts: 127.0.0.1 $1"
}

unname_nodes() {
  local others
  if [ -w /etc/hosts ]; then
    others=$(grep -v "$HOSTS_MARK\$" /etc/hosts) || true
    printf '%s\n' "$others" > /etc/hosts # in place: in a container it is a mount
  fi
}

hostname_of() { echo "$1.test"; } # as on many a site, not the name that Slurm has for the node

own_hostnames() { unshare --uts true 2> /dev/null; } # whether each node can have a hostname of its own: as root

start_node() {
  mkdir -p "$FOLDER/spool/$1"
  if own_hostnames; then
    unshare --uts sh -c 'hostname "$0" && exec slurmd -N "$1"' "$(hostname_of "$1")" "$1"
  else
    slurmd -N "$1"
  fi
}

lose() {
  local daemon uts
  daemon=$(cat "$FOLDER/slurmd-$1.pid")
  uts=$(readlink "/proc/$daemon/ns/uts")
  [ "$uts" != "$(readlink /proc/self/ns/uts)" ] || fail "lose: only as root, where nodes have hostnames of their own"
  echo "$uts" > "$FOLDER/lost-$1"
  signal_node STOP "$uts"
  kill -KILL "$daemon"
}

revive() {
  signal_node KILL "$(cat "$FOLDER/lost-$1")" # a new slurmd would wait for an answer of the steps
  rm "$FOLDER/lost-$1"
  start_node "$1"
}

signal_node() { # signal_node SIGNAL NAMESPACE: all that was ever started on a node is in its UTS namespace
  local process
  for process in /proc/[0-9]*; do
    if [ "$(readlink "$process/ns/uts")" = "$2" ]; then kill "-$1" "${process#/proc/}" || true; fi
  done 2> /dev/null
}

restart() {
  kill -TERM "$(cat "$FOLDER/slurmctld.pid")"
  sleep 5
  slurmctld
  wait_for scontrol ping
}

all_idle() { [ "$(sinfo --noheader --partition=main --Node --states=idle | wc -l)" = "$1" ]; }

own_processes() { # the daemons and the tasks of jobs, but no program of a user who has exported SLURM_CONF
  local file
  for file in $(grep -lszxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ); do
    if grep -qsE '^(munged|slurm)' "${file%environ}comm" || grep -qsz '^SLURMD_NODENAME=' "$file"; then
      basename "${file%/environ}"
    fi
  done
}

wait_for() { # wait_for COMMAND...: until it succeeds
  local end=$((SECONDS + 30))
  until "$@" > /dev/null 2>&1; do
    if ((SECONDS >= end)); then
      tail -n 5 "$FOLDER"/log/* >&2
      fail "still fails after 30 s: $*"
    fi
    sleep 0.1
  done
}

case ${1:-} in
  install) install ;;
  up) up "${2:?the number of nodes}" ;;
  lose) lose "${2:?the node}" ;;
  revive) revive "${2:?the node}" ;;
  restart) restart ;;
  env) echo "SLURM_CONF=$SLURM_CONF" ;;
  down) down ;;
  *) sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2 ;;
esac
