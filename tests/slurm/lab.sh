#!/usr/bin/env bash
# A real SLURM cluster of several nodes on this one machine, without systemd:
#
#   LAB=$(mktemp -d)/lab lab.sh up            munged, slurmctld, NODES slurmd; returns when all nodes are idle
#   LAB=... lab.sh exec sbatch job.sh         a command inside the cluster
#   LAB=... lab.sh crash node2                SIGKILL to the node's daemon and to every process of jobs there
#   LAB=... lab.sh revive node2
#   LAB=... lab.sh down                       ends everything and removes the folder; always trap it
#
# MODE=netns (root): every node has its own network, host name, processes and mounts, on a bridge that exists in the
# lab's own network namespace only. MODE=plain (anyone): all daemons on one address, told apart by their ports. Chosen
# by itself. Keep LAB short: munge's socket lies in it, and such a path has 108 characters at most.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
LAB=${LAB:?a folder for the cluster, which must not exist yet}
NODES=${NODES:-4} CPUS=${CPUS:-4} MEMORY_MB=${MEMORY_MB:-4000} PORT=${PORT:-36800}
[ ! -f "$LAB/env" ] || . "$LAB/env"
if [ -z "${MODE:-}" ]; then
  if unshare -n -u -m -p -f true 2>/dev/null; then MODE=netns; else MODE=plain; fi
fi
export SLURM_CONF=$LAB/etc/slurm.conf

die() {
  echo "lab.sh: $*" >&2
  exit 1
}
pid_of() { cat "$LAB/run/$1.pid" 2>/dev/null || true; }
alive() { [ -n "${1:-}" ] && kill -0 "$1" 2>/dev/null; }

# nsenter -m sets the working directory to /, where sbatch would then write.
inside() {
  if [ "$MODE" = netns ]; then
    nsenter -t "$(pid_of network)" -n -u -m -- sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
  else
    "$@"
  fi
}
daemon() {
  local name=$1
  shift
  if [ "$MODE" = netns ]; then
    setsid nsenter -t "$(pid_of network)" -n -u -m -- "$@" </dev/null >>"$LAB/log/$name.out" 2>&1 &
  else
    setsid "$@" </dev/null >>"$LAB/log/$name.out" 2>&1 &
  fi
  echo $! >"$LAB/run/$name.pid"
}

# slurmctld and slurmd bind to what the host's name resolves to, whatever their configured address is.
own_address() { getent ahostsv4 "$(hostname)" 2>/dev/null | awk 'NR == 1 {print $1}' | grep . || echo 127.0.0.1; }

# A process that holds the controller's network, host name and mounts; a bridge; and a network for each node.
make_network() {
  setsid unshare -n -u -m --propagation private bash -ec '
    lab=$1 nodes=$2
    hostname controller
    mount --bind "$lab/etc/hosts" /etc/hosts
    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.77.0.254/24 dev br0
    ip link set br0 up
    for number in $(seq "$nodes"); do
      network=$lab/run/net.node$number
      touch "$network"
      unshare --net="$network" ip link set lo up
      ip link add "to-node$number" type veth peer name eth0 netns "$network"
      ip link set "to-node$number" master br0 up
      nsenter --net="$network" sh -ec "ip addr add 10.77.0.$number/24 dev eth0; ip link set eth0 up"
    done
    echo $$ >"$lab/run/network.new"
    mv "$lab/run/network.new" "$lab/run/network.pid"
    exec sleep infinity' _ "$LAB" "$NODES" </dev/null >"$LAB/log/network.out" 2>&1 &
  local maker=$!
  for _ in $(seq 500); do
    [ ! -s "$LAB/run/network.pid" ] || return 0
    alive $maker || break
    sleep .02
  done
  die "no network: $(cat "$LAB/log/network.out")"
}

start_node() {
  local node=$1
  mkdir -p "$LAB/spool/$node"
  if [ "$MODE" = netns ]; then
    # The node's first process is a bash that reaps orphans (slurmd does not); the end of unshare ends the whole node.
    setsid nsenter -t "$(pid_of network)" -m -u -- nsenter --net="$LAB/run/net.$node" -- \
      unshare -u -m -p -f --kill-child --mount-proc --propagation private \
      bash -c 'hostname "$1"; slurmd -D -N "$1" & while :; do sleep 3600 & wait $!; done' _ "$node" \
      </dev/null >>"$LAB/log/$node.out" 2>&1 &
  else
    setsid slurmd -D -N "$node" </dev/null >>"$LAB/log/$node.out" 2>&1 &
  fi
  echo $! >"$LAB/run/$node.pid"
}

descendants() {
  local child
  for child in $(pgrep -P "$1" || true); do
    descendants "$child"
    echo "$child"
  done
}
crash_node() {
  local node=$1 pid stepd
  pid=$(pid_of "$node")
  if [ "$MODE" = plain ]; then # its step daemons are children of init
    for stepd in $(pgrep slurmstepd || true); do
      grep -qz "^SLURM_CONF=$LAB/" "/proc/$stepd/environ" 2>/dev/null || continue
      readlink "/proc/$stepd"/fd/* 2>/dev/null | grep -q "slurmd\.$node\.log\|/spool/$node/" || continue
      # shellcheck disable=SC2046
      kill -KILL "$stepd" $(descendants "$stepd") 2>/dev/null || true
    done
  fi
  ! alive "$pid" || kill -KILL "$pid"
  rm -f "$LAB/run/$node.pid"
}

wait_idle() { # nodes, seconds
  local tries=$(($2 * 20))
  while [ $((tries--)) -gt 0 ]; do
    [ "$(inside sinfo -h -t idle -o %D 2>/dev/null || echo 0)" != "$1" ] || return 0
    sleep .05
  done
  return 1
}

configure() {
  local address controller host number node_host node_address node_port
  if [ "$MODE" = netns ]; then
    address=10.77.0.254 host=controller
    node_host="node[1-$NODES]" node_address="10.77.0.[1-$NODES]" node_port=6818
  else
    address=$(own_address) host=$(hostname)
    node_host=localhost node_address=$address node_port="[$((PORT + 101))-$((PORT + 100 + NODES))]"
  fi
  controller="$host($address)"
  {
    echo "127.0.0.1 localhost"
    echo "$address controller"
    for number in $(seq "$NODES"); do echo "10.77.0.$number node$number"; done
    for number in $(seq "$NODES"); do echo "::ffff:10.77.0.$number node$number"; done # torch looks names up backwards
  } >"$LAB/etc/hosts"
  # cred_expire: a requeued job waits until its old credential has expired, by default two minutes.
  # SlurmdTimeout, MessageTimeout, TCPTimeout: a crashed node is down after 12 s; and a busy machine's daemons have time.
  # ReturnToService=1: a node that somebody set down stays down.
  cat >"$LAB/etc/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$controller
SlurmctldPort=$((PORT + 17))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.own.pid
SlurmdPidFile=$LAB/run/slurmd.%n.own.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ReturnToService=1
JobRequeue=1
SlurmctldTimeout=5
SlurmdTimeout=20
MessageTimeout=10
TCPTimeout=3
UnkillableStepTimeout=60
InactiveLimit=0
KillWait=10
MinJobAge=900
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
NodeName=node[1-$NODES] NodeHostname=$node_host NodeAddr=$node_address Port=$node_port CPUs=$CPUS RealMemory=$MEMORY_MB State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  echo "CgroupPlugin=cgroup/v1" >"$LAB/etc/cgroup.conf" # loaded, not used; where only cgroup2 is there, guessing is fatal
}

up() {
  [ ! -e "$LAB" ] || die "$LAB exists"
  mkdir -p "$LAB"/{run,etc,log,state,spool,munge}
  chmod 755 "$LAB" "$LAB"/{run,etc,log}
  chmod 711 "$LAB/munge"
  printf 'MODE=%s NODES=%s PORT=%s\n' "$MODE" "$NODES" "$PORT" >"$LAB/env"
  configure
  (umask 077 && head -c 128 /dev/urandom >"$LAB/munge/key")
  munged --force --key-file="$LAB/munge/key" --socket="$LAB/munge/munge.sock" --pid-file="$LAB/run/munged.pid" \
    --seed-file="$LAB/munge/seed" --log-file="$LAB/munge/munged.log" >"$LAB/log/munged.out" 2>&1 ||
    die "munged: $(tail -n 3 "$LAB/log/munged.out")"
  [ "$MODE" = plain ] || make_network
  daemon slurmctld slurmctld -D
  for _ in $(seq 600); do
    ! inside scontrol ping 2>/dev/null | grep -q "is UP" || break
    alive "$(pid_of slurmctld)" || die "slurmctld: $(tail -n 5 "$LAB/log/slurmctld.out")"
    sleep .05
  done
  local number
  for number in $(seq "$NODES"); do start_node "node$number"; done
  wait_idle "$NODES" 60 || die "nodes not idle: $(inside sinfo -N -o '%N %T') $(tail -n 3 "$LAB"/log/node*.out)"
  echo "$MODE"
}

down() {
  [ -f "$LAB/env" ] || exit 0
  local node name
  for node in "$LAB"/run/node*.pid; do [ ! -e "$node" ] || crash_node "$(basename "$node" .pid)"; done
  for name in slurmctld munged network; do ! alive "$(pid_of $name)" || kill -TERM "$(pid_of $name)"; done
  for _ in $(seq 60); do
    alive "$(pid_of slurmctld)" || alive "$(pid_of munged)" || break
    sleep .05
  done
  for name in slurmctld munged network; do ! alive "$(pid_of $name)" || kill -KILL "$(pid_of $name)"; done
  rm -rf "$LAB"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  exec) shift && inside "$@" ;;
  crash) crash_node "$2" ;;
  revive) start_node "$2" ;;
  *) sed -n 2,15p "$0" && exit 2 ;;
esac
