"""Policies of the intermediate values that a block keeps for the backward pass.

The policies, with what a block keeps for each token (w is its
width, t the number of tokens) and what the backward pass computes again:

    none     everything that costs arithmetic worth the name, attention weights included
             (18 w + t heads): nothing but cheap element-wise operations again
    dots     the input and the outputs of the linear layers that are needed (9 w): attention,
             LayerNorm and GELU again
    minimal  the input, queries, keys, values and what attention adds (5 w): also the MLP's first
             linear layer again, a third of a block's. What the TPU kernel gives is kept too (6 w)
    full     the input (1 w): the whole block again but the MLP's last linear layer
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

POLICIES = ("none", "full", "dots", "minimal")

# Names that the blocks give to values with `checkpoint_name`.
LINEAR_OUT = "linear_out"
QKV = "qkv"
ATTENTION_OUT = "attention_out"
KERNEL_OUT = "kernel_out"  # of `tpu_attention`

# Element-wise, so computed again in less time than a read from memory takes: XLA fuses them into
# their users. The gather of a split parameter is the exception: it costs communication,
# and keeping its result would keep every layer whole.
_COMPUTED_AGAIN = frozenset(
    {
        "add",
        "add_any",
        "sub",
        "mul",
        "div",
        "neg",
        "integer_pow",
        "square",
        "select_n",
        "copy",
        "convert_element_type",
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "squeeze",
        "slice",
        "all_gather",
    }
)


def check_remat(name: str) -> None:
    """Raises ValueError unless `name` is one of `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"config.model.remat='{name}': expected one of {', '.join(POLICIES)}")


def checkpointed(
    run: Callable[..., jax.Array], name: str, *, scanned: bool
) -> Callable[..., jax.Array]:
    """`run` with the policy `name` for its backward pass.

    Args:
        run: one block, a function of its parameters and its input.
        name: of the policy.
        scanned: `run` is the body of a scan, where the compiler has no chance to merge the second
            computation with the first.
    """
    return jax.checkpoint(run, policy=_policy(name), prevent_cse=not scanned)


def _policy(name: str) -> Callable[..., Any]:
    check_remat(name)
    policies = jax.checkpoint_policies
    return {
        "none": _save_what_costs,
        # By name: a policy does not see into the linear layers' own differentiation rule.
        "dots": policies.save_only_these_names(LINEAR_OUT),
        "minimal": policies.save_only_these_names(QKV, ATTENTION_OUT, KERNEL_OUT),
        "full": policies.nothing_saveable,
    }[name]


def _save_what_costs(primitive: Any, *_, **params) -> bool:
    if primitive.name == "custom_vjp_call":
        equations = params["call_jaxpr"].jaxpr.eqns
        return all(eqn.primitive.name != "all_gather" for eqn in equations)
    return primitive.name not in _COMPUTED_AGAIN
