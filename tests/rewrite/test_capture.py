"""Models of every build: what is captured, how often, and that they compute what they computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import weft
from weft.rewrite.errors import CaptureError
from weft.rewrite.regions import find_blocks, plan_sites

SIZE = 8


class Norm(nn.Module):
    """RMSNorm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(SIZE) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain


class Block(nn.Module):
    """A norm and a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.back = Norm(), nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        return x + self.back(F.silu(gate) * up)


class Other(Block):
    """Of another class, with other weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.tanh(self.back(self.norm(x)))


class Base(nn.Module):
    """Blocks and a head."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks, self.head = blocks, nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Inside(Base):
    """The loop stands in a module of its own."""

    def __init__(self, blocks: Any) -> None:
        super().__init__(None)
        self.body = Base(blocks)
        self.body.head = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class Twice(Base):
    """Every block runs twice, in another order."""

    def forward(self, x: Tensor) -> Any:
        for block in [*self.blocks, *reversed(self.blocks)]:
            x = block(x)
        return self.head(x)


class Called(Base):
    """``nn.Sequential`` called as one."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.blocks(x))


class ByName(Base):
    """Blocks in a ``ModuleDict``."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"one": Block(), "two": Block()}))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.blocks["two"](self.blocks["one"](x)))


class Sized(Block):
    """Returns a tuple of its result and a number that its input settles."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.shape[0]


class Tuples(Base):
    """Blocks that return tuples."""

    def forward(self, x: Tensor) -> Any:
        total = 0
        for block in self.blocks:
            x, count = block(x)
            total += count
        return self.head(x), total


class Widening(Block):
    """Every block returns a longer sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x), x[:, :1]), 1)


class Branching(Block):
    """What it computes depends on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return self.norm(x) * 2


class Printing(Block):
    """Something in it cannot be captured."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        assert str(float(y.detach().abs().max())) != "nan"
        return super().forward(y)


class Options(Block):
    """Takes its inputs by keyword, some of them in containers."""

    def forward(self, x: Tensor, *, scale: float = 1.0, extra: Any = None, flags: Any = ()) -> Tensor:
        y = super().forward(x * scale)
        y = y + extra["more"][0] if extra is not None else y
        return y if "negative" not in flags else -y


class Calling(Base):
    """Calls its blocks in different ways."""

    def forward(self, x: Tensor) -> Any:
        first, second, third = self.blocks
        x = first(x, scale=0.5)
        x = second(x, extra={"more": [x * 2]}, flags=("negative",))
        return self.head(third(x=x))


class Result(NamedTuple):
    """A result with names."""

    out: Tensor
    hidden: list[Tensor]


class Collecting(Base):
    """Returns what every block computed."""

    def forward(self, x: Tensor) -> Any:
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        return Result(self.head(x), hidden)


class Wide(Base):
    """In float64."""

    def __init__(self) -> None:
        super().__init__(blocks(Block, 2))
        self.double()

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.double())


class Buffered(Block):
    """Counts its calls, and keeps the mean of what it saw in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SIZE))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return super().forward(x) - self.mean


def blocks(kind: type[nn.Module], count: int) -> nn.ModuleList:
    """A list of equal blocks."""
    return nn.ModuleList(kind() for _ in range(count))


def shared() -> nn.ModuleList:
    """One block that stands twice."""
    block = Block()
    return nn.ModuleList((block, Block(), block))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "loop in the root": (lambda: Base(blocks(Block, 4)), 4, 3),
    "loop inside": (lambda: Inside(blocks(Block, 4)), 4, 4),
    "alternating classes": (lambda: Base(nn.ModuleList([Block(), Other(), Block(), Other()])), 4, 4),
    "one of its class": (lambda: Base(nn.ModuleList([Block(), Other(), Block()])), 3, 4),
    "sequential in a loop": (lambda: Base(nn.Sequential(Block(), Block())), 2, 3),
    "sequential called": (lambda: Called(nn.Sequential(Block(), Block())), 2, 3),
    "by name": (ByName, 2, 3),
    "blocks called twice": (lambda: Twice(blocks(Block, 3)), 3, 3),
    "a block that stands twice": (lambda: Base(shared()), 2, 3),
    "tuples": (lambda: Tuples(blocks(Sized, 3)), 3, 3),
    "growing": (lambda: Base(blocks(Widening, 3)), 3, 3),
    "branching": (lambda: Base(blocks(Branching, 2)), 2, 0),
    "interrupted": (lambda: Inside(blocks(Printing, 2)), 2, 0),
    "keywords": (lambda: Calling(blocks(Options, 3)), 3, 0),
    "collecting": (lambda: Collecting(blocks(Block, 3)), 3, 3),
    "alone": (Block, 1, 1),
    "float64": (Wide, 2, 3),
    "counting": (lambda: Inside(blocks(Buffered, 3)), 3, 0),
}
"""Each with the number of its norms, all of which are rewritten, and of the graphs that are captured for it, where settled:
one for the first block, whose input needs no gradient, one for all others of its class, and one for what is around them."""


def results(model: nn.Module, x: Tensor) -> list[Any]:
    """What it returns, and every gradient and buffer."""
    model.zero_grad()
    found = tree_leaves(model(x))
    tensors = [f for f in found if isinstance(f, Tensor)]
    if torch.is_grad_enabled():
        torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])
    kept = [p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()]
    return [*found, *(k for k in kept if k is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_build(name: str) -> None:
    make, norms, graphs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    plain, x = copy.deepcopy(model), torch.randn(2, 5, SIZE)
    weft.optimize(model, example_inputs={"x": x})
    report = model.rewrite_report
    places = [r.module_path for r in report.rewrites if r.rule == "rms_norm"]
    assert len(set(places)) == norms, str(report)
    assert set(places) <= {path for path, _ in model.named_modules()}
    captured = [g.region for g in report.graphs if g.region.nodes_before]
    assert not graphs or len({id(r) for r in captured}) <= graphs, [(r.paths, r.nodes_before) for r in captured]
    x = torch.randn(3, 7, SIZE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(results(model, x), results(plain, x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(results(model, -x[:1]), results(plain, -x[:1]), rtol=2e-5, atol=2e-5)
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(results(model, x), results(plain, x), rtol=2e-5, atol=2e-5)
    assert [vars(m).get("calls") for m in model.modules()] == [vars(m).get("calls") for m in plain.modules()]
    weft.undo(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("make", [Base, Inside])
def test_capture_costs_the_same_for_many_layers(make: Any) -> None:
    counts = []
    for layers in (2, 9):
        model = make(blocks(Block, layers))
        weft.optimize(model, example_inputs={"x": torch.randn(2, 5, SIZE)}, verify=False)
        counts.append(len(model.rewrite_report.graphs))
        assert sum(r.rule == "rms_norm" for r in model.rewrite_report.rewrites) == layers
    assert counts[0] == counts[1] <= 4


class Narrowing(Block):
    """Its result has the type of its input only as long as the input is short."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[1] < 10 else y[:, :10]


def test_a_block_that_breaks_what_its_capture_rests_on() -> None:
    """The graph around the blocks takes a result for like the input: a call that shows otherwise is refused, not mangled."""
    model = Base(blocks(Narrowing, 2))
    plain = copy.deepcopy(model)
    weft.optimize(model, example_inputs={"x": torch.randn(2, 5, SIZE)})
    with pytest.raises(CaptureError, match=r"Narrowing returned a tensor unlike its input.* undo\(\)"):
        model(torch.randn(2, 12, SIZE))
    x = torch.randn(2, 6, SIZE)
    torch.testing.assert_close(results(model, x), results(plain, x), rtol=2e-5, atol=2e-5)
    weft.undo(model)
    x = torch.randn(2, 12, SIZE)
    assert torch.equal(model(x), plain(x))


def test_blocks_are_found_by_structure() -> None:
    model = Inside(nn.ModuleList([Block(), Other(), Block(), nn.Identity()]))
    assert list(find_blocks(model))[:1] == ["body.blocks.0"] and "body.blocks.3" not in find_blocks(model)
    assert not find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))  # a list of linears is no list of blocks
    nested = nn.ModuleList([Base(blocks(Block, 2)), Base(blocks(Block, 2))])
    assert list(find_blocks(nested)) == ["0", "1"]  # the outermost


def test_models_of_one_class_do_not_spoil_each_other() -> None:
    """Dynamo gives up the root's code where it meets an interruption in its loop; for other models it must look again."""
    first, spoiling, second = Base(blocks(Block, 2)), Base(nn.Sequential(Block(), Block())), Base(blocks(Block, 2))
    x = torch.randn(2, 5, SIZE)
    for model in (first, spoiling, second):
        weft.optimize(model, example_inputs={"x": x}, verify=False)
    wanted = [["blocks.0", "blocks.1"], [""]]
    assert [r.paths for r in second.rewrite_report.regions] == wanted
    first(x)
    assert [r.paths for r in first.rewrite_report.regions] == wanted


def test_every_module_is_replaced_once() -> None:
    plan = plan_sites(Base(shared()))
    sites = [*plan.first, *([plan.root] if plan.root else []), *plan.instead]
    assert len({id(s.module) for s in plan.first}) == len(plan.first)
    assert sites and len({s.path for s in sites}) == len(sites)


def test_two_threads_run_one_optimized_model() -> None:
    import threading

    model = Inside(blocks(Block, 2))
    plain = copy.deepcopy(model)
    weft.optimize(model, example_inputs={"x": torch.randn(2, 5, SIZE)})
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = model(torch.full((1, 3 + i, SIZE), 0.1 * (i + 1)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        with torch.no_grad():
            torch.testing.assert_close(found[i], plain(torch.full((1, 3 + i, SIZE), 0.1 * (i + 1))))


def test_dynamos_settings_are_given_back() -> None:
    from weft.rewrite.dynamo_settings import DYNAMO_SETTINGS

    config = torch._dynamo.config
    before = {name: getattr(config, name) for name in DYNAMO_SETTINGS}
    model = Inside(blocks(Block, 2))
    weft.optimize(model, example_inputs={"x": torch.randn(2, 5, SIZE)})
    model(torch.randn(2, 5, SIZE))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, SIZE + 1))
    assert {name: getattr(config, name) for name in DYNAMO_SETTINGS} == before


def test_a_model_of_the_users_own_that_is_compiled_beside() -> None:
    """torch.compile elsewhere in the process is not disturbed, and does not disturb."""
    model, other = Inside(blocks(Block, 2)), torch.compile(Base(blocks(Block, 2)), backend="eager")
    plain, x = copy.deepcopy(model), torch.randn(2, 5, SIZE)
    wanted = other(x)
    weft.optimize(model, example_inputs={"x": x})
    assert torch.equal(other(x), wanted)
    torch.testing.assert_close(model(x), plain(x))
