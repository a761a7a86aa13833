"""Replay: what is wrong, or rounds worse, is rejected and leaves the graph as it was; what is right passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from weft.rewrite import exact, verify
from weft.rewrite.exact import Float64, sliced_weights, upcast
from weft.rewrite.match import Match
from weft.rewrite.pipeline import Rules
from weft.rewrite.rule import RewriteRule, call
from weft.rewrite.verify import Replayer, small

from ..graphs import apply, described, normal, operations, targets, trace
from .toy import FuseSine, sine_of_square

X = {"x": normal(0, 3, 4, grad=True)}


class _Gradient(torch.autograd.Function):
    """sin(x²) with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return torch.sin(x * x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return dy * torch.cos(x * x) * 2 * x * ctx.factor, None


def wrong_gradient(x: Tensor) -> Tensor:
    """Its forward is right."""
    return _Gradient.apply(x, 1.001)


def right_gradient(x: Tensor) -> Tensor:
    """Spelt out, and right."""
    return _Gradient.apply(x, 1.0)


def lost_gradient(x: Tensor) -> Tensor:
    """Its forward is right; it passes no gradient on."""
    return torch.sin(x.detach() ** 2).requires_grad_(x.requires_grad)


def slightly_off(x: Tensor) -> Tensor:
    """Off by less than a thousandth."""
    return torch.sin(x * x) * 1.0005


def not_a_number(x: Tensor) -> Tensor:
    """NaN in one place."""
    return torch.sin(x * x).masked_fill(x == x.max(), float("nan"))


def in_half(x: Tensor) -> Tensor:
    """Right, but rounded to float16 on the way."""
    return torch.sin((x * x).half().to(x.dtype))


def infinite_where_large(x: Tensor) -> Tensor:
    """sin(x²) by a detour over exp, which overflows where x is large."""
    return torch.sin(x * x) + torch.exp(x * 1e4) * 0


def missing(x: Tensor) -> Tensor:
    """Knows what it would return, and cannot compute it."""
    if not isinstance(x, FakeTensor):
        raise NotImplementedError("no kernel for this device\nand nothing else")
    return torch.sin(x * x)


REPLACEMENTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "right": (sine_of_square, ""),
    "right, with a gradient of its own": (right_gradient, ""),
    "slightly off": (slightly_off, "output 0 is off by"),
    "another sign": (lambda x: -torch.sin(x * x), "output 0 is off by"),
    "wrong gradient": (wrong_gradient, "gradient 0 is off by"),
    "lost gradient": (lost_gradient, "gradient 0 has no gradient"),
    "not a number": (not_a_number, "output 0 is off by nan"),
    "infinite": (infinite_where_large, "output 0 is off by nan"),
    "does not run": (missing, "it does not run by itself: NotImplementedError: no kernel for this device"),
    "less exact": (in_half, "output 0 is off by"),
}


TOO_FINE = ("less exact", "slightly off", "wrong gradient")
"""More than bfloat16 can tell."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in REPLACEMENTS for d in (torch.float32, torch.bfloat16) if n not in TOO_FINE or d == torch.float32],
)
def test_replacements(name: str, dtype: torch.dtype) -> None:
    function, reason = REPLACEMENTS[name]

    class Replace(FuseSine):
        """sin(x²)  →  the replacement"""

        def rewrite(self, m: Match, x: Any) -> Any:
            return call(function, x)

    module = trace(lambda x: torch.sin(x * x) + 1, {"x": normal(0, 3, 4, dtype=dtype, grad=True)})
    before = described(module)
    outcome = apply(module, [Replace()], verify=True)
    if reason:
        assert not outcome.rewrites and reason in outcome.refusals[0].reason, outcome
        assert described(module) == before
        assert len(apply(module, [FuseSine()], verify=True).rewrites) == 1  # the graph is sound for the next rule
    else:
        (rewrite,) = outcome.rewrites
        assert rewrite.error is not None and 0 <= rewrite.error <= 1


@pytest.mark.parametrize("name", ["right", "slightly off", "wrong gradient", "not a number"])
def test_verdicts_are_the_same_where_float64_is_computed_on_the_host(name: str) -> None:
    function, reason = REPLACEMENTS[name]

    class Replace(FuseSine):
        """sin(x²)  →  the replacement"""

        def rewrite(self, m: Match, x: Any) -> Any:
            return call(function, x)

    asked = list[torch.device]()
    for room in (0, 8 * 2 * 12, 8 * 2 * 12 - 1):
        module = trace(lambda x: torch.sin(x * x) + 1, X)
        replays = Replayer(room=lambda device, room=room: asked.append(device) or room)
        outcome = Rules("rules", (Replace(),)).run(module, replays)
        assert bool(outcome.rewrites) == (not reason)
        assert all(reason in refusal.reason for refusal in outcome.refusals)
    assert asked == [torch.device("cpu")] * 3


class Total(RewriteRule):
    """Σ x  →  another sum"""

    name = "total"

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        self.total = total

    def pattern(self, x: Any) -> Any:
        """One number of many."""
        return x.sum()

    def rewrite(self, m: Match, x: Any) -> Any:
        """Summed otherwise."""
        return call(self.total, x)


def in_runs(x: Tensor) -> Tensor:
    """As exact as torch's own sum."""
    return x.view(-1, 5).sum(0).sum()


def slightly_more(x: Tensor) -> Tensor:
    """Off by a little."""
    return x.flatten().cumsum(0)[-1] * (1 + 1e-4) + 1e-4


@pytest.mark.parametrize(("total", "passes"), [(in_runs, 1.0), (slightly_more, 0.0)])
def test_a_single_number_is_not_judged_by_one_lucky_draw(
    total: Callable[[Tensor], Tensor], passes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one draw each of some forty losses would be refused, whose original happens to be exact there."""
    found = {draws: list[bool]() for draws in (1, 8)}
    for draws, results in found.items():
        monkeypatch.setattr(verify, "DRAWS", draws)
        for size in range(2, 62):
            module = trace(lambda x: x.sum() * 2, {"x": normal(size, size, 35)})
            results.append(bool(Rules("rules", (Total(total),)).run(module, Replayer()).rewrites))
    share = {draws: sum(results) / len(results) for draws, results in found.items()}
    assert share[8] == passes and (share[1] < 1.0), share


def test_on_the_host_a_graph_names_no_other_device() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    moved = graph.call_method("to", (graph.call_method("cuda", (x,)), "cuda:0", torch.bfloat16))
    made = graph.call_function(torch.arange, (4,), {"device": torch.device("cuda", 1), "dtype": torch.float32})
    cast = graph.call_method("to", (made,), {"device": "cuda"})
    graph.output(graph.call_function(torch.mul, (graph.call_function(torch.add, (moved, cast)), graph.get_attr("c"))))
    module = fx.GraphModule({"c": torch.tensor(1 / 3, dtype=torch.float64)}, graph)
    given = torch.full((3, 4), 0.1)
    found = Float64(module, on_host=True).run(upcast(given, on_host=True))
    torch.testing.assert_close(found, (given.double() + torch.arange(4)) / 3, rtol=1e-15, atol=0)


def rows_of(weight: Tensor, x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias=bias) + torch.nn.functional.linear(x, weight=other) + other.sum()


@pytest.mark.parametrize("on_host", [False, True])
def test_a_frozen_weight_is_widened_slice_by_slice(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "SLICE", 3 * 5)  # three rows
    given = [normal(0, 7, 5), normal(1, 2, 4, 5, grad=True), normal(2, 7, grad=True), normal(3, 7, 5)]
    module = fx.symbolic_trace(rows_of)
    sliced = sliced_weights(module.graph, given)
    assert sliced == [True, False, False, False]  # the other one is read in another way, too
    assert sliced_weights(module.graph, [given[0].requires_grad_(), *given[1:]]) == [False] * 4
    given[0].requires_grad_(False)

    widened: list[Any] = []
    monkeypatch.setattr(Tensor, "double", lambda t: widened.append(t.shape) or t.to(torch.float64))
    wide = [i.detach().double() for i in given]
    narrow = [i if s else w.requires_grad_(i.requires_grad) for i, w, s in zip(given, wide, sliced, strict=True)]
    widened.clear()
    y = Float64(module, on_host).run(*narrow)
    dy = normal(4, *y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, narrow[1:3], dy)
    assert widened == [(3, 5), (3, 5), (1, 5)] * 2

    truth = rows_of(*(same := [w.clone().requires_grad_(w.requires_grad) for w in wide]))
    torch.testing.assert_close(y, truth, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, torch.autograd.grad(truth, same[1:3], dy), rtol=1e-13, atol=1e-13)


def test_without_replay_nothing_is_rejected() -> None:
    class Wrong(FuseSine):
        """sin(x²)  →  something else"""

        def rewrite(self, m: Match, x: Any) -> Any:
            return call(slightly_off, x)

    module = trace(lambda x: torch.sin(x * x), X)
    (rewrite,) = apply(module, [Wrong()], verify=False).rewrites
    assert rewrite.error is None and targets(module) == ["slightly_off"]


def test_equal_changes_are_replayed_once() -> None:
    def function(x: Any, y: Any) -> Any:
        return torch.sin(x * x) + torch.sin(y * y)

    module = trace(function, {"x": normal(0, 3, 4), "y": normal(1, 3, 4)})
    replays = Replayer()
    assert len(Rules("rules", (FuseSine(),)).run(module, replays).rewrites) == 2
    assert len(replays.seen) == 1
    module = trace(lambda x: torch.sin(x * x), {"x": normal(0, 3, 4, dtype=torch.float16)})
    Rules("rules", (FuseSine(),)).run(module, replays)
    assert len(replays.seen) == 2  # of another dtype it is another change


def test_a_value_that_is_computed_twice_is_one_value() -> None:
    """One of the two is an input of the match, and the other is computed inside it from what stands before both."""
    module = trace(lambda x: torch.sin(torch.exp(x + 1) * torch.exp(x + 1)), X)
    (rewrite,) = Rules("rules", (FuseSine(),)).run(module, Replayer()).rewrites
    assert rewrite.error is not None and rewrite.error <= 1
    assert targets(module) == ["add", "exp", "sine_of_square"]


def test_parameters_are_replayed_with_their_values() -> None:
    """A replacement that holds only for what a weight really is."""

    class Assume(FuseSine):
        """sin(x²) = sin 1  where x = 1"""

        def rewrite(self, m: Match, x: Any) -> Any:
            return call(assumed, x)

    for value, holds in ((1.0, True), (1.5, False)):
        module = trace(lambda x: torch.sin(x * x), {"x": torch.full((3, 4), value)})
        placeholder = next(n for n in module.graph.nodes if n.op == "placeholder")
        replays = Replayer({placeholder: torch.full((3, 4), value)})
        assert bool(Rules("rules", (Assume(),)).run(module, replays).rewrites) == holds


def assumed(x: Tensor) -> Tensor:
    """sin 1 everywhere."""
    return torch.full_like(x, 0.8414709848078965)


def test_sizes_that_are_symbols_are_replayed_small() -> None:
    module = trace(lambda x: torch.sin(x * x), {"x": normal(0, 500, 3, 4)}, dynamic=True)
    fake = next(iter(module.graph.nodes)).meta["val"]
    assert small(fake.shape[0]) == 64 and small(fake.shape[1]) == 3 and small(fake.shape[2]) == 4
    generator = torch.Generator().manual_seed(0)
    assert Replayer().example(next(iter(module.graph.nodes)), generator).shape == (64, 3, 4)
    assert len(apply(module, [FuseSine()], verify=True).rewrites) == 1


def test_drawn_inputs_have_the_layout_of_what_they_stand_for() -> None:
    def function(x: Any) -> Any:
        return torch.sin(x.transpose(0, 1) * x.transpose(0, 1))

    module = trace(function, X)
    transposed = list(module.graph.nodes)[1]
    drawn = Replayer().example(transposed, torch.Generator().manual_seed(0))
    assert drawn.shape == (4, 3) and drawn.stride() == transposed.meta["val"].stride() and drawn.requires_grad


def test_empty_tensors_replay() -> None:
    module = trace(lambda x: torch.sin(x * x), {"x": torch.zeros(0, 4, requires_grad=True)})
    (rewrite,) = apply(module, [FuseSine()], verify=True).rewrites
    assert rewrite.error == 0 and operations(module) == 1


def test_replaying_neither_draws_from_nor_disturbs_the_model() -> None:
    state, mode = torch.random.get_rng_state(), torch.is_grad_enabled()
    module = trace(lambda x: torch.sin(x * x), X)
    apply(module, [FuseSine()], verify=True)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled() == mode
    assert X["x"].grad is None
