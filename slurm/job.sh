# shellcheck shell=bash
# What compile.slurm and run.slurm share: steps over the job's nodes, signals, and what follows when training ends.
# Decisions are taken by launch/job.py from the run folder; this file speaks to Slurm.

# Slurm runs a copy of the script out of its spool folder; where the original is, the job knows.
HERD_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\.slurm\).*/\1/p')
HERD_LOG=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
# Beside the code, which all nodes see; compile.slurm fills it and run.slurm reads it.
export HERD_ROOT HERD_SCRIPT HERD_LOG HERD_CACHE=${HERD_CACHE:-$HERD_ROOT/.cache/compile}
HERD_RUN='' HERD_ATTEMPT=0 asked='' step=0

say() { echo "herd: $(date +%FT%T) $*"; }

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

prepare() { # what all steps of this job share; takes what the user gave
  local gpus ends
  mkdir -p "$HERD_CACHE"
  HERD_GIVEN=$(printf '%s\n' "$@")
  # Ranks are numbered along this list, so the first node holds rank 0 and the meeting point of all.
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export HERD_GIVEN HERD_NODES="${hosts[*]}" MASTER_ADDR=${hosts[0]}
  ends=$(SLURM_TIME_FORMAT=standard squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null) || ends=''
  HERD_JOB_ENDS=${HERD_JOB_ENDS:-$(date -d "$ends" +%s 2>/dev/null || true)} # "NONE" is no date
  export HERD_JOB_ENDS
  options=(--export=ALL --cpu-bind=none)
  # Steps of a job that only says --exclusive see no GPU: ask for those the node has.
  gpus=${SLURM_GPUS_ON_NODE:-$(scontrol show node "${hosts[0]}" | sed -nE 's/^ *Gres=.*gpu:([^,(]*:)?([0-9]+).*/\2/p')}
  [[ -z $gpus ]] || options+=(--gpus-per-node="$gpus")
  if [[ -n ${HERD_CONTAINER:-} ]]; then # pyxis
    options+=(--container-image="$HERD_CONTAINER" --container-workdir="$PWD")
    options+=(--container-mounts="${HERD_CONTAINER_MOUNTS:-$HERD_ROOT:$HERD_ROOT,$PWD:$PWD}")
  fi
  # shellcheck disable=SC2206 # several options in one variable
  options+=(${HERD_SRUN_OPTIONS:-})
}

on_first() { # STEP ARGUMENTS...: node.sh on the first node alone
  HERD_STEP=$1 srun "${options[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" \
    "$HERD_ROOT/slurm/node.sh" "${@:2}"
}

on_all() { # STEP ARGUMENTS...: node.sh on every node; returns its exit code
  local code=0
  # A job that starts again must not meet its own last attempt; above 32767 the kernel gives ports to anyone.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 64 + HERD_ATTEMPT) % 12000))
  # A node that fails takes the others along: they would wait for it until the collective's time is out.
  HERD_STEP=$1 srun "${options[@]}" --label --nodes="${#hosts[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
    "$HERD_ROOT/slurm/node.sh" "${@:2}" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || :; done # a trap ends `wait` early, with the signal's code
  wait "$step" || code=$?
  step=0
  return "$code"
}

hear() { # signals: Slurm sends USR1 180 s before the time limit, a person to make the job start anew
  trap 'asked=USR1; pass_on' USR1
  trap : TERM # scancel signals the steps itself: wait for what they save
}

pass_on() { # the wish to stop, to workers that listen already and to those that will
  say "asked to stop: training ends after its step and saves"
  [[ -z $HERD_RUN ]] || touch "$(attempt_folder)/stop-asked" 2>/dev/null || :
  scancel --signal=USR1 "$SLURM_JOB_ID" || :
}

attempt_folder() { printf '%s/logs/attempt-%04d' "$HERD_RUN" "$HERD_ATTEMPT"; }

lost_nodes() { # the job's nodes that do not answer, or do not see the run folder
  local answers
  # shellcheck disable=SC2016 # the nodes expand it
  answers=$(timeout -k 1 10 srun --overlap --nodes="${#hosts[@]}" --ntasks-per-node=1 --export=ALL \
    bash -c 'if [[ -w $1 ]]; then echo "$SLURMD_NODENAME"; fi' _ "$(attempt_folder)" 2>/dev/null) || :
  [[ -n $answers ]] || return 0 # nor does this one: it is the controller that does not answer
  comm -13 <(sort <<<"$answers") <(printf '%s\n' "${hosts[@]}" | sort) | paste -sd,
}

ending() { # whether Slurm itself is ending this job
  local state # empty when the controller does not answer, which says nothing
  state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null) || state=''
  [[ -n $state && $state != RUNNING ]]
}

survive() { # RECIPE [key=value ...]: train until it is done, cannot go on, or has to go back into the queue
  local opened code facts verdict argument began
  opened=$(on_first open "$@") || {
    code=$?
    [[ -z $asked ]] || requeue ''
    exit "$code"
  }
  HERD_RUN=$(sed -n 's/^HERD_RUN=//p' <<<"$opened") HERD_ATTEMPT=$(sed -n 's/^HERD_ATTEMPT=//p' <<<"$opened")
  export HERD_RUN HERD_ATTEMPT
  while :; do
    say "job $SLURM_JOB_ID attempt $HERD_ATTEMPT: $* on $SLURM_JOB_NODELIST, logs in $(attempt_folder)"
    code=0 began=$SECONDS
    if [[ -n $asked ]]; then pass_on; fi # between two attempts
    on_all train "$@" || code=$?
    say "training ended with exit code $code"
    facts=(--code "$code")
    if ending; then
      facts+=(--ending)
    elif ((code)); then
      facts+=(--lost "$(lost_nodes)")
    fi
    verdict=$(HERD_STEP=after "$HERD_ROOT/slurm/node.sh" "${facts[@]}") || verdict="fail 1"
    argument=${verdict#* }
    case $verdict in
      done | stop) exit 0 ;;
      restart*)
        export HERD_ATTEMPT=$argument
        ((SECONDS - began > 1)) || sleep 15 # nothing was even started: the controller may be away for a while
        ;;
      requeue*) [[ $verdict == *" "* ]] || argument=''; requeue "$argument" ;;
      *) exit "$argument" ;;
    esac
  done
}

requeue() { # NODES: back into the queue, not to run on these again; the job's number stays, so that others wait for it
  local bad=$1 known all i
  trap '' TERM USR1
  known=$(squeue -h -j "$SLURM_JOB_ID" -o %x 2>/dev/null) || known=''
  [[ $known != "(null)" ]] || known=''
  bad=$(paste -sd, < <(scontrol show hostnames "$bad${known:+${bad:+,}$known}" 2>/dev/null | sort -u))
  all=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u | wc -l) || all=0
  if [[ -n $bad ]] && ((all - $(tr ',' '\n' <<<"$bad" | wc -l) < SLURM_JOB_NUM_NODES)); then
    say "$bad cannot be left out: $SLURM_JOB_PARTITION has $all nodes, the job needs $SLURM_JOB_NUM_NODES"
    bad=''
  fi
  say "back into the queue${bad:+, not to run on $bad}"
  for ((i = 0; ; i++)); do # a controller may be away for a while
    if scontrol requeue "$SLURM_JOB_ID"; then break; fi
    if ((i == 5)); then
      say "Slurm refuses to requeue this job; the same sbatch command goes on from the last checkpoint"
      exit 1
    fi
    sleep 10
  done
  # Only a job that waits can change its nodes: between the requeue and the end of this script is time for that.
  for ((i = 0; i < 20 && ${#bad} > 0; i++)); do
    if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad" 2>/dev/null; then break; fi
    sleep 0.3
  done
  sleep 120 # Slurm ends it here
  exit 1
}
