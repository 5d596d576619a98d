"""Memory and FLOPs of the contrastive loss at pod scale, by compiling it for a TPU topology.

    python -m benchmarks.contrastive_loss --topology v5e:16x16

Value and gradient of HN-NCE for global batches of 8k to 1M float32 embeddings, in four forms:

  * dense: the [N, N] matrix under `jit`, split by the compiler (as in big_vision);
  * gathered: every device gathers all embeddings (as open_clip's --local-loss
    --gather-with-grad): `impl="gathered"`;
  * streaming: `impl="streaming"` on a mesh with one axis, a ring of all devices;
  * groups: the same with groups of `fsdp` neighbours, which gather as much as their memory allows.

Peak memory is the compiler's, including arguments and results. FLOPs are counted from the jaxpr,
because XLA's own analysis counts the body of a loop only once. Forms that do not fit are listed as
well. Needs the TPU compiler (`pip install libtpu`), not a TPU.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.record import write_result
from diht_jax.hardware.chips import count_flops
from diht_jax.hardware.hlo_traffic import count_traffic
from diht_jax.hardware.topologies import get_topology
from diht_jax.losses import contrastive_loss
from diht_jax.terminal import ProgressBar

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "What to compile for.")
_WIDTH = flags.DEFINE_integer("width", 768, "Embedding size d.")
_BATCHES = flags.DEFINE_list(
    "batches", [str(2**power) for power in range(13, 21)], "Global batch sizes N."
)

_FSDP = flags.DEFINE_integer("fsdp", 8, "Devices along the second axis of the mesh of 'groups'.")

AXES = ("data", "fsdp")
FORMS = ("dense", "gathered", "streaming", "groups")
_FORMS = flags.DEFINE_multi_enum("form", FORMS, FORMS, "Which forms.")


def dense_loss_and_grads():
    """HN-NCE on the whole matrix, which the compiler may split."""

    def loss(image_emb, text_emb, scale):
        return contrastive_loss(image_emb, text_emb, scale, beta=0.25, impl="gathered")

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def mapped_loss_and_grads(mesh: Mesh, impl: str):
    """HN-NCE on the rows of each device."""
    rows, whole = PartitionSpec(AXES), PartitionSpec()
    loss = functools.partial(contrastive_loss, axis_name=AXES, beta=0.25, impl=impl)
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole)
    return jax.value_and_grad(mapped, argnums=(0, 1, 2))


def measure(form: str, num_pairs: int, width: int, mesh: Mesh, options: dict) -> dict:
    """Returns peak bytes, operations and transfers per device of one form at one batch size."""
    by_example = NamedSharding(mesh, PartitionSpec(AXES))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((num_pairs, width), jnp.float32, sharding=by_example)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    impl = "streaming" if form == "groups" else form
    fn = dense_loss_and_grads() if form == "dense" else mapped_loss_and_grads(mesh, impl)
    entry = {
        "form": form,
        "global_batch": num_pairs,
        "matmul_flops_per_device": count_flops(fn, rows, rows, scale) / mesh.size,
    }
    start = time.perf_counter()
    jitted = jax.jit(fn, out_shardings=(whole, (by_example, by_example, whole)))
    try:
        compiled = jitted.lower(rows, rows, scale).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return entry | {"fits": False, "compiler": str(error).splitlines()[0][:200]}
    sent = count_traffic(compiled.as_text()).collectives
    return entry | {
        "fits": True,
        "peak_bytes_per_device": compiled.memory_analysis().peak_memory_in_bytes,
        "permutes": sum(row.count for row in sent if row.kind == "collective-permute"),
        "gathering_devices": max(
            (row.group_size for row in sent if row.kind == "all-gather"), default=1
        ),
        "sent_bytes_per_device": sum(row.sent_bytes for row in sent),
        "compile_secs": round(time.perf_counter() - start, 1),
    }


def table(entries: list[dict]) -> str:
    """Formats one line per batch size: peak MB, and for each form its FLOPs and ring transfers."""
    forms = [form for form in FORMS if any(entry["form"] == form for entry in entries)]
    lines = [
        f"{'N':>9}  " + "  ".join(f"{form + ' MB':>12}" for form in forms) + "   TFLOP, permutes"
    ]
    for num_pairs in sorted({entry["global_batch"] for entry in entries}):
        by_form = {e["form"]: e for e in entries if e["global_batch"] == num_pairs}
        peaks = [
            f"{by_form[form]['peak_bytes_per_device'] / 1e6:12.1f}"
            if by_form[form]["fits"]
            else f"{'does not fit':>12}"
            for form in forms
        ]
        costs = [
            f"{form} {by_form[form]['matmul_flops_per_device'] / 1e12:.3f}, "
            f"{by_form[form].get('permutes', 0):,}"
            for form in forms
        ]
        lines.append(f"{num_pairs:>9}  " + "  ".join(peaks) + "   " + "; ".join(costs))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Compiles all forms and writes `results/contrastive_loss.json`.

    If only some forms or another topology were requested, the file name contains their names.
    """
    del argv
    topology = get_topology(_TOPOLOGY.value)
    devices = topology.devices
    meshes = {
        form: Mesh(np.asarray(devices).reshape(-1, _FSDP.value if form == "groups" else 1), AXES)
        for form in FORMS
    }
    cases = [(form, int(size)) for size in _BATCHES.value for form in _FORMS.value]
    entries = [
        measure(form, size, _WIDTH.value, meshes[form], topology.compiler_options)
        for form, size in ProgressBar(cases, unit="program")
    ]
    name = ["contrastive_loss"]
    if set(_FORMS.value) != set(FORMS):
        name += _FORMS.value
    if _TOPOLOGY.value != flags.FLAGS["topology"].default:
        name.append(_TOPOLOGY.value.replace(":", "_"))
    path = write_result(
        "_".join(name),
        {
            "topology": _TOPOLOGY.value,
            "devices": len(devices),
            "width": _WIDTH.value,
            "fsdp_of_groups": _FSDP.value,
            "entries": entries,
        },
    )
    print(table(entries))
    print(path)


if __name__ == "__main__":
    app.run(main)
