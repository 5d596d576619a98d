#!/bin/bash
# Runs as root at every start of each host of a TPU slice. tpu_mig.sh and tpu_vm.sh send it.
#
# Replace: YOUR_BUCKET, with the same value as in the sending script, and the recipe.
BUCKET=YOUR_BUCKET
export HOME="${HOME:-/root}" JAX_COORDINATOR_PORT=8476
export PATH="$HOME/.local/bin:$PATH"

mkdir -p "$HOME/diht_jax" && cd "$HOME/diht_jax" || exit
gcloud storage cat "gs://$BUCKET/diht_jax.tar.gz" | tar xz || exit
# The Python of the hosts may be 3.10.
command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh || exit
uv venv -q --allow-existing --python 3.11 && uv pip install -q '.[tpu,eval,cloud]' || exit
. .venv/bin/activate || exit
for _ in $(seq 100); do
    python -m diht_jax.train --config configs/diht_vitb16.py \
        --config.data.train="gs://$BUCKET/labelled" --workdir="gs://$BUCKET/runs/b16"
    case $? in 0|2|78) break;; esac  # finished, a wrong flag, a non-retryable error
    sleep 30
done
