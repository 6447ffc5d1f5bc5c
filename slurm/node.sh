#!/usr/bin/env bash
# What each node of a job runs, once: `herd train RECIPE [key=value ...]` over all ranks of all nodes, by torchrun.
# job.sh starts it. A RECIPE that is a shell file is run with HERD naming this file, which it then calls in its turn.
set -euo pipefail
[[ ${1:-} == train && $# -ge 2 ]] || {
  echo "herd: node.sh takes: train RECIPE [key=value ...]" >&2
  exit 2
}
# shellcheck source=slurm/env.sh
source "$HERD_ROOT/slurm/env.sh"

if [[ $2 == *.sh ]]; then
  export HERD=$HERD_ROOT/slurm/node.sh
  exec bash "${@:2}"
fi
# Ignored here and so by torchrun, which would die of it; the workers set their own handler: save, then end.
trap '' USR1
exec "$HERD_PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$HERD_RANKS_PER_NODE" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
  -m launch.train "${@:2}"
