"""A head that stands deep inside what is called is in one graph with the loss, wherever that is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import weft
from weft.rewrite.regions import plan_sites

from ..models import VOCABULARY, Block, Nested, Output, RootLoop, Stack, assert_same, batch, fill_adapters, outcome


class Wrapper(nn.Module):
    """Calls what it holds as it was called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class WithLoss(Wrapper):
    """Adds the loss to a model that returns logits."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.inner(input_ids).logits
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits=logits, loss=loss)


class Tied(Stack):
    """The head is the embedding's weight: no module of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(16, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = F.linear(super().forward(input_ids), self.embed.weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits=logits, loss=loss)


class HeadFirst(Nested):
    """The head is assigned before what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = self._modules.pop("stack")


def with_adapters(model: nn.Module) -> nn.Module:
    """``model`` in two wrappers of PEFT."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv", "fused", "back"]))
    fill_adapters(adapted)
    return adapted.train()


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "loop": lambda: Wrapper(RootLoop()),
    "stack": lambda: Wrapper(Nested()),
    "twice": lambda: Wrapper(Wrapper(RootLoop())),
    "tied": lambda: Wrapper(Tied()),
    "head first": lambda: Wrapper(HeadFirst()),
    "loss around a loop": lambda: WithLoss(RootLoop()),
    "loss around a stack": lambda: WithLoss(Nested()),
    "wrapped loss": lambda: Wrapper(WithLoss(Nested())),
    "adapters": lambda: with_adapters(RootLoop()),
    "adapters on a stack": lambda: with_adapters(Nested()),
    "adapters on a tied one": lambda: with_adapters(Tied()),
    "wrapped adapters": lambda: WithLoss(with_adapters(Nested())),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_head_and_loss_are_in_one_graph(name: str) -> None:
    model: Any = WRAPPED[name]()
    plain = copy.deepcopy(model)
    weft.optimize(model, example_inputs=batch(2, 6), verify=False)
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("linear_cross_entropy") == 1 and rules.count("gated_mlp") == 2, str(model.rewrite_report)
    assert rules.count("rms_norm") == 5
    for inputs in (batch(2, 6), batch(3, 4), batch(1, 5, labels=False)):
        assert_same(outcome(model, inputs), outcome(plain, inputs))
    weft.undo(model)
    assert not any("forward" in vars(m) for m in model.modules())


class Counting(Block):
    """Returns what no graph around it can hold."""

    def forward(self, x: Tensor) -> Any:
        return {"x": super().forward(x)}


class Unpacking(RootLoop):
    """Whose blocks those are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting(16) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = block(h)["x"]
        logits = self.head(self.final(h))
        return Output(logits=logits, loss=None if labels is None else F.cross_entropy(logits.mT, labels))


def test_blocks_that_cannot_be_calls_in_a_graph_are_cut_as_ever() -> None:
    model: Any = Wrapper(Unpacking())
    plain = copy.deepcopy(model)
    weft.optimize(model, example_inputs=batch(2, 6), verify=False)
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("rms_norm") == 5 and rules.count("gated_mlp") == 2, str(model.rewrite_report)
    assert_same(outcome(model, batch(3, 5)), outcome(plain, batch(3, 5)))


class Beside(nn.Module):
    """Has parameters of its own, and a chain that ends in a head two levels below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        chain = nn.Sequential(nn.Embedding(VOCABULARY, 16), Block(16), Block(16), nn.Linear(16, VOCABULARY))
        self.inner, self.scale = Wrapper(chain), nn.Linear(VOCABULARY, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale(self.inner(ids))


def test_a_chain_in_what_is_no_wrapper_is_cut_as_ever() -> None:
    roles = {s.path: s.role for s in plan_sites(Beside()).first}
    assert roles["inner.inner"] == roles["inner"] == "opaque"
    assert roles["inner.inner.3"] == roles["inner.inner.1"] == roles[""] == "region"


def test_what_ends_in_a_norm_stays_an_interruption() -> None:
    roles = {s.path: s.role for s in plan_sites(Nested()).first}
    assert roles["stack"] == "opaque" and roles[""] == "region"


class Probing(RootLoop):
    """Runs its blocks inside a transform, in which no graph can call them, and outside of it."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        probe = torch.func.grad(lambda w: F.linear(Stack.forward(self, input_ids).detach(), w).square().mean())
        logits = self.head(Stack.forward(self, input_ids)) + probe(self.head.weight).sum()
        return Output(logits=logits, loss=None if labels is None else F.cross_entropy(logits.mT, labels))


class Mapped(RootLoop):
    """Runs them inside one alone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = torch.vmap(lambda ids: self.head(Stack.forward(self, ids[None])[0]))(input_ids)
        return Output(logits=logits, loss=None if labels is None else F.cross_entropy(logits.mT, labels))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [Probing, Mapped])
def test_where_no_graph_can_call_the_blocks_the_model_is_cut_as_ever(kind: Any) -> None:
    model: Any = kind()
    plain = copy.deepcopy(model)
    weft.optimize(model, example_inputs=batch(2, 6), verify=False)
    report = model.rewrite_report
    if kind is Probing:
        assert any("no graph around the blocks" in note for note in report.notes), str(report)
        assert [r.rule for r in report.rewrites].count("rms_norm") == 5
    for inputs in (batch(2, 6), batch(3, 4)):
        assert_same(outcome(model, inputs), outcome(plain, inputs))
    weft.undo(model)
    assert not any("forward" in vars(m) for m in model.modules())
