"""Affinity distillation: pairs of the batch are as similar as stored CLIP teachers find them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from ml_collections.config_dict import placeholder

from diht_jax.losses.affinity import TeacherEmbeddings, sharded_affinity_loss
from diht_jax.training.terms.term import Parameters, Term


class AffinityDistillation(Term):
    """The affinity loss against teachers whose embeddings lie beside the data.

    The data must be labelled (`data_prep.label` with `config.clip_teachers`).

    Source: MobileCLIP, arXiv 2311.17049.
    """

    settings: ClassVar[dict[str, Any]] = {
        "weight": 0.0,
        # What each teacher's similarities are divided by, or one for all; (): 1 / its logit scale.
        "temperatures": (),
        # Of the teachers in the data; training fills them in.
        "widths": (),
        "teachers_hash": placeholder(str),
    }

    def check(self) -> None:
        """See `Term.check`."""
        super().check()
        name, section = self.name, self.section
        for value in section.temperatures:
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(
                    f"config.{name}.temperatures={tuple(section.temperatures)}: expected positive "
                    "numbers, such as (0.01,)"
                )
        if any(not isinstance(width, int) or width < 1 for width in section.widths):
            raise ValueError(
                f"config.{name}.widths={tuple(section.widths)}: expected positive numbers"
            )
        if section.widths and len(section.temperatures) not in (0, 1, len(section.widths)):
            raise ValueError(
                f"config.{name}.temperatures={tuple(section.temperatures)}: expected one for all, "
                f"or one for each of the {len(section.widths)} teachers"
            )

    @property
    def teacher_width(self) -> int:
        """See `Term`.

        Raises:
            ValueError: the teachers are known neither from data nor from the config.
        """
        for key, meaning in (
            ("widths", "embeddings, (768,)"),
            ("temperatures", "softmax, (0.01,)"),
        ):
            if not self.section[key]:
                raise ValueError(
                    f"config.{self.name}.{key} is not set: expected those of the teachers' "
                    f"{meaning} for example; training takes them from config.data.labels"
                )
        return sum(self.section.widths)

    def bind_data(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The config with widths, temperatures and hash of the teachers of the data.

        Raises:
            ValueError: the data have no embeddings, or others than the config names, or they are of
                other crops than the student is to see.
        """
        # Here, since the defaults of a config are read without any data.
        from diht_jax.records.labels.clip_embeddings import find_clip_embeddings

        name, section = self.name, self.section
        found = find_clip_embeddings(config.data.train, config.data.labels)
        if found is None:
            raise ValueError(
                f"config.{name}.weight={section.weight}: no source has embeddings of CLIP "
                "teachers; make them with `python -m data_prep.label "
                "--config.clip_teachers.models=...`, and name its folder by config.data.labels"
            )
        if section.teachers_hash not in (None, found.hash):
            raise ValueError(
                f"config.{name}.teachers_hash={section.teachers_hash}: the embeddings in the data "
                f"are of other teachers or crops, {found.hash}; take data of the same ones"
            )
        captions = config.data.get("captions", "first")
        if captions != "first":
            raise ValueError(
                f"config.data.captions='{captions}': the teachers have embedded the first caption "
                "of every record, so the student must read it as well; set it to 'first'"
            )
        crops, crop_scale = found.crops, tuple(config.data.crop_scale)
        if crops.count and crop_scale != crops.scale:
            raise ValueError(
                f"config.data.crop_scale={crop_scale}: the teachers have seen crops of "
                f"{crops.scale}, which the student is to see as well; set it to that"
            )
        config = config.copy_and_resolve_references()
        config[name].widths = tuple(teacher.width for teacher in found.teachers)
        config[name].teachers_hash = found.hash
        if not section.temperatures:
            config[name].temperatures = tuple(1 / t.logit_scale for t in found.teachers)
        type(self)(name, config[name], self.arch)  # checks that there are as many
        return config

    def of_all_pairs(
        self,
        encoded: dict[str, jax.Array],
        params: Parameters,
        examples: dict[str, jax.Array],
        *,
        mesh: Mesh,
        impl: str,
    ) -> dict[str, tuple[float, jax.Array]]:
        """The loss over the pairs that all teachers have embedded; see `Term.of_all_pairs`."""
        temperatures = tuple(self.section.temperatures)
        if len(temperatures) == 1:
            temperatures *= len(self.section.widths)
        teachers, start = [], 0
        for width, temperature in zip(self.section.widths, temperatures, strict=True):
            columns = slice(start, start + width)
            images, texts = (
                examples[field][:, columns] for field in ("teacher_image_emb", "teacher_text_emb")
            )
            teachers.append(TeacherEmbeddings(images, texts, temperature))
            start += width
        loss = sharded_affinity_loss(
            encoded["image_emb"],
            encoded["text_emb"],
            jnp.exp(params["log_logit_scale"]),
            teachers,
            mesh=mesh,
            impl=impl,
        )
        return {"affinity_loss": (self.section.weight, loss)}
