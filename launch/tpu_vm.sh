#!/bin/bash
# TPU slice of v5e by the `tpu-vm` API. Legacy: Google mends that API and adds nothing to it, TPU7x
# is not in it. On GKE v5e is as good as any other (tpu_gke_jobset.yaml).
#
#     bash launch/tpu_vm.sh create      # from the folder of this project, with gcloud
#     bash launch/tpu_vm.sh log         # of the first host
#     bash launch/tpu_vm.sh delete      # costs end here, not at the end of training
#
# Replace: the values of the next four lines, and in tpu_host.sh bucket and recipe.
NAME=b16
ZONE=us-west4-b
CHIPS=256
BUCKET=YOUR_BUCKET

set -euo pipefail
folder=$(dirname "$0")

case ${1:-} in
create)
    git archive --format=tar.gz HEAD | gcloud storage cp - "gs://$BUCKET/diht_jax.tar.gz"
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
        --accelerator-type="v5litepod-$CHIPS" --version=v2-alpha-tpuv5-lite --spot \
        --metadata-from-file=startup-script="$folder/tpu_host.sh"
    ;;
log)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
        --command='sudo journalctl --unit=google-startup-scripts --follow'
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
    ;;
*)
    echo "usage: $0 create|log|delete" >&2
    exit 2
    ;;
esac
