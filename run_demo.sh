#!/usr/bin/env bash
# The whole path on an embedded data set: noisy pairs -> filter -> concept labels -> three trainings
# -> zero-shot results side by side. Makes .venv where it is missing. Everything goes to demo_output/; a stopped
# demo continues where it was. To start anew: rm -r demo_output
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
out=demo_output
mkdir -p "$out/logs"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# step SHOWN_NAME LOG_NAME MODULE FLAGS...: prints the name and the seconds; shows the command's own output
# when it fails, and its progress bars while it runs on a terminal.
step() {
  local name=$1 log="$out/logs/$2.log" start=$SECONDS
  shift 2
  printf '%-58s' "$name" >&2
  if [ -t 2 ]; then printf '\n' >&2; fi
  if [ -t 2 ]; then
    "$python" -m "$@" > "$log" || { cat "$log" >&2; exit 1; }
  else
    "$python" -m "$@" > "$log" 2>&1 || { printf '\n' >&2; tail -n 30 "$log" >&2; exit 1; }
  fi
  printf '%5d s\n' "$((SECONDS - start))" >&2
}

train() { # NAME SHOWN_NAME RECORDS FLAGS...
  step "Training: $2" "train_$1" diht_jax.train --config configs/demo.py \
    --config.data.train="$out/$3" --workdir "$out/$1" "${@:4}"
}

evaluate() { # NAME SHOWN_NAME
  local web="$out/web"
  local tasks="shape=classification:$web/val_shape.tar?templates=@$web/val_shape.templates.txt"
  tasks+=",color=classification:$web/val_color.tar?templates=@$web/val_color.templates.txt"
  tasks+=",scenes=retrieval:$web/val_retrieval.tar?caption_template={caption}"
  step "Evaluating: $2" "evaluate_$1" diht_jax.evaluate --model "$out/$1" --tasks "$tasks" \
    --output "$out/$1.json"
}

step "Generating 4,000 noisy pairs and clean evaluation sets" generate \
  data_prep.synthetic --output "$out/web" --num_pairs 4000
step "Filtering: complexity, action, text in the picture" filter \
  data_prep.filter --config configs/prep/cat.py --config.label_field=noise \
  --config.input="$out/web/train-*.tar" --config.output="$out/filtered"
step "Converting the raw pairs, unfiltered" convert \
  data_prep.filter --config configs/prep/convert.py \
  --config.input="$out/web/train-*.tar" --config.output="$out/raw"
step "Training a teacher on clean scenes, frozen after that" teacher \
  data_prep.synthetic.teacher --input "$out/web/train-*.tar" --output "$out/teacher.npz"
step "Labelling the filtered pairs with its concepts" label \
  data_prep.label --config configs/prep/concepts.py \
  --config.input="$out/filtered" --config.output="$out/labelled" \
  --config.teacher.kind=precomputed --config.teacher.precomputed.files="$out/teacher.npz"
train raw_infonce "raw pairs, InfoNCE" raw --config.loss.beta=0.0
train filtered_hn_nce "filtered pairs, HN-NCE" filtered
train filtered_concepts "filtered pairs, HN-NCE and concepts" labelled \
  --config.concepts.object_weight=0.3 --config.concepts.attribute_weight=0.3 \
  --config.concepts.num_objects=32 --config.concepts.num_attributes=32
evaluate raw_infonce "raw pairs, InfoNCE"
evaluate filtered_hn_nce "filtered pairs, HN-NCE"
evaluate filtered_concepts "filtered pairs, HN-NCE and concepts"

echo
cat "$out/logs/filter.log" | grep -v '^$' | grep -vE '^[0-9:]+ |shard/s|s/shard' || true
echo
"$python" -m diht_jax.evaluate \
  --compare "$out/raw_infonce.json,$out/filtered_hn_nce.json,$out/filtered_concepts.json"
echo
pictures=("$out"/*.png "$out"/*/curves.png "$out"/{filtered,labelled}/report.html)
echo "Pictures: ${pictures[*]}"
