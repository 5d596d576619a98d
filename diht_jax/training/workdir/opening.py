"""Opens a run's work directory and data, and checks that they are as when it started.

Config and data must be the same on all hosts and since the checkpoint, and the hosts of a job must
share the directory. Another config, other data or another run in the directory are errors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict

from diht_jax.config.keys import END, FIXED
from diht_jax.data.tokenizer import FileTokenizer
from diht_jax.input.choices import open_caption_choice
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import Mixture, open_mixture
from diht_jax.input.order import ORDERS, resolve_order
from diht_jax.input.pipeline import TrainIterator
from diht_jax.losses.registry import LOSSES
from diht_jax.models.zoo import get_architecture
from diht_jax.records.train_data import (
    Fingerprint,
    describe_changes,
    describe_train,
    parse_train,
    resolve_source,
)
from diht_jax.records.vocabulary import find_train_vocabulary
from diht_jax.storage.locks import lock_folder
from diht_jax.storage.stores import is_remote
from diht_jax.training.multihost import check_same, check_together, gather_texts
from diht_jax.training.objective import label_sizes, needs_pair_ids, num_record_means
from diht_jax.training.recipe import check_config, key_of, pictures_of, steps_before_end
from diht_jax.training.workdir.saved_run import read_config, steps_of_run
from diht_jax.training.workdir.stored_run import LOCK_FILE, StagedDirectory

# Checks for a file of the first process, before concluding that hosts share no folder.
_LOOKS, _POLL_SECONDS = 10, 1.0


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike[str], staging: str | None) -> Generator[epath.Path]:
    """Locks the work directory while the context lasts. All processes of a job must call it.

    Args:
        workdir: a path or a URL. URLs are staged in a local folder; `gs://` only with
            `staging`.
        staging: `config.checkpoint.staging`.

    Yields:
        The folder to work in. For a run in a store it is a local folder, which is completely copied
        to the store at the end of the context.

    Raises:
        ValueError: another run uses the directory, or it cannot be read or written; hosts do not
            share the local folder (the run's own or its staging folder); no installed package
            handles such URLs.
    """
    name = os.fspath(workdir)
    is_staged = is_remote(name) and (bool(staging) or not name.startswith("gs://"))
    staged = StagedDirectory(name, staging) if is_staged else None
    path = epath.Path(staged.folder if staged else workdir)
    with contextlib.ExitStack() as stack:

        def prepare() -> None:
            if jax.process_index() != 0:
                return
            stack.enter_context(lock_folder(path, "--workdir", LOCK_FILE))
            if staged:
                staged.fetch()
                staged.start()
                stack.push(staged.close_after)

        check_together(prepare)
        if not is_remote(os.fspath(path)):
            _check_shared(path, name)
        yield path


def _check_shared(folder: epath.Path, workdir: str) -> None:
    """Raises if a process does not see the lock file that the first one has just written."""
    lock = folder / LOCK_FILE
    for look in range(_LOOKS):
        if look:
            time.sleep(_POLL_SECONDS)  # on a network file system it may appear a moment later
        seen = gather_texts(lock.read_text() if lock.exists() else "")
        if len(set(seen)) == 1:
            return
    without = next(index for index, text in enumerate(seen) if text != seen[0])
    key = "config.checkpoint.staging" if is_remote(workdir) else "--workdir"
    raise ValueError(
        f"--workdir={workdir}: process {without} does not see {folder} of process 0, and all "
        f"hosts write their part of a checkpoint there. Set {key} to a folder that they share "
        "(NFS, Lustre), or take a gs:// work directory"
    )


def bind_order(config: ml_collections.ConfigDict, workdir: epath.Path) -> ml_collections.ConfigDict:
    """Returns the config with the actual order of the examples instead of "auto".

    An existing run keeps its order, even if its data has moved to or from an object
    store.
    """
    stored = _values(read_config(workdir)) if steps_of_run(workdir) else {}
    bound = config.copy_and_resolve_references()
    data = bound.data
    for source in parse_train(data.train, data.labels):
        key = f"data.train.{source.name}.order" if source.name else "data.order"
        order, path = source.order or data.order, source.path
        if isinstance(path, str) and not is_remote(path):
            path = resolve_source(source).path  # labels may be local and the records in a store
        resolved, before = resolve_order(order, path), stored.get(key)
        with bound.unlocked():
            section = data.train[source.name] if source.name else data
            section.order = before if order == "auto" and before in ORDERS else resolved
    return bound


def check_same_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Raises an error if the directory has a run with another config; names the changed keys.

    A run that ended before its first checkpoint may restart with any config. With
    `optimizer.schedule="wsd"` another length may be valid: see `check_same_start`.
    """
    if not steps_of_run(workdir):
        if config.lora.rank and not config.model.init_from:
            raise ValueError(
                f"config.lora.rank={config.lora.rank}: adapters alone are trained, and the model "
                "would stay as it was drawn; set config.model.init_from to the model that they "
                "adapt"
            )
        return
    fixed = (FIXED,) if config.optimizer.schedule == "wsd" else (FIXED, END)
    changed = _changed_keys(read_config(workdir), config, fixed)
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config; changed: {', '.join(changed)}. "
            "Take the same values to resume it, or another --workdir to start anew"
        )


def check_same_start(
    config: ml_collections.ConfigDict, workdir: epath.Path, *, num_examples: int
) -> None:
    """Rejects another end of the run if the old end has already shaped the checkpoints."""
    steps = steps_of_run(workdir)
    if not steps:
        return
    stored = read_config(workdir)
    if not _changed_keys(stored, config, (END,)):
        return
    common = min(steps_before_end(c, num_examples=num_examples) for c in (stored, config))
    later = [step for step in steps if step > common]
    if later:
        raise ValueError(
            f"{workdir}: the run was to end otherwise, and only up to step {common} that makes no "
            f"difference; the checkpoints after it are of steps {', '.join(map(str, later))}. To "
            f"go on from step {common} or before, copy {workdir} and remove them from the copy; "
            "or take the same values to resume this run"
        )


def check_hosts_share_config(config: ml_collections.ConfigDict) -> None:
    """Rejects hosts with different configs, which would compute different steps; all must call."""
    own = {
        name: json.dumps(value, sort_keys=True)
        for name, value in _values(config).items()
        if not key_of(name).per_host
    }

    def describe(texts: list[str], others: str) -> str:
        found = [json.loads(text) for text in texts]
        names = set().union(*found)
        differing = sorted(name for name in names if len({each.get(name) for each in found}) > 1)
        return (
            f"processes {others} have another config than process 0; give every host the same "
            f"command. Different: {', '.join(differing)}"
        )

    check_same(json.dumps(own, sort_keys=True), describe)


def open_data(config: ml_collections.ConfigDict, tokenizer: FileTokenizer | None = None) -> Mixture:
    """Opens the records of the run and their decoding. All processes must call it.

    Args:
        tokenizer: of the model; None is CLIP's.
    """
    num_concepts, teacher_width = label_sizes(config)
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    vocabulary = None
    if num_concepts:
        vocabulary = find_train_vocabulary(config.data.train, config.data.labels)
    is_sampled = config.data.captions == "sample"
    decoder = functools.partial(  # still without the template of each source's texts
        DecodeExample,
        arch.image_size,
        arch.context_length,
        config.data.crop_scale,
        fast_decode=config.data.fast_decode,
        num_concepts=num_concepts,
        vocabulary_sizes=vocabulary and tuple(map(len, vocabulary)),
        teacher_width=teacher_width,
        caption_choice=open_caption_choice(config.data) if is_sampled else None,
        caption_sentences=config.data.caption_sentences,
        caption_words=config.data.caption_words,
        pair_ids=needs_pair_ids(config),
        class_key=config.data.class_key,
        vocab_size=arch.vocab_size,
        own_tokenizer=tokenizer,
        interpolation=pictures_of(config).interpolation,
    )
    return check_together(
        open_mixture,
        config.data,
        config.seed,
        decoder,
        jax.process_count(),
    )


def bind_records(
    config: ml_collections.ConfigDict, mixture: Mixture, workdir: epath.Path
) -> ml_collections.ConfigDict:
    """Returns the config with the number of records, if the loss keeps a mean for each.

    Raises:
        ValueError: the config, or the run in `workdir`, has another number, or there are too many.
    """
    if not LOSSES[config.loss.kind].keeps_means:
        return config
    found = mixture.num_record_ids
    if config.loss.num_records not in (None, found):
        raise ValueError(
            f"config.loss.num_records={config.loss.num_records}: the data have {found} records"
        )
    if steps_of_run(workdir):
        before = read_config(workdir).loss.num_records
        if before != found:
            raise ValueError(
                f"config.data.train={describe_train(config.data.train)}: it has {found} records, "
                f"and {workdir} keeps a mean of each of {before}; put the old shards back"
            )
    config = config.copy_and_resolve_references()
    config.loss.num_records = found
    check_config(config)  # numbers of records are int32
    return config


def open_iterator(config: ml_collections.ConfigDict, mixture: Mixture) -> TrainIterator:
    """Opens this process's batches, as configured."""
    return TrainIterator(
        mixture,
        config.data,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        record_ids=bool(num_record_means(config)),
    )


def check_hosts_agree(train: Any, fingerprint: Fingerprint) -> None:
    """Rejects hosts that see different data, which would train in different orders."""
    check_same(
        fingerprint.digest,
        lambda _, others: (
            f"config.data.train={describe_train(train)}: processes {others} see other shards than "
            "process 0; give every host the same files"
        ),
    )


def check_same_data(
    config: ml_collections.ConfigDict, saved: dict[str, Any], fingerprint: Fingerprint
) -> None:
    """Rejects other data than the checkpoint's, unless the config allows it."""
    if saved["digest"] == fingerprint.digest:
        return
    changes = describe_changes(Fingerprint.unpack(saved), fingerprint)
    text = (
        f"config.data.train={describe_train(config.train)} is not what this run was trained on; "
        f"{'; '.join(changes)}"
    )
    if not config.allow_changed:
        raise ValueError(
            f"{text}. Put the old shards back, or go on with these by "
            "--config.data.allow_changed=True: the order of the examples is then another one, and "
            "the epoch at hand is not seen exactly once"
        )
    logging.warning("%s; the run goes on with it", text)


def _changed_keys(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict, policies: Sequence[str]
) -> list[str]:
    """Returns the dotted names of differing keys with one of the policies (FIXED, END, FREE)."""
    old_values, new_values = _values(old), _values(new)
    return sorted(
        name
        for name in old_values.keys() | new_values.keys()
        if old_values.get(name) != new_values.get(name) and key_of(name).resume in policies
    )


def _values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns values by dotted name, in their JSON form."""
    return flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
