# shellcheck shell=bash
# What a kind of node needs before Python starts: the one place for every such fact. Sourced; never run.
#
# node.sh sources it on each node, since the batch script may see no device. Takes HERD_ROOT and HERD_CACHE (folder of
# compile caches) from job.sh; sets HERD_PYTHON, HERD_NODE_TYPE (trn2, trn3, gpu or cpu; names of instances are understood),
# HERD_RANKS_PER_NODE and what libraries read. What is set already is left alone.
# Trainium's values are from AWS Neuron's documentation and training scripts (Neuron 2.33).

herd_node_type() { # the kind of this node, from its devices
  local product=""
  if compgen -G '/dev/neuron[0-9]*' >/dev/null; then
    read -r product </sys/devices/virtual/dmi/id/product_name 2>/dev/null || true # EC2 gives the instance type here
    case $product in
      trn[123]*) echo "${product:0:4}" ;;
      *)
        echo "herd: Neuron devices, but product ${product:-unknown}: set HERD_NODE_TYPE=trn2 or trn3" >&2
        return 1
        ;;
    esac
  elif compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    echo gpu
  else
    echo cpu
  fi
}

herd_kind() { # trn2, trn3, gpu or cpu for what a person or an instance calls it
  case ${1,,} in
    trn1*)
      echo "herd: $1: Trn1 is not supported: AWS ended training there with Neuron 2.29, and PyTorch's native stack needs" \
        "Trn2 or newer; use trn2 or gpu nodes (docs/trainium.md)" >&2
      return 1
      ;;
    trn2 | trn2.* | trn2u.*) echo trn2 ;;
    trn3 | trn3.* | trn3u.*) echo trn3 ;;
    gpu | cuda | [abh][0-9]* | gh200 | gb[0-9]* | *x[abh][0-9]* | p[3-9]*.*xlarge) echo gpu ;;
    cpu | c[0-9]*.*xlarge | m[0-9]*.*xlarge) echo cpu ;;
    *)
      echo "herd: HERD_NODE_TYPE=$1 is not one of trn2, trn3, gpu, cpu, nor an instance of these" >&2
      return 1
      ;;
  esac
}

herd_ranks() { # processes on a node of this kind: one a GPU, one a logical NeuronCore
  local gpus
  case $1 in
    trn2 | trn3) echo $((128 / ${NEURON_LOGICAL_NC_CONFIG:-2})) ;; # 16 chips × 8 cores, two of which make a logical one
    gpu)
      if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES" # what Slurm gave this step
      else
        mapfile -t gpus < <(compgen -G '/dev/nvidia[0-9]*')
      fi
      echo "${#gpus[@]}"
      ;;
    cpu) echo 1 ;;
  esac
}

if [[ -z ${HERD_PYTHON:-} ]]; then
  HERD_PYTHON=python3
  for candidate in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" "$HERD_ROOT/.venv/bin/python"; do
    if [[ -x $candidate ]]; then
      HERD_PYTHON=$candidate
      break
    fi
  done
  unset candidate
fi
HERD_NODE_TYPE=${HERD_NODE_TYPE:-$(herd_node_type)} || return
HERD_NODE_TYPE=$(herd_kind "$HERD_NODE_TYPE") || return
HERD_RANKS_PER_NODE=${HERD_RANKS_PER_NODE:-$(herd_ranks "$HERD_NODE_TYPE")} || return
export HERD_PYTHON HERD_NODE_TYPE HERD_RANKS_PER_NODE
export PYTHONPATH=$HERD_ROOT${PYTHONPATH:+:$PYTHONPATH} # the code beside these scripts is what runs
# A node opens a socket to every other rank, and a file for every part of a checkpoint.
ulimit -S -n 65535 2>/dev/null || ulimit -S -n "$(ulimit -H -n)"

# torch's flight recorder keeps the last collectives of each rank, for when a run hangs.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

herd_efa() { # libfabric over AWS's Elastic Fabric Adapter
  export FI_PROVIDER=${FI_PROVIDER:-efa} FI_EFA_USE_DEVICE_RDMA=${FI_EFA_USE_DEVICE_RDMA:-1}
  local major minor
  IFS=.- read -r major minor _ <<<"$(uname -r)"
  # From 5.15 on the kernel itself keeps pages apart after a fork, and the setting only costs time.
  ((major > 5 || (major == 5 && minor >= 15))) || export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1}
}

case $HERD_NODE_TYPE in
  trn*)
    herd_efa
    # Read when torch is imported, so no later than here. The shared cache is keyed by content and safe on NFS.
    export TORCH_NEURONX_NEFF_CACHE_DIR=${TORCH_NEURONX_NEFF_CACHE_DIR:-$HERD_CACHE/neff}
    export TORCH_NEURONX_HLO_CACHE_DIR=${TORCH_NEURONX_HLO_CACHE_DIR:-$HERD_CACHE/hlo}
    export TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR=${TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR:-/tmp/herd-neff-$(id -u)}
    export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-128}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    ;;
  gpu)
    [[ ! -d /sys/bus/pci/drivers/efa ]] || herd_efa
    # Without it the allocator's fragments cost several GB when sequence buffers come and go.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    ;;
  cpu)
    if [[ -z ${OMP_NUM_THREADS:-} ]]; then
      threads=$(($(nproc) / HERD_RANKS_PER_NODE))
      export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
      unset threads
    fi
    ;;
esac
