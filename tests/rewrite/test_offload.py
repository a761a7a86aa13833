"""What blocks save in the host's memory: it comes back as it was, in whatever order. Streams are stood for by nothing."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.rewrite import offload
from weft.rewrite.offload import HostStore

from ..graphs import cases, normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def _without_streams() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(offload, "LARGE", 100)
    if DEVICE.type == "cpu":
        stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None, record_event=lambda: None)
        cuda = SimpleNamespace(Stream=lambda _: stream, current_stream=lambda _: stream, stream=lambda _: nullcontext())
        plain: Any = lambda like, device=None, pin_memory=False: torch.empty_like(like, device=device)  # noqa: E731
        patch.setattr(offload, "torch", SimpleNamespace(cuda=cuda, empty_like=plain))
    yield
    patch.undo()


class Saves(torch.autograd.Function):
    """y = x, and what was saved is looked at in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[list[Tensor]], *saved: Tensor) -> Tensor:
        ctx.save_for_backward(x, *saved)
        ctx.seen, ctx.count = seen, len(saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.seen.append([t.clone() for t in ctx.saved_tensors])
        return grads[0], None, *[None] * ctx.count


def tensors(seed: int, count: int) -> list[Tensor]:
    """Large ones, small ones, one whose dimensions are turned, one with gaps."""
    made = [normal(seed + i, 4 + i % 3, 8).to(DEVICE) for i in range(count)]
    return [
        t.t() if i % 4 == 1 else t[:, :2] if i % 4 == 2 else t[::2] if i % 4 == 3 else t for i, t in enumerate(made)
    ]


@cases
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6), st.integers(1, 3))
def test_all_comes_back(blocks: list[tuple[int, bool]], steps: int) -> None:
    store, weight = HostStore(DEVICE), normal(99, 8, 8).to(DEVICE)
    pinned: set[int] = set()
    for step in range(steps):
        x = normal(step, 5, 8).to(DEVICE).requires_grad_()
        seen, wanted, y = list[list[Tensor]](), list[list[Tensor]](), x * 1
        for i, (count, everything) in enumerate(blocks):
            saved = [*tensors(100 * i + step, count), weight]
            wanted.append([t.detach().clone() for t in (y, *saved)])
            with store.offloading(y, [y, weight] if everything else None):
                y = Saves.apply(y, seen, *saved)
            del saved
        assert isinstance(y, Tensor)
        y.sum().backward()
        assert len(seen) == len(wanted)
        for found, then in zip(seen[::-1], wanted, strict=True):
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, then, strict=True))
        del y, seen
        buffers = {b.data_ptr() for free in store._free.values() for b in free}
        assert not pinned or buffers == pinned, "a buffer is used again once it is free"
        pinned = buffers
    large = [
        sum(t.nbytes >= 100 and (i % 4 in (0, 1)) for i, t in enumerate(tensors(0, c))) if e else 0 for c, e in blocks
    ]
    assert len(pinned) == len(blocks) + sum(large)


def test_what_is_the_callers_stays() -> None:
    store, mask = HostStore(DEVICE), normal(1, 16, 16).to(DEVICE)
    x = normal(0, 5, 8).to(DEVICE).requires_grad_() * 1
    with store.offloading(x, [x, mask]):
        y = Saves.apply(x, [], mask, mask[:8])
    assert isinstance(y, Tensor) and not store._free[x.shape, x.stride(), x.dtype]
    assert len(store._free) == 1


def test_the_block_before_is_under_way() -> None:
    """Its copies have begun when a block's own are there."""
    store, kept = HostStore(DEVICE), list[Tensor]()
    x = normal(0, 5, 8).to(DEVICE).requires_grad_()
    for _ in range(3):
        y = x * 1
        with store.offloading(y, [y]):
            kept.append(Saves.apply(y, [], *tensors(0, 2)))  # type: ignore[arg-type]
        del y
    groups = list(store._waiting)
    begun = lambda: [[i._arriving is not None for i in g.items] for g in groups]  # noqa: E731
    assert [len(g.items) for g in groups] == [3, 3, 3]
    kept.pop().sum().backward()
    assert begun() == [[False] * 3, [True] * 3, []]
    kept.pop(0).sum().backward()
    assert begun() == [[], [True] * 3, []]
