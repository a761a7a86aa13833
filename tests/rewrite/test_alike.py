"""Blocks of one class share a graph though the first one's input needs no gradient, and none is computed for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.rewrite.alike import Alike, swapped

from ..models import assert_same, batch, llama, outcome, twin, with_lora

MEMORY = (None, "8GB")


def graphs_of(model: Any, path: str) -> list[Any]:
    """Those that the module at ``path`` runs."""
    return [g for g in model.rewrite_report.graphs if path in g.region.paths]


@pytest.mark.parametrize("memory", MEMORY)
def test_the_first_block_has_the_graphs_of_the_others(memory: str | None) -> None:
    model = with_lora(llama(num_hidden_layers=3))
    plain = twin(model)
    weft.optimize(model, verify=False, memory=memory)
    layers = "base_model.model.model.layers."
    assert [g.region.paths for g in graphs_of(model, layers + "0")] == [
        g.region.paths for g in graphs_of(model, layers + "2")
    ]
    for seed in range(2):
        inputs = batch(2, 9, seed=seed, padded=seed == 1)
        assert_same(outcome(model, inputs), outcome(plain, inputs))
    nodes = []
    for m in (model, plain):
        with torch.profiler.profile() as profile:
            m(**batch(2, 9)).loss.backward()
        nodes.append(
            [sum(e.count for e in profile.key_averages() if n in e.key) for n in ("AccumulateGrad", "AliasedBackward")]
        )
    assert nodes[0] == nodes[1] and nodes[0][1] == 0, "what the first block computes goes on behind its input"


class Block(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.seen: list[bool] = []


class InPlace(Block):
    """x ← x + tanh(1.5 x W) V"""

    def forward(self, x: Tensor) -> Tensor:
        """In place."""
        x += self.down(torch.tanh(self.up(x * 1.5)))
        return x


class Apart(Block):
    """y = tanh(copy(x) W) V, of which Dynamo captures what is behind the copy: no graph is given the input."""

    def forward(self, x: Tensor) -> Tensor:
        """The copy is made by what Dynamo leaves alone."""
        return self.down(torch.tanh(self.up(self.copied(x))))

    @torch.compiler.disable
    def copied(self, x: Tensor) -> Tensor:
        """As it was given, which is noted."""
        self.seen.append(x.requires_grad)
        return x.clone()


class Two(nn.Module):
    """Two blocks of a class."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> SimpleNamespace:
        """The loss and the result of a scaled input."""
        x = x * 2
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=x.square().mean(), logits=x)


@pytest.mark.parametrize("memory", MEMORY)
def test_an_input_that_is_written_to(memory: str | None) -> None:
    model = Two(InPlace)
    plain, x = twin(model), torch.randn(2, 5, 8)
    weft.optimize(model, mode="train", example_inputs={"x": x}, memory=memory)
    for _ in range(2):
        assert_same(outcome(model, {"x": x}), outcome(plain, {"x": x}))


def test_an_alias_stands_wherever_the_input_does() -> None:
    x = torch.ones(2, 3)
    alias = Alike(nn.Linear(3, 3)).alias(x)
    assert alias is not None and alias.alias.requires_grad and not alias.alias.is_leaf
    assert alias.alias.data_ptr() == x.data_ptr()
    args, kwargs = swapped((x, 1, x), {"y": x, "z": "z"}, alias)
    assert args[0] is args[2] is kwargs["y"] is alias.alias and args[1] == 1 and kwargs["z"] == "z"
    assert not alias.met and alias.instead((1, x))[1] is None
    assert alias.instead((1, alias.alias)) == ((1, x), 1) and alias.met


def test_what_no_graph_meets_is_not_aliased_again() -> None:
    model = Two(Apart)
    plain, x = twin(model), torch.randn(2, 5, 8)
    weft.optimize(model, mode="train", example_inputs={"x": x})
    first: Any = model.blocks[0]
    first.seen.clear()
    for _ in range(2):
        assert_same(outcome(model, {"x": x}), outcome(plain, {"x": x}))
    assert first.seen == [False, False]


@pytest.mark.parametrize("why", ["nothing is trained", "integers", "not a tensor"])
def test_no_alias_where_there_is_no_need(why: str) -> None:
    block = nn.Linear(3, 3).requires_grad_(why != "nothing is trained")
    x = torch.ones(2, 3, dtype=torch.long if why == "integers" else torch.float32)
    assert Alike(block).alias([x] if why == "not a tensor" else x) is None
