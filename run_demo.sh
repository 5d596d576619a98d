#!/usr/bin/env bash
# Runs the whole pipeline on synthetic data: noisy pairs -> filter -> concept labels -> four trainings, each
# with one more part of the method -> a comparison of zero-shot results. Makes .venv if it is missing. Writes
# everything to demo_output/. A stopped demo resumes. To start again from scratch: rm -r demo_output
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
out=demo_output
mkdir -p "$out/logs"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# step SHOWN_NAME LOG_NAME MODULE FLAGS...: runs a command, and prints the name and the seconds. Shows the
# command's output if it fails. On a terminal, also shows its progress bars.
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

# show LOG_NAME: prints the output of a step's command, without log lines and progress bars.
show() {
  echo
  grep -vE '^$|^[0-9:]+ |shard/s|s/shard|pair/s|synthetic web:' "$out/logs/$1.log" || true
  echo
}

# The two halves of this machine's cores, such as "0" and "1"; empty if commands cannot be pinned to cores.
halves=()
if command -v taskset > /dev/null; then
  mapfile -t halves < <("$python" -c '
import os
cores = sorted(os.sched_getaffinity(0))
half = len(cores) // 2
if half:
    for part in cores[:half], cores[half:]:
        print(*part, sep=",")')
fi

# These two functions replace the background shell that they run in, so killing it kills the command. They
# only use the cores in $cores.
train() { # NAME RECORDS FLAGS...
  exec ${cores:+taskset -c "$cores"} "$python" -m diht_jax.train --config configs/demo.py \
    --config.data.train="$out/$2" --workdir "$out/$1" "${@:3}" > "$out/logs/train_$1.log" 2>&1
}

evaluate() { # NAME
  local web="$out/web"
  local tasks="shape=classification:$web/val_shape.tar?templates=@$web/val_shape.templates.txt"
  tasks+=",color=classification:$web/val_color.tar?templates=@$web/val_color.templates.txt"
  tasks+=",scenes=retrieval:$web/val_retrieval.tar?caption_template={caption}"
  exec ${cores:+taskset -c "$cores"} "$python" -m diht_jax.evaluate --model "$out/$1" --tasks "$tasks" \
    --output "$out/$1.json" > "$out/logs/evaluate_$1.log" 2>&1
}

# two SHOWN_NAME LOG_NAME LOG_NAME COMMAND... -- COMMAND...: runs two commands at the same time, each on half
# of the cores: one small student keeps less than two cores busy, and two on the same cores slow each other
# down. On a terminal, the first shows its progress bars. If one fails, the other is stopped, as by ^C.
two() {
  local name=$1 logs=("$out/logs/$2.log" "$out/logs/$3.log") start=$SECONDS first=() ids=() follower=
  shift 3
  while [ "$1" != -- ]; do first+=("$1"); shift; done
  shift
  printf '%-58s' "$name" >&2
  if [ -t 2 ]; then
    printf '\n' >&2
    : > "${logs[0]}"
    tail -f "${logs[0]}" >&2 & follower=$!
  fi
  cores=${halves[0]:-} "${first[@]}" & ids+=($!)
  cores=${halves[1]:-} "$@" & ids+=($!)
  for i in 0 1; do
    wait "${ids[i]}" || { printf '\n' >&2; tail -n 30 "${logs[i]}" >&2; exit 1; }
  done
  if [ -n "$follower" ]; then kill "$follower"; fi
  printf '%5d s\n' "$((SECONDS - start))" >&2
}
# Background commands do not get ^C from the terminal.
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT

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
concepts=(--config.concepts.object_weight=0.5 --config.concepts.attribute_weight=0.5
  --config.concepts.num_objects=32 --config.concepts.num_attributes=32)
two "Training: raw pairs, and + CAT (filtered pairs)" train_raw_infonce train_filtered_infonce \
  train raw_infonce raw --config.loss.beta=0.0 -- train filtered_infonce filtered --config.loss.beta=0.0
two "Training: + HN (hard negatives), and + CD (concepts)" train_filtered_hn_nce train_filtered_concepts \
  train filtered_hn_nce filtered -- train filtered_concepts labelled "${concepts[@]}"
students=(raw_infonce filtered_infonce filtered_hn_nce filtered_concepts)
two "Evaluating the first two" evaluate_raw_infonce evaluate_filtered_infonce \
  evaluate raw_infonce -- evaluate filtered_infonce
two "Evaluating the others" evaluate_filtered_hn_nce evaluate_filtered_concepts \
  evaluate filtered_hn_nce -- evaluate filtered_concepts

echo
files=("${students[@]/#/$out/}")
"$python" -m diht_jax.evaluate --compare "${files[@]/%/.json}" --output "$out/compared.png" 2> /dev/null
step "Drawing the page" page data_prep.reports.demo --input "$out" --output "$out/index.html"
pictures=("$out"/compared.png "$out"/*_*.html "$out"/*/curves.png "$out"/{filtered,labelled}/report.html)
echo "Pictures: ${pictures[*]}"
echo "All of it on one page: $out/index.html"
