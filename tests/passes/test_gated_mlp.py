"""The gate of an MLP, however it is spelt, is one operator; what only looks like one is left alone."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.gated_mlp import FuseGatedMlp

from ..graphs import apply, cases, check, here, normal, record, targets, trace

RULES = [FuseGatedMlp()]
SIZE = 6

RELUS = {
    "clamp": lambda g: g.clamp(min=0),
    "clamp, no bound above": lambda g: torch.clip(g, 0.0, math.inf),
    "clamp_min": lambda g: torch.clamp_min(g, 0),
    "clamp by zeros": lambda g: g.clamp(min=g.new_zeros(())),
    "clamp in place": lambda g: (g * 1.0).clamp_min_(0),
    "maximum": lambda g: torch.maximum(g, torch.zeros_like(g)),
    "maximum, turned": lambda g: torch.maximum(torch.full_like(g, 0), g),
    "max": lambda g: g.max(g.new_zeros(1)),
    "masked": lambda g: g * (g > 0),
    "masked by numbers": lambda g: (g > 0.0).to(g.dtype) * g,
    "masked, turned": lambda g: (g.new_zeros(()) < g).type_as(g) * g,
    "where": lambda g: torch.where(g > 0, g, 0),
    "where, zeros": lambda g: torch.where(torch.greater(g, torch.zeros_like(g)), g, torch.zeros_like(g)),
    "where, method": lambda g: g.where(g > 0, 0.0),
    "where, turned": lambda g: torch.where(g <= 0, 0, g),
    "where, below 0": lambda g: torch.where(g < 0, g.new_zeros(()), g),
    "masked_fill": lambda g: g.masked_fill(g <= 0, 0),
    "masked_fill of the others": lambda g: g.masked_fill(~(g > 0), 0.0),
    "threshold": lambda g: F.threshold(g, 0, 0),
}
"""max(x, 0) by hand. They differ at 0, in the gradient, and in what becomes of NaN and infinity."""
ACTIVATIONS = {
    "silu": F.silu,
    "silu, keyword": lambda g: F.silu(g, inplace=False),
    "silu, by hand": lambda g: g * torch.sigmoid(g),
    "silu, by exp": lambda g: g / (1 + torch.exp(-g)),
    "silu, by hand, turned": lambda g: F.sigmoid(g) * g,
    "silu, expit": lambda g: g * torch.special.expit(g),
    "silu, in place": lambda g: F.silu(g * 1.0, inplace=True),
    "gelu": F.gelu,
    "gelu, tanh": lambda g: F.gelu(g, approximate="tanh"),
    "gelu, by hand": lambda g: g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0))),
    "gelu, by hand, turned": lambda g: 0.5 * g * (1 + torch.erf(g * 0.5**0.5)),
    "gelu, tanh, by hand": lambda g: 0.5 * g * (1.0 + torch.tanh(0.79788456 * (g + 0.044715 * g.pow(3)))),
    "gelu, half behind": lambda g: g * (0.5 * (1 + torch.erf(g / math.sqrt(2)))),
    "gelu, half last": lambda g: g * (1 + torch.special.erf(g * 0.5**0.5)) / 2,
    "gelu, half first": lambda g: 0.5 * (g * (1 + torch.erf(g / math.sqrt(2)))),
    "gelu, two terms": lambda g: 0.5 * g + 0.5 * g * torch.erf(g / 2**0.5),
    "gelu, erfc": lambda g: 0.5 * g * torch.erfc(-g * 2**-0.5),
    "gelu, ndtr": lambda g: g * torch.special.ndtr(g),
    "gelu, tanh, products": lambda g: 0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.044715 * g * g * g))),
    "gelu, tanh, cube": lambda g: g * (0.5 * (1 + torch.tanh(0.7978845608 * (g + 0.044715 * (g * g * g))))),
    "gelu, tanh, factored": lambda g: 0.5 * g * (1 + torch.tanh(g * 0.7978845608 * (1 + 0.044715 * g * g))),
    "gelu, tanh, factored once more": lambda g: g * 0.5 * (torch.tanh(0.7978845608 * (g * (0.044715 * g**2 + 1))) + 1),
    "gelu, tanh, as sigmoid": lambda g: g * torch.sigmoid(1.5957691216 * (g + 0.044715 * g**3)),
    "quick gelu": lambda g: g * torch.sigmoid(1.702 * g),
    "relu": F.relu,
    "relu, method": lambda g: g.relu(),
    "relu, in place": lambda g: (g + 0.0).relu_(),
    "relu²": lambda g: torch.square(F.relu(g)),
    "relu · relu": lambda g: torch.relu(g) * torch.relu(g),
    "relu ** 2": lambda g: F.relu(g) ** 2,
    "relu · itself": lambda g: F.relu(g) * g,
    "relu · itself, turned": lambda g: g * g.relu(),
    **RELUS,
    **{f"({name})²": lambda g, relu=relu: relu(g).square() for name, relu in RELUS.items()},
    "sigmoid": torch.sigmoid,
    "tanh": lambda g: g.tanh(),
}
PACKED = {
    "chunk": lambda x: tuple(x.chunk(2, dim=-1)[i] for i in range(2)),
    "split": lambda x: tuple(torch.split(x, SIZE, dim=-1)[i] for i in range(2)),
    "slices": lambda x: (x[..., :SIZE], x[..., SIZE:]),
    "slices, all dimensions": lambda x: (x[:, :, :SIZE], x[:, :, SIZE : 2 * SIZE]),
    "narrow": lambda x: (x.narrow(-1, 0, SIZE), x.narrow(-1, SIZE, SIZE)),
    "pairs": lambda x: (x[..., ::2], x[..., 1::2]),
    "unflatten": lambda x: tuple(x.unflatten(-1, (SIZE, 2))[..., i] for i in range(2)),
    "unflatten, rows": lambda x: tuple(x.unflatten(-1, (2, SIZE)).unbind(-2)[i] for i in range(2)),
    "unflatten, in front": lambda x: tuple(x.unflatten(-1, (2, SIZE)).movedim(-2, 0)[i] for i in range(2)),
}

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "parts": st.sampled_from(("two tensors", *sorted(PACKED))),
        "gate": st.sampled_from((0, 1)),
        "turned": st.booleans(),
        "widen": st.booleans(),
        "more": st.sampled_from(("nothing", "activated", "gate")),
        "shape": st.sampled_from(((2, 3), (1, 1), (0, 3), (6, 6))),
        "dynamic": st.sampled_from((False, False, True)),
        "grads": st.tuples(st.booleans(), st.booleans()),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes: of one packed tensor, or of two."""

    def gated(x: Any, y: Any) -> Any:
        parts = (x, y) if s["parts"] == "two tensors" else PACKED[s["parts"]](x)
        gate, up = parts[s["gate"]], parts[1 - s["gate"]]
        activated = ACTIVATIONS[s["activation"]](gate.float() if s["widen"] else gate)
        activated = activated.to(s["dtype"]) if s["widen"] else activated
        product = up * activated if s["turned"] else activated * up
        return product if s["more"] == "nothing" else (product, activated if s["more"] == "activated" else gate * 2)

    return gated


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """One packed tensor (the second is unused), or two."""
    size = SIZE if s["parts"] == "two tensors" else 2 * SIZE
    return {n: normal(i, *s["shape"], size, dtype=s["dtype"], grad=s["grads"][i]) for i, n in enumerate("xy")}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    copy = "in place" in s["activation"]  # what is activated is then no part of x
    module, outcome = check(spelt(s), inputs_of(s), RULES, terms=4, dynamic=s["dynamic"])
    operator = "gated_activation" if s["parts"] == "two tensors" or copy else "gated_activation_packed"
    mixed = copy and s["widen"] and s["dtype"] != torch.float32
    assert targets(module).count(operator) == (not mixed), module.graph
    assert not mixed or "not torch" in outcome.refusals[0].reason


NEAR = {
    "gelu by hand, half left out": lambda x, y: x * (1.0 + torch.erf(x / math.sqrt(2.0))) * y,
    "gelu by hand, other constant": lambda x, y: 0.5 * x * (1 + torch.erf(x / 1.5)) * y,
    "gelu by hand, half forgotten": lambda x, y: x * (0.25 * (1.0 + torch.erf(x / math.sqrt(2.0)))) * y,
    "gelu by hand, of another": lambda x, y: x * (0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))) * 2.0,
    "gelu by hand, half taken off": lambda x, y: (0.5 * x - 0.5 * x * torch.erf(x / math.sqrt(2.0))) * y,
    "gelu by hand, erfc of x": lambda x, y: 0.5 * x * torch.erfc(x / math.sqrt(2.0)) * y,
    "gelu by hand, square for cube": lambda x, y: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x))) * y,
    "gelu by hand, other cubic": lambda x, y: 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.045 * x * x))) * y,
    "leaky": lambda x, y: F.leaky_relu(x) * y,
    "relu6": lambda x, y: F.relu6(x) * y,
    "summed": lambda x, y: F.silu(x) + y,
    "divided": lambda x, y: F.silu(x) / y,
    "by a number": lambda x, y: F.silu(x) * 2.0,
    "broadcast": lambda x, y: F.silu(x[..., :1]) * y,
    "broadcast up": lambda x, y: F.silu(x) * y[:1],
    "by itself": lambda x, y: F.relu(x) * x,
    "clamped elsewhere": lambda x, y: x.clamp(min=1) * y + x.clamp(-1, 1) * y + x.clamp(max=0) * y,
    "the larger of others": lambda x, y: torch.maximum(x, torch.ones_like(x)) * y + torch.maximum(x, -x) * y,
    "the larger number": lambda x, y: torch.fmax(x, torch.zeros_like(x)) * y,
    "masked by another": lambda x, y: x * (y > 0) * 2.0 + torch.where(y > 0, x, 0) * 2.0,
    "masked by another, gated": lambda x, y: x * (y > 0) * y,
    "masked at 0 too": lambda x, y: x * (x >= 0) * y + torch.where(x >= 0, x, 0) * y,
    "masked as a product": lambda x, y: x * y * (x > 0),
    "masked as a square": lambda x, y: x**2 * (x > 0) * y + torch.where(x > 0, x**2, 0) * y,
    "masked where it rounds to 0": lambda x, y: x * (x.half() > 0) * y + torch.where(x.half() <= 0, 0, x) * y,
    "another slope": lambda x, y: torch.where(x > 0, x, 0.1 * x) * y + F.threshold(x, 0, 0.5) * y,
    "zeros that broadcast": lambda x, y: torch.maximum(x[..., :1], torch.zeros_like(x)) * y,
    "a mean of values and sizes": lambda x, y: (x + x.abs()) / 2 * y,
}
"""No gates of two tensors of one shape."""


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, SIZE, grad=True), "y": normal(1, 2, 3, SIZE, grad=True)}
    check(NEAR[name], inputs, RULES, count=0, terms=4)


SEVERAL = {
    "another factor of the sigmoid": lambda x, y: x * torch.sigmoid(1.5 * x) * y,
    "two gates of one up": lambda x, y: (F.silu(x) * y, F.gelu(x) * y),
    "a gate of a gate": lambda x, y: F.silu(F.silu(x) * y) * x,
    "both activated": lambda x, y: F.silu(x) * torch.tanh(y),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_what_may_be_read_in_several_ways(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, SIZE, grad=True), "y": normal(1, 2, 3, SIZE, grad=True)}
    _, outcome = check(SEVERAL[name], inputs, RULES, terms=4, verify=True)
    assert outcome.rewrites


@pytest.mark.parametrize("name", ["relu", "relu ** 2", "relu · itself", *RELUS, *(f"({name})²" for name in RELUS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_at_zero_are_those_of_the_spelling(name: str, dtype: torch.dtype) -> None:
    x, y = normal(0, 4, 8, SIZE, dtype=dtype), normal(1, 4, 8, SIZE, dtype=dtype, grad=True)
    inputs = {"x": torch.where(x.abs() < 0.7, torch.copysign(x.new_zeros(()), x), x).requires_grad_(), "y": y}
    check(lambda x, y: ACTIVATIONS[name](x) * y, inputs, RULES, count=1, terms=4, verify="in place" not in name)


@pytest.mark.parametrize("name", ["relu", "relu ** 2", "relu · itself", *RELUS, *(f"({name})²" for name in RELUS)])
def test_nan_and_infinity_go_where_the_spelling_puts_them(name: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, -0.0, 0.0, 2.0])
    x, y = torch.cartesian_prod(special, special).unbind(-1)
    module = trace(lambda x, y: ACTIVATIONS[name](x) * y, {"x": x, "y": y})
    wanted = module(x, y)
    assert apply(module, RULES).rewrites
    torch.testing.assert_close(module(x, y), wanted, equal_nan=True)


def test_zeros_that_are_written_to_are_no_zeros() -> None:
    def gated(x: Any, y: Any) -> Any:
        bound = torch.zeros_like(x)
        record(operator.setitem, bound, 0, 1.5)
        return torch.maximum(x, bound) * y

    inputs = {"x": normal(0, 2, 3, SIZE), "y": normal(1, 2, 3, SIZE)}
    _, outcome = check(gated, inputs, RULES, count=0, terms=4)
    assert "overwrites" in outcome.refusals[0].reason


def test_zeros_that_several_gates_share() -> None:
    """The first gate, of which the second is made, is made of the zeros too."""

    def gated(x: Any, y: Any) -> Any:
        zeros = here(x, torch.zeros, ())
        return torch.maximum(torch.maximum(x, zeros) * y, zeros) * y

    inputs = {"x": normal(0, 2, 3, SIZE, grad=True), "y": normal(1, 2, 3, SIZE, grad=True)}
    module, _ = check(gated, inputs, RULES, count=2, terms=4, verify=True)
    assert targets(module) == ["gated_activation"] * 2


PARTS = {
    "of three": lambda x: (x[..., :4], x[..., 4:8]),
    "overlapping": lambda x: (x[..., :8], x[..., 4:]),
    "turned pairs": lambda x: (x[..., 1:7], x[..., :6]),
    "every third": lambda x: (x[..., ::3], x[..., 1::3]),
    "along another dimension": lambda x: (x[:1], x[1:]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_no_halves_are_two_tensors(name: str) -> None:
    def gated(x: Any) -> Any:
        gate, up = PARTS[name](x)
        return F.silu(gate) * up

    module, _ = check(gated, {"x": normal(0, 2, 3, 12, grad=True)}, RULES, count=1, terms=4)
    assert targets(module).count("gated_activation") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu, erfc", "gelu, tanh, by hand", "relu ** 2", "relu · itself", "sigmoid"]
)
def test_each_activation_is_verified(activation: str, dtype: torch.dtype) -> None:
    inputs = {"x": normal(0, 2, 3, SIZE, dtype=dtype, grad=True), "y": normal(1, 2, 3, SIZE, dtype=dtype, grad=True)}
    _, outcome = check(lambda x, y: ACTIVATIONS[activation](x) * y, inputs, RULES, count=1, terms=4, verify=True)
    assert outcome.rewrites[0].error is not None and outcome.rewrites[0].error <= 1
