"""Data of a run: a config becomes the records of a mixture, and these become batches."""

from __future__ import annotations

import functools

import jax
import ml_collections
from absl import logging
from etils import epath

from diht_jax.data.file_tokenizer import FileTokenizer
from diht_jax.input.blocks import ReadAheadOptions
from diht_jax.input.choices import open_caption_choice
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import Mixture, open_mixture
from diht_jax.input.pipeline import TrainIterator, open_records
from diht_jax.losses.registry import LOSSES
from diht_jax.models.zoo import get_architecture
from diht_jax.records.train_data import describe_train
from diht_jax.records.vocabulary import find_train_vocabulary
from diht_jax.training.multihost import check_together
from diht_jax.training.objective import needs_pair_ids, num_labels, num_record_means, teacher_width
from diht_jax.training.recipe import check_config, pictures_of
from diht_jax.training.workdir.saved_run import read_config, steps_of_run


def open_data(config: ml_collections.ConfigDict, tokenizer: FileTokenizer | None = None) -> Mixture:
    """The records of the run, with what makes examples of them. All processes must call.

    Args:
        tokenizer: of the model; None is CLIP's.
    """
    num_concepts = num_labels(config)
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    vocabulary = None
    if num_concepts:
        vocabulary = find_train_vocabulary(config.data.train, config.data.labels)
    choice = open_caption_choice(config.data)
    if choice is not None:
        logging.info("captions: %s", choice.describe())
    decoder = functools.partial(
        DecodeExample,
        arch.image_size,
        arch.context_length,
        config.data.crop_scale,
        fast_decode=config.data.fast_decode,
        num_concepts=num_concepts,
        vocabulary_sizes=vocabulary and tuple(map(len, vocabulary)),
        teacher_width=teacher_width(config),
        caption_choice=choice,
        caption_sentences=config.data.caption_sentences,
        pair_ids=needs_pair_ids(config),
        class_key=config.data.class_key,
        vocab_size=arch.vocab_size,
        own_tokenizer=tokenizer,
        interpolation=pictures_of(config).interpolation,
    )
    return check_together(
        lambda: open_mixture(
            config.data,
            config.seed,
            open_records,
            lambda template: decoder(text_template=template),
            jax.process_count(),
        )
    )


def bind_records(
    config: ml_collections.ConfigDict, mixture: Mixture, workdir: epath.Path
) -> ml_collections.ConfigDict:
    """The config, with the number of records where the loss keeps a mean of each.

    Raises:
        ValueError: the config, or the run in `workdir`, has another number, or there are too many.
    """
    loss = LOSSES.get(config.loss.kind)
    if loss is None or not loss.keeps_means:
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
    """The batches of this process, as the config asks for them."""
    data = config.data
    return TrainIterator(
        mixture,
        batch_size=data.batch_size,
        seed=config.seed,
        num_workers=data.num_workers,
        prefetch_batches=data.prefetch_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        on_bad_record=data.on_bad_record,
        record_ids=bool(num_record_means(config)),
        max_in_flight_gib=data.max_in_flight_gib,
        read_ahead=ReadAheadOptions(
            read_threads=data.read_threads,
            cache_dir=data.cache_dir,
            read_ahead_gib=data.read_ahead_gib,
            read_timeout_secs=data.read_timeout_secs,
        ),
    )
