#!/usr/bin/env bash
# The whole path on an embedded data set: noisy pairs -> filter -> concept labels -> four trainings, each with
# one more part of the method -> zero-shot results side by side. Makes .venv where it is missing. Everything
# goes to demo_output/; a stopped demo continues where it was. To start anew: rm -r demo_output
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

# show LOG_NAME: what the command of a step printed, without its log lines and progress bars.
show() {
  echo
  grep -vE '^$|^[0-9:]+ |shard/s|s/shard|pair/s|synthetic web:' "$out/logs/$1.log" || true
  echo
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

step "Generating 3,000 noisy pairs and clean evaluation sets" generate \
  data_prep.synthetic --output "$out/web" --num_pairs 3000
show generate
step "Filtering by captions: complexity, action" captions \
  data_prep.filter --config configs/prep/cat.py --config.text_spotting=False \
  --config.input="$out/web/train-*.tar" --config.output="$out/captions"
step "Some pairs of every outcome" pairs data_prep.reports --input "$out/captions"
show pairs
step "Filtering again, by text in the picture too" filter \
  data_prep.filter --config configs/prep/cat.py --config.label_field=noise \
  --config.input="$out/web/train-*.tar" --config.output="$out/filtered"
show filter
step "Converting the raw pairs, unfiltered" convert \
  data_prep.filter --config configs/prep/convert.py \
  --config.input="$out/web/train-*.tar" --config.output="$out/raw"
step "Training a teacher on clean scenes, frozen after that" teacher \
  data_prep.synthetic.teacher --input "$out/web/train-*.tar" --output "$out/teacher.npz" --num_scenes 4000
step "Labelling the filtered pairs with its concepts" label \
  data_prep.label --config configs/prep/concepts.py \
  --config.input="$out/filtered" --config.output="$out/labelled" \
  --config.teacher.kind=precomputed --config.teacher.precomputed.files="$out/teacher.npz"
train raw_infonce "raw pairs" raw --config.loss.beta=0.0
train filtered_infonce "+ CAT (filtered pairs)" filtered --config.loss.beta=0.0
train filtered_hn_nce "+ HN (hard negatives)" filtered
train filtered_concepts "+ CD (concept labels)" labelled \
  --config.concepts.object_weight=0.5 --config.concepts.attribute_weight=0.5 \
  --config.concepts.num_objects=32 --config.concepts.num_attributes=32
students=(raw_infonce filtered_infonce filtered_hn_nce filtered_concepts)
for name in "${students[@]}"; do
  evaluate "$name" "$name"
done

echo
files=("${students[@]/#/$out/}")
"$python" -m diht_jax.evaluate --compare "${files[@]/%/.json}" --output "$out/compared.png" 2> /dev/null
step "Drawing the page" page data_prep.reports.demo --input "$out" --output "$out/index.html"
pictures=("$out"/*.png "$out"/*/curves.png "$out"/{filtered,labelled}/report.html)
echo "Pictures: ${pictures[*]}"
echo "All of it on one page: $out/index.html"
