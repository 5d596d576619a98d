"""A whole labelling job: embeddings of all shards, the two heads, the labelled shards, the report.

The folder of the output:

    embeddings/             the teacher's embeddings of every shard, one npz each
    vocabulary_*.tsv        the concepts and their ids
    heads.npz, heads.json   the trained heads, their curves and metrics
    *.tfrecord              the input's records with concepts, and their statistics; or
                            *.array_record, as config.output_format has it
    dataset.index           where the records of all shards lie (`diht_jax.data.index`)
    stats.json, report.html, curves.png, dataset_info.json, features.json

Every stage does only what is not done yet.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.engine import print_failures, run_pending
from data_prep.labelling import embeddings
from data_prep.labelling import heads as head_files
from data_prep.labelling import report as label_report
from data_prep.labelling import shard as label_shard_module
from data_prep.labelling import vocabulary as concept_vocabulary
from data_prep.labelling.examples import gather_examples, warn_of_few_mentions
from data_prep.sources import list as source_list
from data_prep.teachers.base import TeacherInfo
from data_prep.teachers.registry import describe_teacher, load_teacher
from diht_jax.data.readers.registry import SourceShard
from diht_jax.data.records.dataset_info import write_dataset_info
from diht_jax.data.records.formats.registry import find_shards, format_of
from diht_jax.data.records.vocabulary import Vocabulary, read_vocabulary, write_vocabulary

_LABELS_VERSION = 1
_HEADS_VERSION = 1


def run(
    config: ml_collections.ConfigDict, task_index: int = 0, num_tasks: int = 1
) -> dict[str, str]:
    """Does what is not done yet: embeds, trains the heads, labels, and writes the report.

    Args:
        config: a valid one of `labelling.config.default_config`.
        task_index: number of this job of a job array.
        num_tasks: jobs that share the work.

    Returns:
        Shards that failed, with the reason.

    Raises:
        ValueError: nothing to read, nowhere to write, no concept, or a teacher that is missing.
    """
    inputs = _find_inputs(config.input)
    folder = source_list.check_output(config.output, inputs)
    os.makedirs(folder, exist_ok=True)
    vocabulary = _make_vocabulary(config, [source.path for source in inputs])
    teacher = describe_teacher(config.teacher)
    tasks = _plan_tasks(config, inputs, folder, "")
    embedding_tasks = embeddings.plan_embeddings(tasks, teacher.identity, config.embedding_dtype)
    share = functools.partial(
        source_list.shards_of_task, task_index=task_index, num_tasks=num_tasks
    )
    failures = _embed(config, teacher, share(embedding_tasks))
    if not _all_done(embedding_tasks, "embedded"):
        return failures
    _check_embedded(config, embedding_tasks)
    write_vocabulary(folder, vocabulary)
    heads = _obtain_heads(config, folder, vocabulary, embedding_tasks, teacher)
    tasks = _plan_labels(config, inputs, folder, heads, embedding_tasks[0].config_hash)
    label = functools.partial(
        label_shard_module.label_shard,
        heads_folder=folder,
        top_k=config.top_k,
        described=vocabulary.describe(),
    )
    if _unfinished(share(tasks)):
        shards.remove_merged(folder)
    failures = _run_unfinished(label, share(tasks), config.num_workers, "label")
    if _all_done(tasks, "labelled"):
        _summarize(config, tasks, folder, vocabulary, heads, teacher)
    return failures


def _find_inputs(text: str | None) -> list[SourceShard]:
    if not text:
        raise ValueError(
            "config.input is not set: expected a folder that data_prep.filter wrote, such as "
            "--config.input=/data/kept"
        )
    parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    return [SourceShard(format_of(parts), path) for path in find_shards(parts)]


def _make_vocabulary(config: ml_collections.ConfigDict, paths: Sequence[str]) -> Vocabulary:
    if config.heads.load:
        return read_vocabulary(config.heads.load)
    settings = config.vocabulary
    vocabulary = concept_vocabulary.build_vocabulary(
        concept_vocabulary.merge_counts(paths),
        min_count=settings.min_count,
        stop={"objects": settings.stop_objects, "attributes": settings.stop_attributes},
        max_size={"objects": settings.max_objects, "attributes": settings.max_attributes},
    )
    logging.info("%d objects, %d attributes", *map(len, vocabulary))
    return vocabulary


def _obtain_heads(
    config: ml_collections.ConfigDict,
    folder: str,
    vocabulary: Vocabulary,
    embedded: Sequence[shards.ShardTask],
    teacher: TeacherInfo,
) -> dict[str, Any]:
    """Heads and description of a folder: those that are there, loaded ones, or newly trained ones.

    Args:
        config: of `labelling.config.default_config`.
        folder: gets `heads.npz` and `heads.json`.
        vocabulary: v of each head.
        embedded: finished tasks of `embeddings.plan_embeddings`.
        teacher: whose embeddings they are.

    Returns:
        The description, as `heads.json` has it.
    """
    settings = {
        "format_version": _HEADS_VERSION,
        "heads": config.heads.to_dict(),
        "seed": config.seed,
        "vocabulary": vocabulary.describe(),
        "embeddings": [[task.config_hash, task.source.identity()] for task in embedded],
    }
    config_hash = shards.hash_config(settings)
    description = head_files.read_description(folder)
    present = {"config_hash": config_hash, "weights_hash": head_files.hash_heads(folder)}
    if description is not None and present.items() <= description.items():
        logging.info("heads: trained before")
        return description
    heads, results = {}, {}
    if config.heads.load:
        heads = head_files.load_heads(config.heads.load)
        results = head_files.load_results(config.heads.load, teacher)
    else:
        # It needs JAX, which no worker should wait for: workers import this module as well.
        from data_prep.labelling.train_heads import train_and_measure

        train, held_out = gather_examples(config, vocabulary, embedded)
        warn_of_few_mentions(train, held_out)
        for part in vocabulary:
            if len(part):
                heads[part.kind], results[part.kind] = train_and_measure(
                    config, part, train, held_out
                )
    head_files.write_heads(folder, heads)
    description = {
        "config_hash": config_hash,
        "weights_hash": head_files.hash_heads(folder),
        "loaded_from": config.heads.load,
        "vocabulary": vocabulary.describe(),
        "teacher": dict(teacher.identity),
        "heads": results,
    }
    shards.write_json(pathlib.Path(folder) / head_files.DESCRIPTION, description)
    return description


def _plan_labels(
    config: ml_collections.ConfigDict,
    inputs: Sequence[SourceShard],
    folder: str,
    heads: dict[str, Any],
    embedding_hash: str,
) -> list[shards.ShardTask]:
    settings = {
        "format_version": _LABELS_VERSION,
        "embeddings": embedding_hash,
        "heads": heads["weights_hash"],
        "vocabulary": heads["vocabulary"],
        "top_k": config.top_k,
    }
    return _plan_tasks(config, inputs, folder, shards.hash_config(settings))


def _plan_tasks(
    config: ml_collections.ConfigDict, inputs: Sequence[SourceShard], folder: str, config_hash: str
) -> list[shards.ShardTask]:
    return shards.plan_tasks(
        inputs,
        folder,
        dataset=config.dataset_name,
        split=config.split,
        config_hash=config_hash,
        output_format=config.output_format,
    )


def _embed(
    config: ml_collections.ConfigDict, teacher: TeacherInfo, tasks: Sequence[shards.ShardTask]
) -> dict[str, str]:
    """Computes the embeddings that are missing; returns failures with the reason."""
    if teacher.in_this_process and _unfinished(tasks):
        load_teacher(config.teacher)  # an error in it is raised once here, not for every shard
    embed = functools.partial(
        embeddings.embed_shard, teacher=config.teacher, dtype=config.embedding_dtype
    )
    num_workers = 0 if teacher.in_this_process else config.num_workers
    return _run_unfinished(embed, tasks, num_workers, "embed")


def _check_embedded(config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask]) -> None:
    """Raises ValueError where no record at all has an embedding."""
    counts = [shards.load_finished(task)["counts"] for task in tasks]
    reasons = collections.Counter()
    for count in counts:
        reasons.update(count["missing"])
    if any(count["embedded"] for count in counts) or not reasons:
        return
    theirs = load_teacher(config.teacher).example_keys()
    if not theirs:
        described = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
        raise ValueError(f"none of {reasons.total():,} images has an embedding ({described})")
    records = itertools.chain.from_iterable(embeddings.read_shard(task.source) for task in tasks)
    yours = [record.key for record in itertools.islice(records, 2)]
    raise ValueError(
        f"0 of {reasons.total():,} keys found in config.teacher.{config.teacher.kind}; theirs look "
        f"like {_quoted(theirs)}, yours like {_quoted(yours)}"
    )


def _quoted(keys: Sequence[str]) -> str:
    return ", ".join(f"{key!r:.80}" for key in keys)


def _unfinished(tasks: Sequence[shards.ShardTask]) -> list[shards.ShardTask]:
    return [task for task in tasks if shards.load_finished(task) is None]


def _run_unfinished(
    function: Callable[..., Any],
    tasks: Sequence[shards.ShardTask],
    num_workers: int | None,
    label: str,
) -> dict[str, str]:
    """Runs the tasks that are not done, and prints what failed."""
    pending = _unfinished(tasks)
    logging.info(
        "%s: %d shards, %d of them done before", label, len(tasks), len(tasks) - len(pending)
    )
    return print_failures(run_pending(function, pending, num_workers=num_workers, label=label))


def _all_done(tasks: Sequence[shards.ShardTask], participle: str) -> bool:
    done = sum(shards.load_finished(task) is not None for task in tasks)
    if done < len(tasks):
        print(
            f"{done} of {len(tasks)} shards are {participle}; run the command again, or wait for "
            "the other jobs"
        )
    return done == len(tasks)


def _summarize(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    folder: str,
    vocabulary: Vocabulary,
    heads: dict[str, Any],
    teacher: TeacherInfo,
) -> None:
    """Writes what describes the whole folder, and prints the metrics."""
    done = [shards.load_finished(task) for task in tasks]
    counts = [stats["counts"] for stats in done]
    records = sum(stats["output"]["records"] for stats in done)
    labelled = sum(count["labelled"] for count in counts)
    missing: dict[str, int] = {}
    for task in tasks:
        path = pathlib.Path(embeddings.embedding_path(task.output) + shards.STATS_SUFFIX)
        for reason, count in shards.read_json(path)["counts"]["missing"].items():
            missing[reason] = missing.get(reason, 0) + count
    summary = {
        "config": {k: v for k, v in config.to_dict().items() if k != "num_workers"},
        "config_hash": done[0]["config_hash"],
        "shards": len(tasks),
        "records": records,
        "labelled": labelled,
        "unlabelled": missing,
        "added_bytes_per_record": sum(count["added_bytes"] for count in counts) / max(1, records),
        "vocabulary": vocabulary.describe(),
        "teacher": teacher.identity,
        "licence": teacher.licence,
    }
    shards.write_index(folder, [task.output for task in tasks], vocabulary.describe())
    shards.write_json(pathlib.Path(folder) / shards.MERGED_STATS, summary)
    hashes = ", ".join(f"{part.kind} {part.hash}" for part in vocabulary)
    write_dataset_info(
        folder,
        dataset=config.dataset_name,
        split=config.split,
        shard_lengths=[stats["output"]["records"] for stats in done],
        num_bytes=sum(stats["output"]["bytes"] for stats in done),
        image_formats={name for count in counts for name in count["image_formats"]},
        with_concepts=True,
        description=f"Image-text pairs of {config.input} with concepts, by data_prep.label; "
        f"vocabulary: {hashes}."
        + (f" Licence of the labels: {teacher.licence}." if teacher.licence else ""),
        file_format=config.output_format,
    )
    label_report.write_report(folder, summary, heads, vocabulary)
    print(label_report.format_metrics(heads))
    print(
        f"{labelled:,} of {records:,} images labelled in {len(tasks)} shards, "
        f"{summary['added_bytes_per_record']:.0f} bytes each: {folder}; look at "
        f"{folder}/{label_report.PAGE}"
    )
    for reason, count in sorted(missing.items()):
        print(f"without labels: {count:,} ({reason})")
