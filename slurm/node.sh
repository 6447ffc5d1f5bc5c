#!/usr/bin/env bash
# What a node of a job runs: a step of job.sh, named in HERD_STEP, in the environment of its kind of node.
#   open RECIPE [key=value ...]     checks the recipe and makes the run folder (on the first node)
#   train | compile RECIPE [...]    torchrun over all ranks of all nodes
#   after FACTS...                  decides what follows
#   export RUN [...]                Hugging Face directory of the newest checkpoint (on the first node)
# A RECIPE that is a shell file is run with HERD naming this file, which it then calls: "$HERD" train RECIPE ...
set -euo pipefail
trap '' USR1 # ignored here and so by torchrun, which would die of it; workers set their own handler: save, then end
# A step that fails while other nodes still start it can hang for a minute: slurmstepd misses the kill (Slurm 22.05, in
# 2 of 60 tries when a task ends at once, in none after half a second).
trap '((SECONDS)) || sleep 0.5' EXIT
HERD_STEP=${HERD_STEP:-train}
[[ ${1:-} != train ]] || shift # as a shell recipe says
(($#)) || {
  echo "herd: node.sh takes a recipe: RECIPE [key=value ...]" >&2
  exit 2
}
# shellcheck source=slurm/env.sh
source "$HERD_ROOT/slurm/env.sh"

if [[ $1 == *.sh ]]; then
  export HERD=$HERD_ROOT/slurm/node.sh HERD_STEP
  exec bash "$@"
fi
case $HERD_STEP in
  export) exec "$HERD_PYTHON" -m launch.cli export "$@" ;;
  open | after) exec "$HERD_PYTHON" -m launch.job "$HERD_STEP" "$@" ;;
esac
if [[ -n ${HERD_RUN:-} ]]; then # a log of each node beside the job's; it outlives the signals that the workers take
  log=$(printf '%s/logs/attempt-%04d/%s.log' "$HERD_RUN" "$HERD_ATTEMPT" "${SLURMD_NODENAME:-$(hostname)}")
  exec > >(trap '' TERM INT USR1 && exec tee -a "$log") 2>&1
fi
"$HERD_PYTHON" -m launch.node_check || exit 1 # else its peers would wait for it
exec "$HERD_PYTHON" -m launch.torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$HERD_RANKS_PER_NODE" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
  -m "launch.$HERD_STEP" "$@"
