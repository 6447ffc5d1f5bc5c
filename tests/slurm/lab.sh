#!/usr/bin/env bash
# A real Slurm of several virtual nodes on this machine, for tests; everything is gone when its standard input closes.
#
#   lab.sh serve DIR [NODES]        runs the lab until its standard input ends; DIR/ready appears when nodes are idle,
#                                   and DIR goes at the end
#   lab.sh exec DIR head|nodeN CMD  runs CMD there, from the folder you are in
#   lab.sh kill DIR nodeN [silent]  power failure of a node: kill -9 of its process 1; silent: its peers hear nothing
#   lab.sh start DIR nodeN          power on again
#
# The head node (munged, slurmctld, and where sbatch is called) and each compute node (slurmd) are network, host name,
# mount and process namespaces of their own, the nodes inside the head's: no port, name or file of this machine is
# taken, several labs may run at once, and the kernel ends every process and interface with the head's process 1.
# Nodes share the machine's file system but for /tmp and /dev/shm, as a cluster does; LAB_SHARED=DIR:DIR names folders
# under /tmp that they share all the same. What is mounted under DIR/disks on the head node, all nodes see.
# Needs root and Debian's slurmctld, slurmd, slurm-client, munge, iproute2.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
SELF=$(readlink -f "${BASH_SOURCE[0]}")
NET=10.213.7 # inside the head's network only

die() {
  echo "lab.sh: $*" >&2
  exit 1
}

child_of() { # process id, as seen from here, of process 1 in the namespace that `unshare` process $1 made
  local k children
  for ((k = 0; k < 200; k++)); do
    children=$(cat "/proc/$1/task/$1/children" 2>/dev/null) || true
    if [[ -n $children ]]; then
      echo "${children%% *}"
      return
    fi
    sleep 0.02
  done
  die "process $1 made no namespace"
}

configure() { # DIR NODES
  local dir=$1 nodes=$2 i
  mkdir -p "$dir"/{log,state,devices,disks}
  echo "${LAB_SHARED:-}" >"$dir/carried"
  for i in {0..15}; do # Slurm wants devices, of whatever kind
    ln -sfn /dev/null "$dir/devices/nvidia$i"
    ln -sfn /dev/null "$dir/devices/neuron$i"
  done
  head -c 1024 /dev/urandom >"$dir/munge.key"
  chmod 400 "$dir/munge.key"
  {
    echo "127.0.0.1 localhost"
    echo "$NET.254 head"
    # Both families, or each look-up of the missing one waits for a name server that is not there.
    for ((i = 1; i <= nodes; i++)); do printf '%s node%d\n' "$NET.$i" "$i" "::ffff:$NET.$i" "$i"; done
  } >"$dir/hosts"
  {
    echo "NodeName=node[1-$nodes] Name=gpu Type=h200 Count=8 File=$dir/devices/nvidia[0-7]"
    echo "NodeName=node[1-$nodes] Name=neuron Count=16 File=$dir/devices/neuron[0-15]"
  } >"$dir/gres.conf"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=head($NET.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credentials have expired: 6 s from requeue to running here, and 5 more of KillWait when
# its script ignores SIGTERM. Less than 5 is refused, and means 120.
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
# No control groups in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# Nodes have the cores that are written here, not the machine's.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu,neuron
JobRequeue=1
# A node that lost power comes back by itself, one that was set down does not.
ReturnToService=1
# A node without power is known as down after 10 to 18 s; 6 s here made it no sooner. Its job runs on a spare 6 s later,
# or 14 s when the node had its batch script: steps still talk to it, with 20 s at TCPTimeout's default of 2.
SlurmdTimeout=10
TCPTimeout=1
KillWait=5
MessageTimeout=5
# Time limits, and the signals before them, are looked at every 30 s; that number is compiled into slurmctld.
SchedulerParameters=sched_interval=1,batch_sched_delay=0
# A job in urgent sends jobs of main back to the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=16 RealMemory=64000 Gres=gpu:h200:8,neuron:16
PartitionName=DEFAULT MaxTime=INFINITE DefaultTime=10
CONF
  for ((i = 1; i <= nodes; i++)); do echo "NodeName=node$i NodeAddr=$NET.$i" >>"$dir/slurm.conf"; done
  echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1" >>"$dir/slurm.conf"
  echo "PartitionName=urgent Nodes=ALL PriorityTier=10" >>"$dir/slurm.conf"
}

serve() { # DIR [NODES]
  local dir nodes=${2:-5} pid
  dir=$(mkdir -p "$1" && cd "$1" && pwd)
  configure "$dir" "$nodes"
  unshare --mount --propagation private --net --uts --pid --fork --kill-child --mount-proc \
    bash "$SELF" _head "$dir" "$nodes" <&0 >"$dir/log/head" 2>&1 &
  pid=$!
  child_of "$pid" >"$dir/head.pid"
  if wait "$pid"; then rm -rf "$dir"; fi # when it failed, its logs say why
}

head_node() { # process 1 of the head node
  local dir=$1 nodes=$2 i k
  hostname head
  mount --bind "$dir/hosts" /etc/hosts
  mount --bind /dev/null /etc/resolv.conf
  mount -t tmpfs -o mode=755 tmpfs /run # munged's socket
  mount --bind "$dir/disks" "$dir/disks"
  mount --make-shared "$dir/disks" # the only folder whose mounts reach the nodes
  ip link set lo up
  ip link add lab type bridge
  ip addr add "$NET.254/24" dev lab
  ip link set lab up
  mkdir -m 755 /run/munge
  munged --force --key-file="$dir/munge.key" --log-file="$dir/log/munged" --seed-file="$dir/munge.seed" \
    --pid-file="$dir/munged.pid" --socket=/run/munge/munge.socket.2
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -D &
  for ((i = 1; i <= nodes; i++)); do start_node "$dir" "node$i"; done
  for ((k = 0; k < 300; k++)); do
    if [[ $(sinfo -h -N -p main -o %T 2>/dev/null | grep -cx idle) == "$nodes" ]]; then
      touch "$dir/ready"
      break
    fi
    sleep 0.1
  done
  while read -r _; do :; done # until whoever wanted the lab is gone
}

start_node() { # DIR nodeN, on the head node
  local dir=$1 name=$2 i=${2#node} pid init
  [[ -z $(init_of "$dir" "$name") ]] || die "$name is on"
  ip link del "port$i" 2>/dev/null || true
  # In a session of its own: it outlives the terminal of whoever starts it again.
  setsid unshare --mount --propagation slave --net --uts --pid --fork --kill-child --mount-proc \
    bash "$SELF" _node "$dir" "$name" </dev/null >>"$dir/log/$name" 2>&1 &
  pid=$!
  init=$(child_of "$pid")
  ip link add "port$i" type veth peer name eth0 netns "$init"
  ip link set "port$i" master lab up
  echo "$init" >"$dir/$name.pid"
  readlink "/proc/$init/ns/pid" >"$dir/$name.space" # so that its processes are known from outside, dead ones too
}

init_of() { # DIR nodeN, on the head node: its process 1; nothing when the node is off
  local pid
  pid=$(cat "$1/$2.pid" 2>/dev/null) || return 0
  # The number may have gone to another process.
  [[ $(readlink "/proc/$pid/ns/pid") != "$(cat "$1/$2.space" 2>/dev/null)" ]] || echo "$pid"
}

kill_node() { # DIR nodeN [silent], on the head node
  local init
  init=$(init_of "$1" "$2")
  [[ -n $init ]] || die "$2 is off"
  # A dying process closes its connections; without its cable, peers learn nothing, as of a power failure.
  [[ ${3:-} != silent ]] || ip link set "port${2#node}" down
  kill -9 "$init"
  # Process 1 goes last: then every process, mount and interface of the node is gone.
  while [[ -e /proc/$init ]]; do sleep 0.02; done
}

compute_node() { # process 1 of a compute node
  local dir=$1 name=$2 shared folder k
  hostname "$name"
  # A node's own /tmp, with the shared folders under it carried over.
  mount -t tmpfs tmpfs /mnt
  IFS=: read -ra shared <<<"$dir:$(cat "$dir/carried")" # as when the lab began, also for a node that comes back
  for ((k = 0; k < ${#shared[@]}; k++)); do
    [[ ${shared[k]} == /tmp/* ]] || continue
    mkdir "/mnt/$k"
    mount --rbind "${shared[k]}" "/mnt/$k"
  done
  mount -t tmpfs -o mode=1777 tmpfs /tmp
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  for folder in /mnt/*/; do
    [[ -d $folder ]] || continue
    k=$(basename "$folder")
    mkdir -p "${shared[k]}"
    mount --rbind "$folder" "${shared[k]}"
  done
  umount -l /mnt
  for ((k = 0; k < 200; k++)); do
    if ip link show eth0 &>/dev/null; then break; fi
    sleep 0.02
  done
  ip link set lo up
  ip addr add "$NET.${name#node}/24" dev eth0
  ip link set eth0 up
  mkdir -p "$dir/spool-$name"
  SLURM_CONF=$dir/slurm.conf slurmd -D &
  while :; do sleep 3600 & wait $! || true; done # reaps what is orphaned here
}

enter() { # DIR head|nodeN CMD...
  local dir=$1 name=$2
  shift 2
  [[ $name == head ]] || set -- bash "$SELF" _enter "$dir" "$name" "$@"
  exec nsenter -t "$(cat "$dir/head.pid")" -m -n -u -p -- env -C "$PWD" SLURM_CONF="$dir/slurm.conf" "$@"
}

enter_node() { # DIR nodeN CMD..., on the head node
  local init
  init=$(init_of "$1" "$2")
  [[ -n $init ]] || die "$2 is off"
  exec nsenter -t "$init" -m -n -u -p -- env -C "$PWD" "${@:3}"
}

verb=${1:?"serve, exec, kill or start"}
shift
case $verb in
  serve) serve "$@" ;;
  exec) enter "$@" ;;
  kill | start) enter "$1" head bash "$SELF" "_$verb" "$@" ;;
  _enter) enter_node "$@" ;;
  _kill) kill_node "$@" ;;
  _start) start_node "$@" ;;
  _head) head_node "$@" ;;
  _node) compute_node "$@" ;;
  *) die "no verb $verb" ;;
esac
