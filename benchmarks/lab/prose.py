"""What the report says beside its numbers."""

from __future__ import annotations

INTRODUCTION = """\
# Experiments

    python -m benchmarks.lab.run --list    # what is done, what is missing, and how long that takes
    python -m benchmarks.lab.run           # makes the missing runs; kill and start it at will
    python -m benchmarks.lab.page          # these pages and their figures, from the result files

Which of the paper's claims hold in the small: tiny students on the synthetic web of the demo, on
emoji and on CIFAR-10. Every claim was registered with its margin, and with what would refute it,
before its runs were made (`benchmarks/lab/experiments.py`; its history shows when). Each run is one
file in `benchmarks/results/lab/`, with its command, machine and versions.

**Words.** CAT is the filter: C keeps captions with a relation or an attribute (complexity), A those
with an action, T drops pairs whose picture shows the caption as text. `raw` and `cat` are all 3,000
pairs of the synthetic web, and those that CAT keeps. Where nothing else is said, the loss is
InfoNCE. Beta is the strength of hard negatives (HN-NCE; 0 is InfoNCE), alpha the weight of the
positive in the denominator. Concepts are objects and attributes that a frozen teacher sees, learnt
next to the loss. R@10 is the share of queries whose match is among the first ten. The student is
the demo's: pictures of 32 px, 30,720 samples in batches of 64, on emoji and CIFAR-10 61,440 of 128.

**How it is measured.** Students of equal seeds begin with the same parameters, and see the same
order where they have the same data. The primary metric on the web is the mean of text-to-image and
image-to-text R@10 among 2,000 scenes whose combinations never occur in training (chance: 0.5%); of
composition it is the share of these scenes' captions that are preferred to one with the same words
in another order (chance: 50%); on emoji it is the same R@10 among another artist's 3,786 drawings
(chance: 0.26%), on CIFAR-10 zero-shot top-1 on 1,000 photos. Differences are taken seed by seed.
The interval is Student's t over the seeds, 95%; next to it stands a bootstrap over seeds and test
items, which is too narrow for three seeds. A gain is *confirmed* where the lower bound is above 0
and the mean is at least the margin, and *refuted* where the upper bound is below the margin: less
than what counts, which need not be nothing. That something costs nothing is confirmed where the
lower bound is above minus the margin, and refuted where the upper bound is below that. Everything
else is *undecided*. There is no verdict before all registered runs are there. Holm's p corrects for
all {count} contrasts, those without runs included; with three seeds hardly anything can survive
that, so it stands next to the verdict. Behind ± is the standard deviation over all seeds of an
experiment; a contrast compares those that both have.

**What cannot be said.** The shares and the kinds of noise of the synthetic web are this project's
choice, and its captions speak of shapes and colours. All seeds share one web, one pass of the
filter, one teacher and one set of its heads, so that intervals are about initialisation, order and
test items, and not about other webs or teachers. Optimiser, learning rate and crops were chosen in
trials of one seed with concept labels on filtered pairs, on the first quarter of these scenes; raw
pairs and InfoNCE were not tuned for themselves. Runs that are compared may be of several versions
of this project; `cat_sizes` repeats `cat` ([the difference](students.md#sizes-of-embeddings)). A
verdict here is about these students on these data. Nothing transfers to LAION by itself.

**Repeated.** Three contrasts had been seen before they were registered. CAT against raw pairs was
+13.6 (9.1 to 18.2, eight seeds) with another web and AdamW; both were changed so that shapes are
learnt. One seed of CIFAR-10 with half of the captions wrong had 42.3, 33.4 and 31.7% with labels of
the teacher, of random weights and of other photos. CAT was 3.8 points better (2.5 to 5.0, three
seeds) than the best fraction by CLIP score with other students. So what three seeds of it say
depends on the students.
"""

# Beside the question of a block: what its rows need to be read.
NOTES = {
    "filter": (
        "Of 3,000 pairs, 1,480 of them clean (`oracle`), C keeps 2,485, A 1,944 and CAT 1,636, as "
        "many as `random` and `clip_score` have. The CLIP score is that of the student trained on "
        "the raw pairs, on the very pairs that it was trained on; it is no independent CLIP. At "
        "equal epochs the student of CAT pairs sees about half as many samples."
    ),
    "batch": (
        "All see equally many samples at one learning rate: a batch of 512 has 60 updates, 20 of "
        "them with a rising rate, where one of 64 has 480. The batch of 64 is that of `cat` and "
        "`cat_beta_025` [above](#hard-negatives). Differences between the batches were not "
        "registered."
    ),
    "emoji": (
        "Differences between the shares were not registered, and points are of what a student "
        "reaches, which wrong captions lower. `doubted` takes a quarter of the pairs for wrong, "
        "whatever the share is; `ramp` raises beta over the first half of the run; `cap` bounds "
        "weights by 4."
    ),
    "distillation": (
        "The teacher of the web is a small network trained on clean scenes with the generator's "
        "own shapes and colours, and has no control here; CIFAR-10 has: labels of the same "
        "network (ImageNet's weights) with random weights, and the teacher's labels of other "
        "photos. Wrong captions are one exchange, and the random weights one draw, for all seeds."
    ),
    "affinity": (
        "`cifar10_clip_teacher` and `emoji_clip_teacher` have seen the right captions of the very "
        "pictures that the students see, four times as long: where captions are right this is "
        "self-distillation, and where they are wrong the teacher knows what the student cannot. "
        "`cifar10_wrong_50_clip_teacher` has seen the student's own captions, as the heads of the "
        "concept labels have. The cost of teachers and labels is not counted."
    ),
    "equal_captions": (
        "Equal captions are of one class here, so class ids would mean the same pairs."
    ),
    "captions": (
        "The new captions are the generator's own descriptions of the scenes, as good as captions "
        "can be; [below](#a-captioning-decoder) a student writes them. A picture without a scene "
        "keeps the caption that it has, in `raw_captions_synthetic` too."
    ),
    "long_texts": (
        "Students of the raw pairs go on with captions of four sentences, of which the context "
        "of 24 tokens holds about two."
    ),
    "few_shot": (
        "Five draws of the shots, 480 test pictures; a bootstrap draws seeds and draws. The "
        "settings (radii, decay) are chosen on 16 more pictures of each class, with few shots "
        "too. The paper remarks that a penalty towards the prompts does not help, since the "
        "supervision is ignored; here it does as well as the ball."
    ),
    "noise": (
        "Each web has one kind of noise at another share, and a filter of its own. Differences "
        "between the rows were not registered, and points are of what a student of raw pairs "
        "reaches: much noise leaves little to begin with."
    ),
    "fine_tuning": (
        "The web pairs are the raw synthetic ones, and the recipe is the demo's: Muon, but for "
        "adapters, which AdamW trains. The mean with the start (WiSE-FT) has half of each."
    ),
    "order": "A batch is drawn from 512 records, a third of them.",
}

ENDING = """\
## Experiments of your own

A line in a list of `benchmarks/lab/experiments.py`, and a contrast with its margin, before the
first run:

```python
Experiment("cat_beta_200", data="cat", config={"loss.beta": 2.0}, seeds=8)
Contrast("cat_beta_200", "cat", "hard_negatives", 0.01, "beta 2 helps", "less than a point")
```

Then `python -m benchmarks.lab.run --only cat_beta_200`, and `python -m benchmarks.lab.page`.

## On a cluster

    python -m benchmarks.lab.run --only grid --task_index=0 --num_tasks=72

makes the first of 72 shares: one run a task. In a Slurm array (`--array=0-71`, from 0) these are
`--task_index=$SLURM_ARRAY_TASK_ID --num_tasks=$SLURM_ARRAY_TASK_COUNT`. All tasks share one work
directory (`--workdir`) on a file system with locks (`flock`), where data are made once, and one
folder of results. A task that was stopped is started again as it was.

The paper chose its hyper-parameters with B/32 on a small scale. The block `b32` is that search: the
72 settings of `grid` with `configs/diht_vitb32.py`, 128 million samples in batches of 4,096, on
labelled records of your own:

    python -m benchmarks.lab.run --only b32 --train=/data/labelled --tasks=imagenet=/data/val \\
        --workdir=/shared/lab --results=/shared/lab/results --task_index=0 --num_tasks=72

A run uses all accelerators of its host, so that on a slice each host takes a task (JAX must see
that host alone). A search with more samples, other rates or another recipe changes one line of
`STUDENTS` or `_grid`. Results do not say which records they are of:
give each data set its own `--results` and `--workdir`. The block has not been run here.
"""
