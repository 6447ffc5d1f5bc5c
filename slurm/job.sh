# shellcheck shell=bash
# What compile.slurm and run.slurm share: `train RECIPE [key=value ...]`, a task on each node, and signals passed on.

# Beside the code, which all nodes see; compile.slurm fills it and run.slurm reads it.
export HERD_ROOT HERD_CACHE=${HERD_CACHE:-$HERD_ROOT/.cache/compile}

need_recipe() { # leaves the script when "$@" does not begin with a recipe
  if (($# == 0)) || [[ $1 == *=* ]]; then
    echo "herd: no recipe; sbatch --nodes 4 run.slurm ./llama_7b.sh [key=value ...]" >&2
    exit 2
  fi
  if [[ $1 == *.sh && ! -r $1 ]]; then
    echo "herd: no recipe $1 in $PWD; give its path from the folder where you call sbatch" >&2
    exit 2
  fi
}

train() {
  local gpus step code=0 hosts options=()
  # Ranks are numbered along this list, so the first node holds rank 0 and the meeting point of all.
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]}
  # A job that starts again must not meet its own last attempt; above 32767 the kernel gives ports to anyone.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  # Steps of a job that only says --exclusive see no GPU: ask for those the node has.
  gpus=${SLURM_GPUS_ON_NODE:-$(scontrol show node "${hosts[0]}" | sed -nE 's/^ *Gres=.*gpu:([^,(]*:)?([0-9]+).*/\2/p')}
  [[ -z $gpus ]] || options+=(--gpus-per-node="$gpus")
  echo "herd: $(date +%FT%T) job $SLURM_JOB_ID attempt ${SLURM_RESTART_COUNT:-0}: $* on $SLURM_JOB_NODELIST," \
    "master $MASTER_ADDR:$MASTER_PORT"

  # Slurm tells this script 180 s before the time limit; the steps' workers save at their next step and end.
  trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
  trap : TERM # scancel signals the steps itself: wait for what they save
  # A node that fails takes the others along: they would wait for it until the collective's time is out.
  srun --export=ALL --label --cpu-bind=none --kill-on-bad-exit=1 --wait=60 ${options[@]+"${options[@]}"} \
    "$HERD_ROOT/slurm/node.sh" train "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || :; done # a trap ends `wait` early, with the signal's code
  wait "$step" || code=$?
  trap - USR1 TERM
  echo "herd: $(date +%FT%T) ended with exit code $code"
  return "$code"
}
