"""Parts that are taken in one step have the same values and gradients, and the gradient is put together once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.profiler import ProfilerActivity, profile

from weft.passes.split_once import SplitOnce

from ..graphs import cases, copied, described, normal, targets, trace


def ran(function: Callable[..., Any], x: Tensor) -> list[Tensor]:
    """Outputs, and the gradient."""
    given = x.clone().requires_grad_()
    outputs = function(given)
    torch.autograd.backward([(o * (i + 1)).sum() for i, o in enumerate(outputs)])
    assert given.grad is not None
    return [*(o.detach() for o in outputs), given.grad]


def split(module: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """``module`` goes through the pass and computes what it did, bit for bit; it as it was."""
    original = copied(module)
    SplitOnce().run(module, None)
    module.graph.lint()
    module.recompile()
    for found, wanted in zip(ran(module, x), ran(original, x), strict=True):
        assert torch.equal(found, wanted)
    return original


@cases
@given(data=st.data())
def test_slices_of_all_become_one_split(data: st.DataObject) -> None:
    """Any number of slices, in any order and along any dimension, with others beside them."""
    shape = (3, 8, 10)
    dim, size = data.draw(st.sampled_from([(1, 8), (2, 10)]))
    bounds = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3))), size]
    order = data.draw(st.permutations(list(pairwise(bounds))))
    left_out = data.draw(st.booleans())

    def parts(x: Any) -> Any:
        lead = (slice(None),) * dim if data_lead else (Ellipsis,)
        trail = () if data_lead else (slice(None),) * (2 - dim)
        taken = order[1:] if left_out else order
        return tuple(x[(*lead, slice(a, b), *trail)].exp() for a, b in taken) + (x.sin(),)

    data_lead = data.draw(st.booleans())
    x = normal(1, *shape)
    module = trace(parts, {"x": x})
    split(module, x)
    assert ("split" in targets(module)) == (len(order) > 1 and not left_out)
    once = described(module)
    SplitOnce().run(module, None)
    assert described(module) == once


KEPT: dict[str, Callable[[Any], Any]] = {
    "one slice": lambda x: (x[..., :5].exp(),),
    "a gap": lambda x: (x[..., :4].exp(), x[..., 5:].exp()),
    "an overlap": lambda x: (x[..., :6].exp(), x[..., 5:].exp()),
    "every second": lambda x: (x[..., ::2].exp(), x[..., 1::2].exp()),
    "two dimensions": lambda x: (x[:, :4, :5].exp(), x[:, 4:, 5:].exp()),
    "written": lambda x: ((x.exp())[..., :5].add_(1), x[..., 5:].exp()),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_are_not_all_parts_stays(name: str) -> None:
    module = trace(KEPT[name], {"x": normal(1, 3, 8, 10)})
    before = described(module)
    SplitOnce().run(module, None)
    assert described(module) == before


def test_a_part_that_is_overwritten_stays_a_slice() -> None:
    """Autograd lets nobody write into the parts of a split."""

    def written(x: Any) -> Any:
        y = x * 2
        left, right = y[..., :5], y[..., 5:]
        left.mul_(2)
        return left + right, y

    x = normal(1, 3, 8, 10)
    module = trace(written, {"x": x})
    split(module, x)


@pytest.mark.parametrize("take", ["split", "chunk"])
def test_parts_are_taken_of_the_tensor_as_it_lies(take: str) -> None:
    """q, k and v of packed heads: the gradient of their projection is written once, and copied no more."""

    def heads(x: Any) -> Any:
        turned = x.view(2, 4, 3, 6).transpose(1, 2)
        return turned.split(2, -1) if take == "split" else turned.chunk(3, dim=3)

    def three(x: Any) -> Any:
        parts = heads(x)
        return tuple(parts[i].exp() for i in range(3))

    x = normal(1, 2, 4, 18)
    module = trace(three, {"x": x})
    original = split(module, x)
    assert targets(module).count("transpose") == 3
    assert copies(module, x) < copies(original, x)


def copies(function: Callable[..., Any], x: Tensor) -> int:
    """How often a tensor is copied, forward and back."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ran(function, x)
    return sum(e.count for e in seen.key_averages() if e.key == "aten::copy_")
