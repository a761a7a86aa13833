"""Gradients that are added where one of them is computed: the same numbers, and no sum left."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from weft.kernels.layer_norm import layer_norm
from weft.kernels.rms_norm import rms_norm
from weft.rewrite.gradient_sums import with_sums

from .saving import Captured
from .test_joint import assert_close, leaves, run

Block = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCKS: dict[str, tuple[Block, int]] = {
    "a residual": (lambda x, w, v: x + rms_norm(x, v, 1e-6) @ w, 0),
    "the other way round": (lambda x, w, v: layer_norm(x, v, v, 1e-6) @ w + x, 0),
    "two norms beside it": (lambda x, w, v: x + rms_norm(x, v, 1e-6) @ w + layer_norm(x, v, None, 1e-5).sin(), 0),
    "a norm alone": (lambda x, w, v: rms_norm(x, v, 1e-6) @ w, 0),
    "in another dtype": (lambda x, w, v: x + rms_norm(x.double(), v.double(), 1e-6).float() @ w, 1),
    "broadcast": (lambda x, w, v: x[:, :1] + rms_norm(x[:, :1] + x, v, 1e-6) @ w, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_sums_are_part_of_the_norms_backward(name: str) -> None:
    """Sums of what only a norm reads, in its dtype and shape."""
    torch._dynamo.reset()
    block, left = BLOCKS[name]
    seen = list[fx.GraphModule]()

    def noted(module: fx.GraphModule) -> fx.GraphModule:
        seen.append(module)
        return module

    captured = Captured(block, prepared=noted)
    for length in (5, 8):
        assert_close(run(captured, leaves(length))[0], run(block, leaves(length))[0])
    backward = seen[-1]
    sums = [n for n in backward.graph.nodes if n.target is torch.ops.aten.add.Tensor and n.meta["val"].dim() == 3]
    assert left is None or len(sums) == left, str(backward.graph)


def test_what_is_computed_later_is_added_later() -> None:
    """The other gradient must be there when the norm's backward runs."""
    graph = fx.Graph()
    grad, x, r = (graph.placeholder(name) for name in ("grad", "x", "r"))
    norm = graph.call_function(
        torch.ops.weft.rms_norm_backward.default, (grad, x, None, r, None, 1e-6, 0.0, "inside", True, False)
    )
    dx = graph.call_function(operator.getitem, (norm, 0))
    later = graph.call_function(torch.ops.aten.sin.default, (grad,))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (dx, later)),))
    for node in graph.nodes:
        node.meta["val"] = torch.ones(2, 3)
    module = fx.GraphModule(torch.nn.Module(), graph)
    assert [str(n.target) for n in with_sums(module).graph.nodes] == [str(n.target) for n in graph.nodes]
