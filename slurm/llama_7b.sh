#!/usr/bin/env bash
# Llama-2 7B from random weights: sbatch --nodes 4 compile.slurm ./llama_7b.sh, then run.slurm with the same.
# Copy this file for a run of your own. It runs once on each node; HERD_NODE_TYPE, HERD_ROOT and HERD are env.sh's.
set -euo pipefail

case ${HERD_NODE_TYPE:-gpu} in
  trn*) RECIPE=llama2_7b_trn2 ;;
  *) RECIPE=llama2_7b_gpu ;;
esac
OVERRIDES=(
  data.train="${DATA:-${HERD_ROOT:-.}/data/llama2/corpus}" # PREFIX of PREFIX.bin and PREFIX.idx, of herd prep tokenize
)

exec "${HERD:-herd}" train "$RECIPE" "${OVERRIDES[@]}" "$@"
