"""Blocks that return tuples, called by the outermost forward: the loss and the head around them are captured all the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.rewrite.errors import CaptureError

SIZE, CLASSES = 8, 11


class Block(nn.Module):
    """A residual branch and something beside it, which subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def inner(self, x: Tensor) -> Tensor:
        """The stream behind the block."""
        return x + self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor, *options: Any) -> Any:
        x = self.inner(x)
        return x, x.square().mean()


class InTraining(Block):
    """A number in training, nothing otherwise."""

    def forward(self, x: Tensor, *options: Any) -> Any:
        x = self.inner(x)
        return x, x.square().mean() if self.training else None


class Nested(Block):
    """Tuples in a tuple, a count, and nothing."""

    def forward(self, x: Tensor, *options: Any) -> Any:
        y = self.inner(x)
        return (y, x), y.square().mean(), (y.argmax(), None)


class Cached(Block):
    """Returns a cache where it is asked to."""

    def forward(self, x: Tensor, *options: Any) -> Any:
        y = self.inner(x)
        return y, ((y, y.mean(-1)) if options[0] else None)


class Detached(Block):
    """The number takes no gradient."""

    def forward(self, x: Tensor, *options: Any) -> Any:
        x = self.inner(x)
        return x, x.detach().square().mean()


class Vectors(Block):
    """One number of each row: no tensor that a graph around it could be told of."""

    def forward(self, x: Tensor, *options: Any) -> Any:
        x = self.inner(x)
        return x, x.square().mean((1, 2))


class HandingOn(Block):
    """Reads a memory of another length, and hands it on with a mask, for the next block to read."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Any:
        read = memory.mean(1, keepdim=True) if mask is None else (memory * mask[..., None]).sum(1, keepdim=True)
        return self.inner(x + read), memory, mask


class Reading(nn.Module):
    """A decoder whose blocks hand their memory on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(CLASSES, SIZE), nn.Linear(SIZE, CLASSES)
        self.blocks = nn.ModuleList(HandingOn() for _ in range(3))

    def forward(self, ids: Tensor, read: Tensor, mask: Tensor | None = None) -> Any:
        x, memory = self.embed(ids), self.embed(read)
        for block in self.blocks:
            x, memory, mask = block(x, memory, mask=mask)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten()) + memory.square().mean()


class Net(nn.Module):
    """Embedding, blocks, head and loss, with what the blocks return beside added up."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(CLASSES, SIZE), nn.Linear(SIZE, CLASSES)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor, cached: bool = False) -> Any:
        x, beside = self.embed(ids), 0.0
        for block in self.blocks:
            x, *more = block(x, cached)
            x = x[0] if isinstance(x, tuple) else x
            if more[0] is not None:
                beside = beside + (more[0][1].sum() if isinstance(more[0], tuple) else more[0].sum())
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()) + beside


def optimized(kind: type[nn.Module]) -> tuple[Any, nn.Module, Tensor]:
    """A model, what it was, and its input."""
    torch.manual_seed(0)
    model = Net(kind)
    plain, ids = copy.deepcopy(model), torch.arange(14).view(2, 7) % CLASSES
    weft.optimize(model, mode="train", example_inputs={"ids": ids, "labels": ids})
    return model, plain, ids


def assert_alike(model: nn.Module, plain: nn.Module, *arguments: Any) -> None:
    """The same loss, and the same gradient of each parameter where there are any."""
    results = []
    for each in (model, plain):
        each.zero_grad()
        loss = each(*arguments)
        if loss.requires_grad:
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in each.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [Block, InTraining, Nested, Cached, Detached], ids=lambda k: k.__name__)
def test_the_loss_around_blocks_that_return_tuples(kind: type[nn.Module]) -> None:
    model, plain, ids = optimized(kind)
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("linear_cross_entropy") == 1 and rules.count("rms_norm") == 3, str(model.rewrite_report)
    for length in (7, 4):
        assert_alike(model, plain, ids[:, :length], ids[:, :length])
    model.eval(), plain.eval()
    assert_alike(model, plain, ids, ids)
    with torch.no_grad():
        assert_alike(model, plain, ids, ids)
        assert_alike(model, plain, ids, ids, True)
    model.train(), plain.train()
    assert_alike(model, plain, ids[:1], ids[:1])
    weft.undo(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("length", [4, 7])
def test_arguments_that_are_handed_on(length: int) -> None:
    """Also where in the example they are of the length of what they are given with."""
    model: Any = Reading()
    plain, ids = copy.deepcopy(model), torch.arange(14).view(2, 7) % CLASSES
    weft.optimize(model, mode="train", example_inputs={"ids": ids, "read": ids[:, :length]})
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("linear_cross_entropy") == 1 and rules.count("rms_norm") == 3, str(model.rewrite_report)
    mask = torch.linspace(0, 1, 10).view(2, 5)
    for arguments in (
        (ids, ids[:, :4]),
        (ids[:, :3], ids),
        (ids, ids[:, :5], mask),
        (ids, ids),
        (ids[:1], ids[:1, :1]),
    ):
        assert_alike(model, plain, *arguments)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert_alike(model, plain, ids, ids[:, :5], mask)


def test_what_a_graph_cannot_be_told_of_leaves_the_loss_as_written() -> None:
    model, plain, ids = optimized(Vectors)
    assert "linear_cross_entropy" not in [r.rule for r in model.rewrite_report.rewrites]
    assert_alike(model, plain, ids[:1], ids[:1])


class Changing(Block):
    """What it returns depends on how long its input is."""

    def forward(self, x: Tensor, *options: Any) -> Any:
        y = self.inner(x)
        return (y, y.square().mean()) if x.shape[1] < 10 else (y, None)


def test_a_tuple_unlike_those_that_were_captured_is_refused() -> None:
    model, plain, ids = optimized(Changing)
    long = ids.repeat(1, 3)
    with pytest.raises(CaptureError, match=r"Changing returned something unlike its input.* undo\(\)"):
        model(long, long)
    weft.undo(model)
    assert_alike(model, plain, long, long)
