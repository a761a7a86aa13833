"""Turns a rewritten graph into the callable that runs in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from . import graph as g


def lower(module: fx.GraphModule) -> Callable[..., Any]:
    """The rewritten graph, run node by node: its operators are the kernels, what is left over runs as it was written."""
    for part in g.subgraphs(module):
        lower_checkpoints(part)
    module.recompile()
    return module.forward


def has_checkpoint(module: fx.GraphModule) -> bool:
    """Whether a part of ``module`` is marked to be computed again."""
    return any(n.target is _marker() for n in module.graph.nodes)


def _marker() -> Any:
    return torch.ops.higher_order.tag_activation_checkpoint


def lower_checkpoints(module: fx.GraphModule) -> None:
    """Make activation checkpoints recompute.

    Dynamo's higher-order operator only marks its body for a partitioner to recompute; run as it is, it would save all.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is _marker():
            node.target = _recompute
    module.recompile()


def _recompute(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    known = {k: v for k, v in options.items() if k in ("preserve_rng_state", "determinism_check", "context_fn")}
    return checkpoint(body, *args, use_reentrant=False, **known)
