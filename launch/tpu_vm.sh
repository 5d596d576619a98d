#!/bin/bash
# TPU slice of v5e with the legacy `tpu-vm` API. Google only fixes bugs in this API, and it lacks
# TPU7x. GKE supports v5e like all other generations (tpu_gke_jobset.yaml).
#
#     bash launch/tpu_vm.sh create      # in the project's folder, with gcloud
#     bash launch/tpu_vm.sh log         # of the first host
#     bash launch/tpu_vm.sh delete      # ends the costs; the end of training does not
#
# Replace: the values in the next four lines, and the bucket and the recipe in tpu_host.sh.
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
