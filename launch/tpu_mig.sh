#!/bin/bash
# TPU slice on Compute Engine (v5p, v6e, TPU7x). Its hosts are a managed instance group, and a
# workload policy connects them to one torus.
#
#     bash launch/tpu_mig.sh create     # in the project's folder, with gcloud
#     bash launch/tpu_mig.sh log        # of the first host
#     bash launch/tpu_mig.sh delete     # ends the costs; the end of training does not
#
# Replace: the values in the next six lines, and the bucket and the recipe in tpu_host.sh.
NAME=b16
ZONE=us-east5-b
GENERATION=v6e  # v5p, v6e or tpu7x
TOPOLOGY=16x16  # chips along each axis
BUCKET=YOUR_BUCKET
CAPACITY=(--provisioning-model=SPOT --instance-termination-action=STOP)  # (): on demand

set -euo pipefail
folder=$(dirname "$0")
region=${ZONE%-*}
hosts=$((${TOPOLOGY//x/*} / 4))
image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
case $GENERATION in
    v5p) machine=ct5p-hightpu-4t;;
    v6e) machine=ct6e-standard-4t;;
    tpu7x) machine=tpu7x-standard-4t image=ubuntu-accel-2404-amd64-tpu-tpu7x;;
    *) echo "GENERATION=$GENERATION: expected v5p, v6e or tpu7x" >&2; exit 2;;
esac

case ${1:-} in
create)
    git archive --format=tar.gz HEAD | gcloud storage cp - "gs://$BUCKET/diht_jax.tar.gz"
    gcloud compute resource-policies create workload-policy "$NAME" --region="$region" \
        --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
    gcloud compute instance-templates create "$NAME" --machine-type="$machine" \
        --image-project=ubuntu-os-accelerator-images --image-family="$image" \
        --boot-disk-size=200GB --maintenance-policy=TERMINATE --scopes=cloud-platform \
        --metadata-from-file=startup-script="$folder/tpu_host.sh" "${CAPACITY[@]}"
    project=$(gcloud config get-value project)
    # Creates all hosts at once. A lost host is not replaced: a new one would not be in the torus.
    gcloud compute instance-groups managed create "$NAME" --zone="$ZONE" --template="$NAME" \
        --size="$hosts" --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
        --workload-policy="projects/$project/regions/$region/resourcePolicies/$NAME"
    ;;
log)
    first=$(gcloud compute instance-groups managed list-instances "$NAME" --zone="$ZONE" \
        --format='value(name)' --limit=1)
    gcloud compute ssh "$first" --zone="$ZONE" \
        --command='sudo journalctl --unit=google-startup-scripts --follow'
    ;;
delete)
    gcloud compute instance-groups managed delete "$NAME" --zone="$ZONE"
    gcloud compute instance-templates delete "$NAME"
    gcloud compute resource-policies delete "$NAME" --region="$region"
    ;;
*)
    echo "usage: $0 create|log|delete" >&2
    exit 2
    ;;
esac
