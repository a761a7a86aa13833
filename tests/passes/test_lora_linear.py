"""A linear and its low-rank update, however they are spelt, are one operator; what only looks like one is left alone."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.kernels.lora_linear import lora_linear
from weft.passes.lora_linear import FuseLoraLinear

from ..graphs import apply as rewrite
from ..graphs import cases, check, computed, copied, normal, record, targets, trace

RULES = [FuseLoraLinear()]
IN, OUT, RANK = 6, 10, 2

BASES = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear, bias": lambda x, w, b: F.linear(x, w, b),
    "keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "@ transposed": lambda x, w, b: x @ w.T,
    "matmul t": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "transpose(0, 1)": lambda x, w, b: b + x.matmul(w.transpose(0, 1)),
}
COLUMNS = {
    "x @ W": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w) + b,
    "addmm of rows": lambda x, w, b: torch.addmm(b, x.reshape(-1, IN), w).view(SHAPES[0] + (OUT,)),
}
"""Of a weight stored as (in, out)."""
SHAPES = ((2, 3), (1, 1), (4,), (0, 3))
PRODUCTS = {
    "F.linear": lambda x, m: F.linear(x, m),
    "@": lambda x, m: x @ m.T,
    "t": lambda x, m: torch.matmul(x, m.t()),
}
SCALES = {
    "after": lambda x, a, b, p: p(p(x, a), b) * 0.5,
    "after, turned": lambda x, a, b, p: 0.5 * p(p(x, a), b),
    "between": lambda x, a, b, p: p(p(x, a) * 2, b),
    "before": lambda x, a, b, p: p(p(x * 1.5, a), b),
    "none": lambda x, a, b, p: p(p(x, a), b),
    "negative": lambda x, a, b, p: -2.0 * p(p(x, a), b),
    "negative between": lambda x, a, b, p: p(p(x, a) * -2, b),
    "divided": lambda x, a, b, p: p(p(x, a), b) / 3,
    "multiplied and divided": lambda x, a, b, p: p(p(x, a), b) * 16 / 3,
    "divided between": lambda x, a, b, p: p(p(x, a) / 3, b),
    "divided before": lambda x, a, b, p: p(p(x / 3, a), b),
    "the first factor": lambda x, a, b, p: p(p(x, a * 0.5), b),
    "the second factor": lambda x, a, b, p: p(p(x, a), b / -4),
    "tensor": lambda x, a, b, p: p(p(x, a), b) * a.new_full((), 0.5),
    "tensor between": lambda x, a, b, p: p(a.new_full((), 0.5) * p(x, a), b),
    "tensor before": lambda x, a, b, p: p(p(x * a.new_full((), 0.5), a), b),
    "tensor of another dtype": lambda x, a, b, p: a.new_full((), 0.3, dtype=torch.float64) * p(p(x, a), b),
    "divided by a tensor": lambda x, a, b, p: p(p(x, a), b) / a.new_full((), 3.0),
    "divided by a tensor between": lambda x, a, b, p: p(p(x, a) / a.new_full((), 3.0), b),
    "multiplied, divided by a tensor": lambda x, a, b, p: 2.0 * p(p(x, a), b) / a.new_full((), 3),
    "divided by a tensor, multiplied": lambda x, a, b, p: p(p(x, a), b) / a.new_full((), 3) * 2.0,
    "negative tensor": lambda x, a, b, p: -a.new_full((), 0.5) * p(p(x, a), b),
    "DoRA": lambda x, a, b, p: p(b.new_ones(1, RANK), b) * p(p(x, a), b) * 0.5,
    "VeRA": lambda x, a, b, p: p(p(x, a) * p(a.new_ones(1, IN), a), b) * 0.5,
}
SUMS = {
    "y + u": lambda y, u: y + u,
    "u + y": lambda y, u: torch.add(u, y),
    "y += u": lambda y, u: record(operator.iadd, y, u),
    "y.add_(u)": lambda y, u: y.add_(u),
    "y - u": lambda y, u: y - u,
    "y + -u": lambda y, u: -u + y,
    "sub": lambda y, u: torch.sub(y, u),
    "y -= u": lambda y, u: record(operator.isub, y, u),
}
IN_PLACE = ("y += u", "y.add_(u)", "y -= u")

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "adapter_dtype": st.sampled_from(("same", "float32")),
        "base": st.sampled_from((*sorted(BASES), *sorted(COLUMNS))),
        "columns": st.booleans(),
        "product": st.sampled_from(sorted(PRODUCTS)),
        "scale": st.sampled_from(sorted(SCALES)),
        "sum": st.sampled_from(sorted(SUMS)),
        "adapters": st.sampled_from((1, 1, 1, 2)),
        "own": st.booleans(),
        "more": st.sampled_from(("nothing", "low", "update")),
        "shape": st.sampled_from(SHAPES),
        "grads": st.tuples(*[st.booleans()] * 4),
        "dynamic": st.booleans(),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes; ``z`` is what the adapter reads where it is not x."""

    def linear(x: Any, z: Any, w: Any, bias: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        y = (BASES | COLUMNS)[s["base"]](x, w, bias)
        read = z if s["own"] else x
        low = read.to(torch.float32) if s["adapter_dtype"] == "float32" else read
        product = (lambda t, m: t @ m) if s["columns"] else PRODUCTS[s["product"]]
        update = SCALES[s["scale"]](low, a, b, product)
        more = product(low, a) if s["more"] == "low" else update
        for u in (update, SCALES[s["scale"]](low, c, d, product))[: s["adapters"]]:
            y = SUMS[s["sum"]](y, u)
        y = y.to(s["dtype"])
        return y if s["more"] == "nothing" else (y, more)

    return linear


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """x, z, a base and two adapters."""
    kind = torch.float32 if s["adapter_dtype"] == "float32" else s["dtype"]
    shape = SHAPES[0] if "addmm" in s["base"] else s["shape"]
    gx, gw, ga, gb = s["grads"]
    x, z = (normal(i, *shape, IN, dtype=s["dtype"], grad=gx) for i in range(2))
    sizes = (IN, OUT) if s["base"] in COLUMNS else (OUT, IN)
    turn = (lambda m: m.detach().t().contiguous().requires_grad_(m.requires_grad)) if s["columns"] else (lambda m: m)
    factors = {n: turn(normal(i, RANK, IN, dtype=kind, grad=ga)) for i, n in ((4, "a"), (6, "c"))}
    factors |= {n: turn(normal(i, OUT, RANK, dtype=kind, grad=gb)) for i, n in ((5, "b"), (7, "d"))}
    w, bias = normal(2, *sizes, dtype=s["dtype"], grad=gw), normal(3, OUT, dtype=s["dtype"], grad=gb)
    return {"x": x, "z": z, "w": w, "bias": bias} | {n: factors[n] for n in "abcd"}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, terms=4 * IN, dynamic=s["dynamic"] and "addmm" not in s["base"])
    names = targets(module)
    if "addmm" in s["base"] and s["sum"] in IN_PLACE:  # written into a view, whose base others may read
        assert "lora_linear" not in names and "lora_update" not in names
    else:
        assert names.count("lora_linear") == 1 and names.count("lora_update") == s["adapters"] - 1, module.graph


NEAR = {
    "a scale of another dtype": lambda x, w, a, b, s: F.linear(x, w) + F.linear(F.linear(x, a), b) * s.bfloat16(),
    "a scale for each row": lambda x, w, a, b, s: F.linear(x, w) + F.linear(F.linear(x, a), b) * x[..., :1],
    "a scale of another dtype that divides": lambda x, w, a, b, s: (
        F.linear(x, w) - F.linear(F.linear(x, a), b) / s.bfloat16()
    ),
    "taken off the update": lambda x, w, a, b, s: F.linear(F.linear(x, a), b) - F.linear(x, w),
    "a scale that is divided": lambda x, w, a, b, s: F.linear(x, w) + s / F.linear(F.linear(x, a), b),
    "rounded": lambda x, w, a, b, s: F.linear(x, w) - torch.div(F.linear(F.linear(x, a), b), 3, rounding_mode="floor"),
    "activated between": lambda x, w, a, b, s: F.linear(x, w) + F.linear(F.relu(F.linear(x, a)), b),
    "one product": lambda x, w, a, b, s: F.linear(x, w) + F.linear(x, w),
    "a merged update of full rank": lambda x, w, a, b, s: F.linear(x, w + w @ (a.T @ a)),
    "a merged update with a scale for each row": lambda x, w, a, b, s: F.linear(x, w + (b @ a) * w[:, :1]),
    "a merged update that the weight is taken off": lambda x, w, a, b, s: F.linear(x, b @ a - w),
    "an adapter of full rank in one matrix": lambda x, w, a, b, s: F.linear(x, w) + F.linear(x, w @ (a.T @ a)),
    "one matrix that something is taken off": lambda x, w, a, b, s: F.linear(x, b @ a) - F.linear(x, w),
    "one matrix alone": lambda x, w, a, b, s: F.linear(x, b @ a) * 2.0,
    "another adapter for each row": lambda x, w, a, b, s: F.linear(x, w) + torch.bmm(x, x.mT @ x) @ a.T @ b.T[:, :1],
    "broadcast": lambda x, w, a, b, s: F.linear(x[:1], w) * 1.0 + F.linear(F.linear(x, a), b),
    "broadcast, taken off": lambda x, w, a, b, s: F.linear(x[:1], w) * 1.0 - F.linear(F.linear(x, a), b),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True), "s": normal(4, 1)}
    _, outcome = check(NEAR[name], inputs, RULES, count=0, terms=4 * IN)
    assert "another dtype" not in name or "dtype" in outcome.refusals[0].reason
    assert "broadcast" not in name or "broadcast" in outcome.refusals[0].reason


MERGED = {
    "W + BA": lambda x, w, a, b, c: F.linear(x, w + b @ a, c),
    "W + sBA": lambda x, w, a, b, c: F.linear(x, w + 0.5 * (b @ a), c),
    "W - sBA": lambda x, w, a, b, c: F.linear(x, w - 0.5 * (b @ a), c),
    "W - BA/d": lambda x, w, a, b, c: F.linear(x, w - (b @ a) / 3, c),
    "W + tBA": lambda x, w, a, b, c: F.linear(x, w + b.new_full((), 0.5) * (b @ a), c),
    "W - BA/t": lambda x, w, a, b, c: F.linear(x, w - (b @ a) / b.new_full((), 3.0), c),
    "BA/d·s + W": lambda x, w, a, b, c: torch.matmul(x, ((b @ a) / 4 * 2 + w).t()) + c,
    "einsum": lambda x, w, a, b, c: torch.einsum("...i,oi->...o", x, w + (b @ a) * 2),
    "addmm": lambda x, w, a, b, c: F.linear(x, torch.addmm(w, b, a, alpha=0.5), c),
    "(Wᵀ + AᵀBᵀ)": lambda x, w, a, b, c: x @ (w.T + a.T @ b.T * 0.5) + c,
    "W + (AᵀBᵀ)ᵀ": lambda x, w, a, b, c: F.linear(x, w + (a.T @ b.T).T * 0.5, c),
    "W + (s·AᵀBᵀ)ᵀ": lambda x, w, a, b, c: F.linear(x, w + (0.5 * (a.T @ b.T)).T, c),
    "(Wᵀ - (BA)ᵀ)": lambda x, w, a, b, c: x @ (w.T - (b @ a).T),
    "y + x(BA)ᵀ": lambda x, w, a, b, c: F.linear(x, w, c) + F.linear(x, b @ a) * 0.5,
    "y - x(AᵀBᵀ)": lambda x, w, a, b, c: F.linear(x, w, c) - x @ (a.T @ b.T) / 3,
    "x(BA)ᵀ + y": lambda x, w, a, b, c: torch.matmul(x, (b @ a).T) + x @ w.T,
}
"""The adapter is added to the weight, whose copy is then multiplied with x."""


@pytest.mark.parametrize("name", MERGED)
def test_adapters_merged_in_the_graph(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True), "c": normal(4, OUT)}
    module, _ = check(MERGED[name], inputs, RULES, count=1, terms=4 * IN, verify=True)
    assert "linear" not in targets(module) and "matmul" not in targets(module), module.graph


TOGETHER = {
    "baddbmm": lambda x, w, a, b, c: torch.baddbmm(F.linear(x, w, c), x @ a.T, b.T.expand(2, -1, -1), alpha=0.5),
    "baddbmm, repeated": lambda x, w, a, b, c: torch.baddbmm(
        F.linear(x, w), torch.bmm(x, a.T.unsqueeze(0).repeat(2, 1, 1)), b.T[None].repeat(2, 1, 1), beta=1.0
    ),
    "bmm": lambda x, w, a, b, c: F.linear(x, w) + torch.bmm(x @ a.T, b.T.expand(2, -1, -1)),
    "einsum of three": lambda x, w, a, b, c: F.linear(x, w, c) + torch.einsum("bti,ri,or->bto", x, a, b) * 2,
    "einsum of three, turned": lambda x, w, a, b, c: F.linear(x, w, c) + torch.einsum("...i,or,ri->...o", x, b, a),
    "bias in the update": lambda x, w, a, b, c: F.linear(x, w) + F.linear(F.linear(x, a), b, c),
}
"""More than one product, or sum, in one operation."""


@pytest.mark.parametrize("name", TOGETHER)
def test_operations_that_do_more_than_one_thing(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True), "c": normal(4, OUT, grad=True)}
    module, _ = check(TOGETHER[name], inputs, RULES, count=1, terms=4 * IN, verify=True)
    assert targets(module)[-1] == "lora_linear" and not {"bmm", "linear", "einsum"} & set(targets(module)), module.graph


BIASED = {
    "of B": lambda x, w, a, b, c, d, e: F.linear(x, w, c) + F.linear(F.linear(x, a), b, e) * 0.5,
    "of B, not scaled": lambda x, w, a, b, c, d, e: F.linear(x, w, c) + (F.linear(x, a) @ b.T + e),
    "of B, taken off": lambda x, w, a, b, c, d, e: F.linear(x, w, c) - 2 * F.linear(F.linear(x, a), b, e),
    "of both": lambda x, w, a, b, c, d, e: F.linear(x, w, c) + F.linear(F.linear(x, a, d), b, e) * 3.0,
    "of both, no bias of the base": lambda x, w, a, b, c, d, e: F.linear(F.linear(x, a, d), b, e) / 3 + F.linear(x, w),
    "of both, columns": lambda x, w, a, b, c, d, e: x @ w.T + ((x @ a.T + d) @ b.T.contiguous() + e) * 2,
    "scaled by a tensor": lambda x, w, a, b, c, d, e: (
        F.linear(x, w, c) - F.linear(F.linear(x, a, d), b, e) * a.new_full((), 0.5)
    ),
    "divided by a tensor": lambda x, w, a, b, c, d, e: (
        F.linear(x, w) + F.linear(F.linear(x, a), b, e) / a.new_full((), 3.0)
    ),
    "scaled for each feature": lambda x, w, a, b, c, d, e: (
        F.linear(x, w, c) + F.linear(F.linear(x, a, d), b, e) * (c + 1)
    ),
    "scaled by a row": lambda x, w, a, b, c, d, e: (
        F.linear(x, w) - F.linear(F.linear(x, a), b, e) * F.linear(b.new_ones(1, 1, RANK), b)
    ),
    "of another product": lambda x, w, a, b, c, d, e: x.tanh() @ w.T[:, :1] + F.linear(F.linear(x, a, d), b, e) * 0.5,
    "of another base": lambda x, w, a, b, c, d, e: F.linear(x, w).tanh() + F.linear(F.linear(x, a, d), b, e) * 0.5,
}
"""Biases of the adapter."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BIASED)
def test_biases_of_the_adapter(name: str, dtype: torch.dtype) -> None:
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True), "c": normal(4, OUT)}
    inputs |= {"d": normal(5, RANK, grad=True), "e": normal(6, OUT, grad=True)}
    inputs = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in inputs.items()}
    module, outcome = check(BIASED[name], inputs, RULES, terms=4 * IN, verify=True)
    assert len(outcome.rewrites) == (name != "of another product"), (module.graph, outcome.refusals)


def test_two_linears_with_biases_that_are_no_narrower_between() -> None:
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "a": normal(1, IN, IN), "b": normal(2, IN, IN), "d": normal(3, IN)}
    check(lambda x, a, b, d: x + F.linear(F.linear(x, a, d), b, d), inputs, RULES, count=0, terms=4 * IN)


def test_two_adapters_that_share_a_factor() -> None:
    """What the second adapter is added to is computed from the product that both read."""

    def linear(x: Any, w: Any, a: Any, b: Any, d: Any) -> Any:
        low = F.linear(x, a)
        return F.linear(x, w) + F.linear(low, b) * 0.5 + F.linear(low, d) * 2

    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True), "d": normal(4, OUT, RANK, grad=True)}
    module, _ = check(linear, inputs, RULES, count=2, terms=4 * IN, verify=True)
    assert targets(module) == ["lora_linear", "lora_update"]


EINSUMS = {
    "named": lambda t, m: torch.einsum("bti,oi->bto", t, m),
    "an ellipsis": lambda t, m: torch.einsum("... i, o i -> ... o", t, m),
    "columns": lambda t, m: torch.einsum("bti,io->bto", t, m.t()),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_products_by_einsum(name: str) -> None:
    product = EINSUMS[name]
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True)}
    linear = lambda x, w, a, b: product(x, w) + 0.5 * product(product(x, a), b)  # noqa: E731
    check(linear, inputs, RULES, count=1, terms=4 * IN, verify=True)


def test_an_update_taken_off_twice_as_large() -> None:
    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True)}
    linear = lambda x, w, a, b: torch.sub(F.linear(x, w), F.linear(F.linear(x, a) / 3, b), alpha=2)  # noqa: E731
    module, _ = check(linear, inputs, RULES, count=1, terms=4 * IN, verify=True)
    scale = next(n for n in module.graph.nodes if n.target is lora_linear).args[6]
    assert scale == pytest.approx(-2 / 3)


def test_batched_factors_are_refused() -> None:
    inputs = {
        "x": normal(0, 2, 3, IN),
        "w": normal(1, OUT, IN),
        "a": normal(2, 2, IN, RANK),
        "b": normal(3, 2, RANK, OUT),
    }
    check(lambda x, w, a, b: F.linear(x, w) + x @ a @ b, inputs, RULES, count=0, terms=4 * IN)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_the_adapter_draws_what_it_drew(training: bool) -> None:
    def linear(x: Any, w: Any, a: Any, b: Any) -> Any:
        return F.linear(x, w) + F.linear(F.linear(F.dropout(x, 0.5, training), a), b) * 0.5

    inputs = {"x": normal(0, 2, 3, IN, grad=True), "w": normal(1, OUT, IN), "a": normal(2, RANK, IN, grad=True)}
    inputs |= {"b": normal(3, OUT, RANK, grad=True)}
    module = trace(linear, inputs)
    original = copied(module)
    assert len(rewrite(module, RULES, verify=True).rewrites) == 1
    assert targets(module) == ["dropout", "lora_linear"]
    torch.manual_seed(5)
    wanted = computed(original, inputs)
    torch.manual_seed(5)
    for name, found in computed(module, inputs).items():
        torch.testing.assert_close(found, wanted[name], msg=name)


def test_dropouts_of_two_adapters_stay_two() -> None:
    def linear(x: Any, w: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        y = F.linear(x, w)
        y = y + F.linear(F.linear(F.dropout(x, 0.5, True), a), b) * 0.5
        return y + F.linear(F.linear(F.dropout(x, 0.5, True), c), d) * 0.5

    inputs = {n: normal(i, *size, grad=True) for i, (n, size) in enumerate(
        {"x": (2, 3, IN), "w": (OUT, IN), "a": (RANK, IN), "b": (OUT, RANK), "c": (RANK, IN), "d": (OUT, RANK)}.items()
    )}  # fmt: skip
    module = trace(linear, inputs)
    original = copied(module)
    assert len(rewrite(module, RULES, verify=True).rewrites) == 2
    assert targets(module).count("dropout") == 2
    torch.manual_seed(5)
    wanted = computed(original, inputs)
    torch.manual_seed(5)
    for name, found in computed(module, inputs).items():
        torch.testing.assert_close(found, wanted[name], msg=name)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adapter_dtype", ["same", "float32"])
def test_each_place_of_the_scale_is_verified(scale: str, adapter_dtype: str) -> None:
    s: dict[str, Any] = {
        "dtype": torch.bfloat16, "adapter_dtype": adapter_dtype, "base": "F.linear, bias", "columns": False,
        "product": "F.linear", "scale": scale, "sum": "y + u", "adapters": 1, "own": False, "more": "nothing",
        "shape": (2, 3), "grads": (True, False, True, True),
    }  # fmt: skip
    module, outcome = check(spelt(s), inputs_of(s), RULES, count=1, terms=4 * IN, verify=True)
    assert "lora_linear" in targets(module) and outcome.rewrites[0].error is not None
