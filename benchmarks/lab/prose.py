"""What the report says next to its numbers."""

from __future__ import annotations

import dataclasses

# Treated minus control of a contrast, named by what it compares; the contrast by
# `experiments.key_of`.
Named = tuple[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Switch:
    """A row of the first table: what to switch on, and what that rests on.

    Attributes:
        name: the config key or recipe, as Markdown.
        effect: a contrast, by `experiments.key_of`.
        holds_for: the data of the effect.
        advice: what follows from it.
        control: the strongest other way to the same end; empty without any.
        elsewhere: the same switch on other data or with other settings.
    """

    name: str
    effect: tuple[str, ...]
    holds_for: str
    advice: str
    control: tuple[Named, ...] = ()
    elsewhere: tuple[Named, ...] = ()


SWITCHES = (
    Switch(
        "`configs/prep/cat.py`",
        ("cat", "raw"),
        "the synthetic web, half of it noise, most of that of kinds that CAT is made for",
        "on for sentences; off where right captions lack verbs, as titles do; compare it with a "
        "good CLIP score",
        control=(("against as many pairs by a CLIP score", ("cat", "clip_score")),),
        elsewhere=(
            ("titles of clip art", ("clipart_cat", "clipart_raw")),
            ("a web with 62% of its right captions without verbs",
             ("second_3000_cat", "second_3000_raw")),
            ("what it keeps of 3,000 pairs against all of 12,000",
             ("amount_3000_cat", "amount_12000_raw")),
        ),
    ),
    Switch(
        "`text_spotting` alone",
        ("only_t", "raw"),
        "the same web; one picture in ten shows its caption as text",
        "on where captions repeat the text of their pictures",
        elsewhere=(
            ("a web whose pictures show other text", ("second_3000_only_t", "second_3000_raw")),
            ("titles of clip art", ("clipart_only_t", "clipart_raw")),
        ),
    ),
    Switch(
        "`loss.beta=0.25`",
        ("cat_beta_025", "cat"),
        "filtered pairs, batches of 64",
        "try; off where unseen concepts count",
        elsewhere=(
            ("emoji", ("emoji_shuffled_0_beta_025", "emoji_shuffled_0")),
            ("emoji, half of the captions wrong",
             ("emoji_shuffled_50_beta_025", "emoji_shuffled_50")),
            ("batches of 256", ("cat_batch_256_beta_025", "cat_batch_256")),
            ("unseen concepts, batches of 256, the largest of seven differences",
             ("concepts_batch_256_beta_025", "concepts_batch_256")),
        ),
    ),
    Switch(
        "`loss.noise_share=0.25`",
        ("emoji_shuffled_25_beta_025_doubted", "emoji_shuffled_25_beta_025"),
        "emoji, next to beta 0.25, just that share of the captions wrong",
        "try where captions are wrong",
        elsewhere=(
            ("half of them wrong",
             ("emoji_shuffled_50_beta_025_doubted", "emoji_shuffled_50_beta_025")),
            ("none wrong", ("emoji_shuffled_0_beta_025_doubted", "emoji_shuffled_0_beta_025")),
        ),
    ),
    Switch(
        "`concepts.object_weight`, `concepts.attribute_weight`",
        ("cat_concepts", "cat"),
        "filtered pairs; the teacher knows the generator's own shapes",
        "try; where captions are often wrong, on, or take captions of neighbours",
        control=(
            ("on CIFAR-10, captions of the teacher's nearest neighbours against its labels",
             ("photos_neighbours", "photos_teacher")),
        ),
        elsewhere=(
            ("CIFAR-10, half of the captions wrong", ("photos_teacher", "photos_given")),
            ("none wrong", ("cifar10_wrong_0_teacher", "cifar10_wrong_0")),
        ),
    ),
    Switch(
        "all three: the filter, beta 0.25 and concepts",
        ("cat_beta_025_concepts", "raw"),
        "the same web; looked at afterwards",
        "as each of them",
        control=(("the filter alone", ("cat", "raw")),),
    ),
    Switch(
        '`data.captions="sample"`',
        ("cat_captions_mixed", "cat"),
        "filtered pairs with four more captions, all of them right",
        "on where there are several captions",
    ),
    Switch(
        '`optimizer.kind="muon"`',
        ("cat", "cat_adamw_1e_3"),
        "filtered pairs; rates tuned for Muon, not for AdamW",
        "try, with a rate of its own",
    ),
    Switch(
        "`diht_jax.fewshot`, a start from the prompts",
        ("unseen_k", "unseen_k", "prompts_1", "scratch_1"),
        "one shot of unseen combinations, against a probe from scratch",
        "on at one shot, if a probe is trained at all",
        control=(("against zero-shot", ("unseen_k", "unseen_k", "prompts_1", "zero_shot")),),
        elsewhere=(
            ("4 shots", ("unseen_k", "unseen_k", "prompts_4", "scratch_4")),
            ("16 shots", ("unseen_k", "unseen_k", "prompts_16", "scratch_16")),
        ),
    ),
    Switch(
        '`loss.kind="fastclip"`',
        ("cat_fastclip", "cat"),
        "filtered pairs, batches of 64, settings of the paper",
        "leave, or tune its settings",
        elsewhere=(("batches of 256", ("cat_batch_256_fastclip", "cat_batch_256")),),
    ),
)  # fmt: skip

INTRODUCTION = """\
# Experiments

What each part of the method is worth to tiny students (32 px, seconds to minutes of training):
treated minus control, with 95% intervals over repeated runs. Points are of R@10 (recall among the
first ten) on the web, on emoji and on clip art, of top-1 on CIFAR-10, and of few-shot accuracy on
unseen combinations. On emoji they are about another artist's drawings: every caption of the test
occurs in training, and half of them differ from another by the skin tone alone.
"""

SCOPE = """\
- **What the data are:** a synthetic web of 3,000 drawn scenes whose noise this project chose: 45 of
  100 pairs are of three kinds that CAT is made for, and 5 have captions of other pictures. Its
  settings were changed until labels visibly taught shapes; its teacher and the model of its CLIP
  score know the generator. There are a second web, made so that CAT should fail, emoji of two
  artists, CIFAR-10, and clip art with its own titles. All runs of an arm on the first web, on emoji
  and on CIFAR-10 share one web or one set of captions, one pass of the filter and one teacher:
  their intervals cover initialisation, order and test items. The others have a web or a draw for
  each run; the same claims on [webs drawn anew](drawn.md), by the same generator, are being run.
- **What had been seen:** both arms of ten contrasts in some form before they were registered
  ([which](method.md#what-had-been-seen-before)).
- **What does not transfer:** sizes of effects, and anything about batches of thousands, long
  training or captions of the web. Nothing here was run on LAION. CAT drops captions without a
  verb: that it harms on the [titles](clipart.md) and on the [second web](second_web.md) was
  predicted; that it beats a random subset there, and that it replaces
  [four times the data](second_web.md#amount-of-data), was predicted too and is not so.

[How the differences are measured](method.md), and how to add an experiment.
"""

METHOD = """\
# Method

Every contrast was registered with its margin, and with what would refute it, before its runs were
made (`benchmarks/lab/experiments.py`; its history shows when). Each run is one file in
`benchmarks/results/lab/`, with its command, machine and versions.

    python -m data_prep.examples emoji cifar10 --output runs/data
    python -m benchmarks.lab.run --list    # what is done, what is missing, and how long that takes
    python -m benchmarks.lab.run           # makes the missing runs; kill and start it at will
    python -m benchmarks.lab.page          # these pages and their figures, from the result files

## How it is measured

CAT is the filter: C keeps captions with a relation or an attribute (complexity), A those with an
action, T drops pairs whose picture shows the caption as text. `raw` and `cat` are all pairs of
the synthetic web, and those that CAT keeps. Where nothing else is said, the loss is InfoNCE. Beta
is the strength of hard negatives (HN-NCE; 0 is InfoNCE), alpha the weight of the positive in the
denominator. Concepts are objects and attributes that a frozen teacher sees, learnt next to the
loss. The student is the demo's: 30,720 samples in batches of 64; on emoji, CIFAR-10 and clip art
61,440 in batches of 128, and on unseen concepts 480 updates.

The metric of the web is the mean of text-to-image and image-to-text R@10 among 2,000 scenes whose
combinations never occur in training (chance: 0.5%); of composition it is the share of these
scenes' captions that are preferred to one with the same words in another order (chance: 50%); on
CIFAR-10 zero-shot top-1 on 1,000 photos; on clip art R@10 among 388 drawings (chance: 2.6%), on
unseen concepts among 147 to 165 (6 to 7%). On
emoji it is R@10 among another artist's 3,786 drawings (chance: 0.26%); every caption of the test
occurs in training, and half of them differ from another by the skin tone alone: it measures other
drawings, not new concepts.

Runs on the same data are compared seed by seed, since equal seeds share their order of examples,
and those on [webs drawn anew](drawn.md) web by web, as registered. All others are compared as two
samples (Welch), also where runs of one seed share a web or a draw: where these go together, that
makes intervals wider than they need be. The interval reaches from the lower of the lower ends to
the higher of the higher ends of two: Student's t over the runs, and a bootstrap (1,000 resamples)
over runs and test items; of few-shot over draws of shots, of unseen concepts over items within
runs, which have their own.

One rule gives every result: *gain of at least the margin* where the whole interval is at or above
it; *gain* where it is above 0, *smaller than the margin* where it ends below the margin; *none
within the margin* where it is between minus and plus the margin; *harm* in the same three forms;
else *undecided*. So a claim that something costs nothing may be undecided although a loss of the
margin is excluded. Holm's p corrects for the primary claims: p is the larger of the t test's and
the bootstrap's, which 1,000 resamples cannot bring below 0.002, and so Holm's not below the value
with "≤". Results of primary claims whose p is above 0.05 say "not after correction". No other
contrast is corrected: of more than 150, some results are chance. Rows appear when all of their runs
are there; nothing was stopped or repeated for what it showed, but where a note says so.

The primary claims were chosen from the first 106 contrasts by what the paper claims and by what
people would act on, once the runs were there. The two of few-shot have since given way to the same
two with settings chosen on as few pictures, and that of a teacher on CIFAR-10 to the same with
another exchange of captions and other random weights in each run, both chosen once the new runs
were there. The last seeds of `random`, `clip_score`, `cat_concepts`, `cat_blocks`,
`cat_captions_mixed` and `cat_adamw_1e_3` were run once the first three or four were known, up to
the eight of every primary claim; `cat_concepts` was undecided before them. Most other arms have
three or four runs, which is few.

Optimiser, learning rate and crops were chosen in trials of one seed with concept labels on
filtered pairs, on the first quarter of these scenes; raw pairs and InfoNCE were not tuned for
themselves. Runs that are compared may be of several versions of this project; 51 result files, 23
of them of the block `photos`, are of versions with changes that were committed later (their
revision ends in `+changes`). `cat_sizes` repeats `cat` ([the
difference](students.md#sizes-of-embeddings)).

## What had been seen before

- CAT against raw pairs: +13.6 (9.1 to 18.2, eight seeds) with another web and AdamW. Both were
  then changed so that shapes are learnt: the web in trials, until labels visibly taught shapes,
  and the labels were confirmed on that web.
- CAT against the best fraction by CLIP score: 3.8 points better (2.5 to 5.0, three seeds) with
  other students.
- Teacher labels on CIFAR-10: -0.1 where captions are right and +9.5 where half are wrong
  (`benchmarks/results/distillation.json`); one seed had 42.3, 33.4 and 31.7% with labels of the
  teacher, of random weights and of other photos.
- Concepts next to hard negatives on the web, one seed of the trials: 54.4 against 42.4%.
- Muon against AdamW, an order by blocks, and a start from the prompts at one shot: in trials of
  the features themselves.
- `emoji_concepts` was made anew three times, as the rules for captions changed.
"""

# What its rows need to be read.
NOTES = {
    "drawn": (
        "**Data:** Registered before any run, after the results of the same claims on the first "
        "web ([filter](filter.md), [hard negatives](hard_negatives.md), "
        "[teachers](distillation.md)) were known: eight webs of 3,000 pairs of the demo's kind, "
        "each with a pass of the filter and a teacher of its own, so that intervals cover webs "
        "too. They are other draws of the same generator, with teachers of the same kind: they "
        "answer what is chance, and not whether that generator is like any real web. The score is "
        "that of a student of the first web, another for each seed. Arms are compared web by web. "
        "The scenes of the test and the shots are those of the first web.\n\n"
        "**Predicted, before any run:** a gain of at least the margin wherever something helps "
        "there, nothing at 16 shots, and that CAT does not beat a CLIP score by a point, against "
        "the claim."
    ),
    "clipart": (
        "**Data:** Frozen before any run (`benchmarks/lab/clipart.py`): 6,824 drawings of the Open "
        "Clip Art Library with the titles of their artists. Of these, 4,099 have a title that "
        "three or more share, `gramastar` alone 1,375. Of the others 500 are held out; a language "
        "model read their titles next to the pictures: 388 name what is shown, in English, 81 in "
        "another language, 31 do not. Students are measured by the 388. Every seed trains on a "
        "draw of four fifths of the other 6,324, so that intervals cover draws too; variants of "
        "one artist's drawing may be in training and test, in all arms alike.\n\n"
        "**Arms:** Known before: the caption rules keep 1,873 titles by complexity (630 of them of "
        "at most two drawings) and 130 by actions. `own_title` keeps titles of at most two "
        "drawings, `clip_score` as many pairs by the score of a student of emoji, and `random` is "
        "as large as `only_c`.\n\n"
        "**Predicted:** CAT, complexity and actions harm, text-spotting does nothing, counting "
        "titles helps, and the score is better than all pairs, but no better than counting.\n\n"
        "**Found:** The first held; text-spotting and counting are undecided; that the score helps "
        "is refuted: it costs 11.6 points."
    ),
    "second_web": (
        "**Data:** Frozen before any run (`benchmarks/lab/second_web.py`). What the caption rules "
        "keep of 240 of its pairs had been looked at before the predictions were written: 46 of 46 "
        "sentences, 0 of 50 names without a verb, 0 of 53 titles; the web was not changed after "
        "that. Of its captions 20% are sentences, 20% name what is shown without a verb, 10% do "
        "one of both for a picture that has other text over it, 15% are product titles that name "
        "what is shown, 25% are those of another picture, and 10% say nothing: of the right ones "
        "62% have no verb, more than the 48% of real ones.\n\n"
        "**Arms:** Every seed has a web, a pass of the filter and a scoring student of its own, so "
        "that intervals cover webs too. `random` and `clip_score` are as many pairs as CAT keeps; "
        "the score is that of a student of the first web. The scenes of the test are those of the "
        "first web. There are eight webs of 3,000 pairs and four of 12,000, of which eight were "
        "registered: halved before any of their runs, when the results with 3,000 pairs were "
        "known.\n\n"
        "**Predicted, at both sizes:** CAT and actions alone harm; complexity alone costs nothing, "
        "text-spotting does nothing; without actions the filter gains two points over CAT, and CAT "
        "beats a random subset; the CLIP score beats all pairs and CAT; right captions alone beat "
        "all pairs.\n\n"
        "**Found:** With 3,000 pairs CAT is worse than a random subset, against the prediction; "
        "complexity and text-spotting are undecided, and CAT against a random subset of 12,000 is; "
        "the rest came out as predicted."
    ),
    "amount": (
        "**Data:** Registered before any run. Webs of the demo's kind, four of them, of 12,000 "
        "pairs each; the smaller ones are their first pairs, and one pass of CAT decides for all "
        "sizes. Every student sees 61,440 samples at one rate, which falls in the last eighth, and "
        "is measured on the way, too. The paper's claim is about billions: a subset of LAION that "
        "CAT keeps against all of it.\n\n"
        "**Predicted:** CAT helps at every amount and all along; after half of the samples it is "
        "where raw pairs end; and what it keeps of a half, a quarter and an eighth of the pairs "
        "teaches as much as all of them.\n\n"
        "**Found:** The last is refuted for a quarter and an eighth, which cost 15 and 27 points, "
        "and undecided for a half. So is half of the samples: these are measured before the rate "
        "falls and the raw pairs after it, against CAT. At 6,000 pairs four webs do not decide "
        "what CAT brings."
    ),
    "concepts": (
        "**Data:** Registered before any run. Emoji without skin tones and flags "
        "(`benchmarks/lab/concepts.py`). Of the concepts whose every word occurs twice, 200 are "
        "held out for the test and 200 for validation, others for each seed; those with a word "
        "that is then in no training caption are left out. Students train on Noto's drawings of "
        "the rest, 480 updates whatever the batch is; Twemoji's drawings measure them.\n\n"
        "**Rates:** The rate of each arm is the best of three on OpenMoji's drawings of the "
        "validation concepts (`rates`: four other draws at a batch of 64, two at 256). Two of its "
        "settings were changed while it ran: the highest rate, 1e-2, gave way to 3e-4 when four "
        "runs of one arm had 1e-3 ahead of 3e-3, by 18.2 to 17.6; and a batch of 64 had two draws, "
        "which differ by more than rates do. The tuned rates of a batch of 64 are 3e-3 without "
        "hard negatives, ahead of 1e-3 by 0.02, and 3e-4 with them, while Twemoji's drawings of "
        "the same draws have 1e-3 ahead in each arm; those of a batch of 256 are 1e-3, and 3e-4 "
        "with beta 0.5. So a difference between arms may be one of rates, and those whose rates "
        "differ are run at 1e-3 as well, as decided before any run at their batch. Each arm is "
        "measured in four draws; eight were registered, and halved before any of these runs.\n\n"
        "**Predicted:** beta 0.25 and 0.5 help by a point at both batches.\n\n"
        "**Found:** No arm shows that: every difference is below 0, and one of seven is harm."
    ),
    "photos": (
        "**Data:** Registered before any run, after the rows [above](#distillation) were known: "
        "half of the captions wrong, another exchange and other random weights in each of eight "
        "runs. `neighbours` is trained without labels, on the most frequent caption of the ten "
        "photos that are nearest in the embeddings of the same teacher.\n\n"
        "**Predicted:** the teacher's labels help and beat random ones, which do nothing; the "
        "captions of the neighbours teach more than the labels.\n\n"
        "**Found:** Random labels gain 2.3 points, and the neighbours are undecided."
    ),
    "few_shot_k": (
        "The student and the pictures are those [above](#few-shot), of eight seeds; the settings "
        "are chosen on as many pictures of a class as the probe learns from; the bootstrap "
        "resamples seeds and draws of shots. Registered after the rows above were known and before "
        "any of these runs. Predicted: the prompts help at 1 and 4 shots, and do not at 16."
    ),
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
        "registered. FastCLIP's settings are the paper's for a small data set (gamma 0.2 after "
        "half of the run, rho 6.5), untuned; its rows were registered before any of its runs."
    ),
    "emoji": (
        "Differences between the shares were not registered, and points are of what a student "
        "reaches, which wrong captions lower. They are about another artist's drawings, with "
        "captions that all occur in training. `doubted` takes a quarter of the pairs for wrong, "
        "whatever the share is; `ramp` raises beta over the first half of the run; `cap` bounds "
        "weights by 4."
    ),
    "distillation": (
        "The teacher of the web is a small network trained on clean scenes with the generator's "
        "own shapes and colours, and has no control here; CIFAR-10 has: labels of the same network "
        "(ImageNet's weights, some of whose classes are like those of CIFAR-10) with random "
        "weights, and the teacher's labels of other photos. Wrong captions are one exchange, and "
        "the random weights one draw, for all seeds."
    ),
    "affinity": (
        "`cifar10_clip_teacher` and `emoji_clip_teacher` have seen the right captions of the very "
        "pictures that the students see, four times as long: where captions are right this is "
        "self-distillation, and where they are wrong the teacher knows what the student cannot. "
        "`cifar10_wrong_50_clip_teacher` has seen the student's own captions, as the heads of the "
        "concept labels have. The CLIP that teaches is one, for all seeds. The cost of teachers "
        "and labels is not counted."
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
        "Students of the raw pairs go on with captions of four sentences, of which the context of "
        "24 tokens holds about two."
    ),
    "few_shot": (
        "Five draws of the shots, 480 test pictures; the bootstrap resamples seeds and draws of "
        "shots. The settings (radii, decay) are chosen on 16 more pictures of each class, with few "
        "shots too. The paper remarks that a penalty towards the prompts does not help, since the "
        "supervision is ignored; here it is within a point of the ball at 16 and 64 shots, and "
        "undecided at 4."
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

Filters and losses on real web pairs, on one node: [DataComp](../guides/scale/datacomp.md), a plan.
"""
