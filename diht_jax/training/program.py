"""Mesh, model, optimizer and step of a config's run, without arrays.

The same object is run locally and compiled ahead of time for other machines. It contains no data,
checkpoints or measurements.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from diht_jax import sharding
from diht_jax.hardware.compiler import step_options
from diht_jax.input.choices import IMAGE_FIELD, TEXT_FIELD
from diht_jax.losses.dense import Choice, choose_impl
from diht_jax.losses.fastclip import initial_means
from diht_jax.models.attention import TowerAttention, attention_implementation, kernel_difference
from diht_jax.models.dual_encoder import num_kept_patches
from diht_jax.models.parameters import ModelDefinition, lora_of
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import get_architecture
from diht_jax.records.schema import CONCEPT_FIELDS
from diht_jax.training.multihost import first_text
from diht_jax.training.objective import (
    active_terms,
    label_sizes,
    needs_pair_ids,
    num_record_means,
    with_objective_parameters,
)
from diht_jax.training.optimizer import create_optimizer, learning_rate_schedule
from diht_jax.training.step import TrainState, initial_average, train_step, training_execution

# About ten roundings of bfloat16, relative to the largest value.
_ATTENTION_TOLERANCE = 2e-2

# The jitted step: can be traced, compiled, or called with (state, batch).
TrainStep = jax.stages.Wrapped


class TrainProgram:
    """Mesh, model, optimiser and step of a config.

    Attributes:
        config: the whole training config.
        mesh: axes `data` and `fsdp`.
        arch: sizes of the model.
        definition: of the model as used in evaluation; the step has further execution options.
        init_params: draws the parameters from a key.
        schedule: learning rate by step.
        optimizer: the configured optimiser.
        num_labels: number of the teacher's labels of each kind that the step reads per record.
        teacher_width: width of the CLIP teachers' embeddings that the step reads.
        pair_ids: whether the step reads which pairs of a batch are equal.
        num_means: number of records whose means the loss keeps and the step looks up; 0 for none.
        keeps_ema: whether the state has a moving average of the parameters.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        total_steps: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Builds everything without creating arrays.

        Raises:
            ValueError: the mesh or batch does not fit the devices, or a config value is invalid.
        """
        self.config = config
        self.mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, devices)
        if config.data.batch_size % self.mesh.size:
            raise ValueError(
                f"config.data.batch_size={config.data.batch_size} is no multiple of the "
                f"{self.mesh.size} devices"
            )
        self.keeps_ema = config.ema.decay is not None
        if config.evaluation.use_ema and not self.keeps_ema:
            raise ValueError("config.evaluation.use_ema needs config.ema.decay, such as 0.9999")
        self.arch = get_architecture(config.model.name, config.model.overrides.to_dict())
        self.schedule = learning_rate_schedule(config.optimizer, total_steps)
        section = config.optimizer.copy_and_resolve_references()
        for term in active_terms(config):
            section.multipliers = (*section.multipliers, *term.multipliers)
        self.optimizer = create_optimizer(section, self.schedule, self.mesh)
        self.definition = ModelDefinition(
            self.arch,
            config.model.dtype,
            config.model.param_dtype,
            Execution(attention=config.model.attention),
            lora=lora_of(config.lora),
        )
        self.init_params = with_objective_parameters(self.definition.init_params, config, self.arch)
        self.num_labels, self.teacher_width = label_sizes(config)
        self.pair_ids = needs_pair_ids(config)
        self.num_means = num_record_means(config)
        # One function object: JAX traces it once, for the shapes and for the values.
        self._draw = self._draw_state

    def create_state(self) -> TrainState:
        """Creates the initial state; no device ever holds more than its shard."""
        shapes = jax.eval_shape(self._draw, np.uint32(0))
        shardings = sharding.tree_shardings(shapes, self.mesh)
        # A Python int would become an int32, which half of the seeds exceed.
        return jax.jit(self._draw, out_shardings=shardings)(np.uint32(self.config.seed))

    def abstract_state(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self._draw, np.uint32(0))
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            shapes,
            sharding.tree_shardings(shapes, self.mesh),
        )

    def _draw_state(self, seed: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(jax.random.key(seed))
        params = self.init_params(params_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            key_data=jax.random.key_data(run_key),
            ema_params=initial_average(params) if self.keeps_ema else None,
            record_means=initial_means(self.num_means) if self.num_means else None,
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of the batches of the input pipeline."""
        size, side = self.config.data.batch_size, self.arch.image_size
        by_example = sharding.batch_sharding(self.mesh)
        field = functools.partial(jax.ShapeDtypeStruct, sharding=by_example)
        fields = {
            "images": field((size, side, side, 3), jnp.uint8),
            "tokens": field((size, self.arch.context_length), jnp.int32),
        }
        if self.pair_ids:
            fields["pair_ids"] = field((size, 2), jnp.uint32)
        if self.num_means:
            fields["record_ids"] = field((size,), jnp.int32)
        if self.num_labels:
            for ids, probs in CONCEPT_FIELDS:
                fields[ids] = field((size, self.num_labels), jnp.int32)
                fields[probs] = field((size, self.num_labels), jnp.float32)
        if self.teacher_width:
            for name in (IMAGE_FIELD, TEXT_FIELD):
                fields[name] = field((size, self.teacher_width), jnp.float16)
        return fields

    def attention(self) -> dict[str, TowerAttention]:
        """Returns the attention of the step's blocks, by tower."""
        model = self.config.model
        execution = training_execution(model, self.mesh)
        arch = self.arch
        num_patches = arch.num_patches
        if model.patch_dropout:
            num_patches = num_kept_patches(num_patches, model.patch_dropout)
        image_tokens = num_patches + arch.class_token
        towers = {
            "vision": (image_tokens, arch.vision_heads, arch.vision_width, False),
            "text": (arch.context_length, arch.text_heads, arch.text_width, arch.causal_text),
        }
        return {
            name: TowerAttention(
                num_tokens=num_tokens,
                num_heads=num_heads,
                head_dim=width // num_heads,
                causal=causal,
                dtype=model.dtype,
                # Chosen for all patches, since the last part of a run may drop none.
                kernel=attention_implementation(
                    execution.attention,
                    model.dtype,
                    width // num_heads,
                    execution.target,
                    num_tokens=num_tokens if name == "text" else arch.num_image_tokens,
                    num_heads=num_heads,
                ),
            )
            for name, (num_tokens, num_heads, width, causal) in towers.items()
        }

    def loss_form(self) -> Choice:
        """Returns the form of the contrastive loss on this mesh, and the reason."""
        config = self.config
        if self.num_means:
            return Choice("gathered", "the only one of this loss")
        return choose_impl(
            self.mesh,
            sharding.BATCH_AXES,
            config.data.batch_size,
            self.arch.embed_dim,
            config.loss.impl,
        )

    def step(self, state: TrainState, *, patch_dropout: bool = True) -> TrainStep:
        """Returns the jitted `step(state, batch) -> (state, metrics)`, which donates `state`.

        Args:
            state: training state, as arrays or as shapes with shardings.
            patch_dropout: False for the step of the run's last part, without patch dropout.

        Raises:
            ValueError: an invalid `config.micro_batch` or `config.model` value.
        """
        config = self.config if patch_dropout else without_patch_dropout(self.config)
        mesh = self.mesh
        check_micro_batch(config.micro_batch, config.data.batch_size, mesh.size)
        execution = training_execution(config.model, mesh)
        step = functools.partial(
            train_step,
            definition=dataclasses.replace(self.definition, execution=execution),
            optimizer=self.optimizer,
            schedule=self.schedule,
            mesh=mesh,
            config=config,
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        out_shardings = (shardings, sharding.replicated(mesh))
        options = step_options(mesh.devices.flat[0].device_kind)
        return jax.jit(
            step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options
        )


def check_micro_batch(micro_batch: int | None, batch_size: int, num_devices: int) -> None:
    """Raises ValueError unless every device can split its rows into equal micro-batches."""
    if micro_batch is None:
        return
    if micro_batch < 1 or batch_size % micro_batch or micro_batch % num_devices:
        raise ValueError(
            f"config.micro_batch={micro_batch}: expected a multiple of the {num_devices} devices "
            f"that divides config.data.batch_size={batch_size}"
        )


def log_start(
    program: TrainProgram, params: dict[str, Any], num_records: int, total_steps: int
) -> None:
    """Logs the sizes of a run."""
    model = program.config.model
    changed = [f"{k}={v}" for k, v in sorted(model.overrides.items()) if v is not None]
    logging.info(
        "%s: %.1fM parameters, %d records, %d steps of %d examples on %d x %s (mesh %s)",
        f"{model.name} with {', '.join(changed)}" if changed else model.name,
        optax.tree.size(params) / 1e6,
        num_records,
        total_steps,
        program.config.data.batch_size,
        program.mesh.size,
        jax.devices()[0].device_kind,
        dict(program.mesh.shape),
    )


def without_patch_dropout(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config of a run's last part (see `config.no_patch_dropout_*`)."""
    config = config.copy_and_resolve_references()
    config.model.patch_dropout = 0.0
    return config


def trusted_program(
    config: ml_collections.ConfigDict, total_steps: int, devices: Sequence[jax.Device] | None = None
) -> TrainProgram:
    """Creates the program; uses XLA's attention if another kernel is inaccurate on this machine.

    Tests cannot cover every accelerator, driver and version of cuDNN or libtpu. This check (our
    own) compares values and gradients of a small batch before the first step. All processes of a
    job must call it, and use the same kernel.
    """
    program, differing = TrainProgram(config, total_steps, devices), []
    for name, attention in program.attention().items():
        if attention.kernel == "xla":
            continue
        difference = kernel_difference(attention, jax.local_devices()[0])
        logging.info(
            "attention of the %s tower: %s; values and gradients within %.1e of XLA's on %s",
            name,
            attention.kernel,
            difference,
            jax.local_devices()[0].device_kind,
        )
        if not difference <= _ATTENTION_TOLERANCE:
            differing.append(f"{attention.kernel} in the {name} tower by {difference:.1e}")
    differs = first_text(", ".join(differing))
    if differs is None:
        return program
    logging.warning(
        "attention differs from XLA's on this machine, %s, where %.0e is tolerated: XLA's is used. "
        "Please report it, with the versions of JAX, cuDNN or libtpu, and the driver",
        differs,
        _ATTENTION_TOLERANCE,
    )
    config = config.copy_and_resolve_references()
    config.model.attention = "xla"
    return TrainProgram(config, total_steps, devices)
