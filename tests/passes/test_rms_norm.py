"""RMSNorm, however it is spelt, is one operator; what only looks like one is left alone."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.rms_norm import FuseRmsNorm

from ..graphs import apply, cases, check, normal, record, targets, trace

RULES = [FuseRmsNorm()]
EPS = 1e-3

WIDEN = {
    "not": lambda x: x,
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to, by keyword": lambda x: x.to(dtype=torch.float32),
    "type": lambda x: x.type(torch.float32),
}
SQUARES = {
    "pow": lambda x: x.pow(2),
    "**": lambda x: x**2,
    "x·x": lambda x: x * x,
    "square": torch.square,
    "torch.pow": lambda x: torch.pow(x, 2.0),
    "|x|²": lambda x: x.abs().pow(2),
}
MEANS = {
    "method": lambda s, n: s.mean(-1, keepdim=True),
    "positional": lambda s, n: s.mean(-1, True),
    "function": lambda s, n: torch.mean(s, dim=-1, keepdim=True),
    "list": lambda s, n: s.mean(dim=[-1], keepdim=True),
    "from the front": lambda s, n: s.mean(2, keepdim=True),
    "sum": lambda s, n: s.sum(-1, keepdim=True) / n,
    "numpy": lambda s, n: torch.mean(s, axis=-1, keepdims=True),
    "dimension put back": lambda s, n: s.mean(-1).unsqueeze(-1),
    "None": lambda s, n: (s.sum(-1) / n)[..., None],
}
FACTORS = {
    "rsqrt(m + e)": lambda m: torch.rsqrt(m + EPS),
    "(e + m).rsqrt()": lambda m: (EPS + m).rsqrt(),
    "rsqrt(add(m, e))": lambda m: torch.rsqrt(torch.add(m, EPS)),
    "(m + e)^-0.5": lambda m: torch.pow(m + EPS, -0.5),
    "1 / sqrt(m + e)": lambda m: 1.0 / torch.sqrt(m + EPS),
    "reciprocal(sqrt(m + e))": lambda m: (m + EPS).sqrt().reciprocal(),
    "1 / (sqrt(m) + e)": lambda m: 1 / (m.sqrt() + EPS),
    "1 / max(sqrt(m), e)": lambda m: 1 / torch.clamp(torch.sqrt(m), min=EPS),
    "rsqrt(max(m, e))": lambda m: torch.clamp_min(m, EPS).rsqrt(),
    "rsqrt(m)": torch.rsqrt,
    "in place": lambda m: m.add_(EPS).rsqrt(),
    "+= in place": lambda m: record(operator.iadd, m, EPS).rsqrt(),
    "root, overwritten": lambda m: (m + EPS).rsqrt_(),
}
WEIGHTS = {
    "none": None,
    "w": lambda w: w,
    "1 + w": lambda w: 1 + w,
    "w + 1.0": lambda w: w + 1.0,
    "1 + w in float32": lambda w: 1.0 + w.float(),
    "a row": lambda w: w.view(1, 1, -1),
    "a row in float32": lambda w: w[None, None, :].float(),
    "1 + w, a row": lambda w: 1 + w.unsqueeze(0).unsqueeze(0),
}
ORDERS = {
    "(x r) w": lambda x, r, w, back: back(x * r) * w,
    "w (x r)": lambda x, r, w, back: w * back(r * x),
    "cast last": lambda x, r, w, back: back(x * r * w),
    "x (r w)": lambda x, r, w, back: back(x * (r * w)),
    "(x w) r": lambda x, r, w, back: back((w * x) * r),
    "expanded": lambda x, r, w, back: back(x * r.expand_as(x)) * w.expand_as(x),
    "broadcast_to": lambda x, r, w, back: w * back(torch.broadcast_to(r, x.shape) * x),
    "in place": lambda x, r, w, back: back((x * r) * 1.0).mul_(w),
}
MORE = ("nothing", "square", "mean", "factor", "wide")
"""What else of the norm the graph returns."""

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "weight_dtype": st.sampled_from(("same", "float32")),
        "widen": st.sampled_from(sorted(WIDEN)),
        "square": st.sampled_from(sorted(SQUARES)),
        "mean": st.sampled_from(sorted(MEANS)),
        "factor": st.sampled_from(sorted(FACTORS)),
        "weight": st.sampled_from(sorted(WEIGHTS)),
        "order": st.sampled_from(sorted(ORDERS)),
        "narrow": st.booleans(),
        "more": st.sampled_from(MORE),
        "shape": st.sampled_from(((2, 3, 8), (1, 1, 4), (5, 2, 6), (0, 3, 8), (3, 0, 4), (4, 4, 4))),
        "frozen": st.booleans(),
        "dynamic": st.sampled_from((False, False, False, True)),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""
    size = s["shape"][-1]

    def norm(x: Any, w: Any) -> Any:
        wide = WIDEN[s["widen"]](x)
        square = SQUARES[s["square"]](wide)
        mean = MEANS[s["mean"]](square, size)
        factor = FACTORS[s["factor"]](mean)
        back = (lambda y: y.to(s["dtype"])) if s["narrow"] else (lambda y: y)
        weight = WEIGHTS[s["weight"]]
        y = back(wide * factor) if weight is None else ORDERS[s["order"]](wide, factor, weight(w), back)
        more = {"square": square, "mean": mean, "factor": factor, "wide": wide}
        return (y, more[s["more"]]) if s["more"] != "nothing" else y

    return norm


def inputs_of(s: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An input and a weight."""
    kind = torch.float32 if s["weight_dtype"] == "float32" else s["dtype"]
    x = normal(0, *s["shape"], dtype=s["dtype"], grad=True)
    return {"x": x, "w": normal(1, s["shape"][-1], dtype=kind, grad=not s["frozen"])}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, terms=s["shape"][-1], dynamic=s["dynamic"])
    view = s["mean"] in ("dimension put back", "None")
    seen_writing = "in place" in s["factor"] and view
    assert targets(module).count("rms_norm") == (not seen_writing), module.graph


NEAR = {
    "another tensor is normalized": lambda x, y, w, e: y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "two tensors multiplied by vecdot": lambda x, y, w, e: (
        x * torch.rsqrt(torch.linalg.vecdot(x, y).unsqueeze(-1) / 4 + EPS) * w
    ),
    "two tensors multiplied": lambda x, y, w, e: x * torch.rsqrt((x * y).mean(-1, keepdim=True) + EPS) * w,
    "another dimension": lambda x, y, w, e: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS) * w,
    "two dimensions": lambda x, y, w, e: x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + EPS) * w,
    "no root": lambda x, y, w, e: x * (x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "cubes": lambda x, y, w, e: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + EPS) * w,
    "length over two dimensions": lambda x, y, w, e: x / (torch.linalg.norm(x, dim=(-2, -1), keepdim=True) + EPS) * w,
    "length of another tensor": lambda x, y, w, e: x / (y.norm(dim=-1, keepdim=True) + EPS) * w,
    "length and a tensor": lambda x, y, w, e: x / (x.norm(dim=-1, keepdim=True) + e) * w,
    "divided by another number": lambda x, y, w, e: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 3 + EPS) * w,
    "no keepdim": lambda x, y, w, e: x * torch.rsqrt(x.pow(2).mean(-1) + EPS) * w,
    "eps is a tensor": lambda x, y, w, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * w,
    "normalized by 1, not by the root of the size": lambda x, y, w, e: F.normalize(x, dim=-1) * w,
    "normalized by another norm": lambda x, y, w, e: F.normalize(x, p=1.0, dim=-1) * 2.0 * w,
    "library, two dimensions": lambda x, y, w, e: F.rms_norm(x, (4, 4), None, EPS) * w,
}
"""None of these is an RMSNorm over the last dimension; sizes are equal, so that only the spelling tells."""


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    x, y, w = normal(0, 4, 4, 4, grad=True), normal(1, 4, 4, 4, grad=True), normal(2, 4, grad=True)
    inputs = {"x": x, "y": y, "w": w, "e": normal(3, 1).abs()}
    _, outcome = check(NEAR[name], inputs, RULES, count=0, terms=16)
    assert "eps" not in name or "eps" in outcome.refusals[0].reason


@pytest.mark.parametrize(("shape", "count"), [((4, 1), 1), ((1, 4), 1), ((1,), 1), ((4, 4, 4), 1), ((4,), 1)])
def test_a_factor_that_is_no_weight_stays_behind_the_norm(shape: tuple[int, ...], count: int) -> None:
    def norm(x: Any, w: Any) -> Any:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    inputs = {"x": normal(0, 4, 4, 4, grad=True), "w": normal(1, *shape, grad=True)}
    module, _ = check(norm, inputs, RULES, count=count, terms=16)
    assert ("mul" in targets(module)) == (shape != (4,))


LIBRARY = {
    "rms_norm": lambda x, w: F.rms_norm(x, (8,), w, EPS),
    "no eps": lambda x, w: F.rms_norm(x, (8,), weight=w),
    "no weight": lambda x, w: F.rms_norm(x, [8], eps=EPS),
    "torch": lambda x, w: torch.rms_norm(x, (8,), w, EPS),
    "weight behind": lambda x, w: w * F.rms_norm(x, (8,), None, EPS),
    "float32": lambda x, w: F.rms_norm(x.float(), (8,), w.float(), EPS).to(x.dtype),
    "normalize": lambda x, w: F.normalize(x, dim=-1) * 8**0.5 * w,
    "normalize, 1 + w": lambda x, w: F.normalize(x, p=2, dim=-1, eps=EPS) * 8**0.5 * (w + 1),
    "norm": lambda x, w: x / (x.norm(2, dim=-1, keepdim=True) * 8**-0.5 + EPS) * w,
    "norm over root": lambda x, w: w * (x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / 8**0.5 + EPS)),
    "root behind the weight": lambda x, w: x / x.norm(2, -1, keepdim=True).clamp_min(EPS) * w * 8**0.5,
    "root in front": lambda x, w: 8**0.5 * x / (x.norm(dim=-1, keepdim=True) + EPS) * w,
    "normalize, root behind the weight": lambda x, w: F.normalize(x, dim=-1) * w * 8**0.5,
    "vecdot": lambda x, w: x * torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / 8 + EPS) * w,
    "sum": lambda x, w: x * w / torch.sqrt((x * x).sum(-1, keepdim=True) * (1 / 8) + EPS),
    "length and eps": lambda x, w: 8**0.5 * x / (torch.linalg.norm(x, dim=-1, keepdim=True) + EPS) * w,
    "length and eps, root behind": lambda x, w: w * (x / (x.norm(dim=-1, keepdim=True) + EPS)) * 8**0.5,
    "length and eps, root on the weight": lambda x, w: x / (x.norm(dim=-1, keepdim=True) + EPS) * (w * 8**0.5),
    "length bounded": lambda x, w: x / x.norm(dim=-1, keepdim=True).clamp(min=EPS) * 8**0.5 * w,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIBRARY)
def test_spellings_by_library_functions(name: str, dtype: torch.dtype) -> None:
    inputs = {"x": normal(0, 3, 8, dtype=dtype, grad=True), "w": normal(1, 8, dtype=dtype, grad=True)}
    module, _ = check(LIBRARY[name], inputs, RULES, terms=8)
    assert targets(module).count("rms_norm") == 1 and "mul" not in targets(module), module.graph


SCALED = {
    "length 1": lambda x, w: x / (x.norm(dim=-1, keepdim=True) + EPS) * w,
    "length 1, bounded": lambda x, w: w * (x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)),
    "length 1, no weight": lambda x, w: x / (x.pow(2).sum(-1, keepdim=True).sqrt() + EPS),
    "length 1, of a sum": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w,
    "length √3": lambda x, w: x / x.norm(dim=-1, keepdim=True) * w * 3**0.5,
    "length 3": lambda x, w: x / (x.norm(dim=-1, keepdim=True) + EPS) * 3 * w,
    "unbiased": lambda x, w: w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + w,
    "unbiased, weight behind": lambda x, w: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + EPS) * w,
    "two taken off": lambda x, w: (x - x.mean(-1, True)) / torch.std(x, -1, correction=2, keepdim=True).clamp(EPS) * w,
}
"""A constant times a norm."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_lengths_that_are_a_factor_off(name: str, dtype: torch.dtype) -> None:
    inputs = {"x": normal(0, 3, 8, dtype=dtype, grad=True), "w": normal(1, 8, dtype=dtype, grad=True)}
    module, _ = check(SCALED[name], inputs, RULES, count=1, terms=8, verify=True)
    assert not {"norm", "std", "div", "truediv"} & set(targets(module)), module.graph


def test_norms_one_after_another_and_verified() -> None:
    def norms(x: Any, v: Any, w: Any) -> Any:
        first = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w
        return (first * torch.rsqrt((first * first).mean(-1, keepdim=True) + EPS)) * (1 + v)

    inputs = {"x": normal(0, 3, 8, grad=True), "v": normal(1, 8, grad=True), "w": normal(2, 8)}
    module, outcome = check(norms, inputs, RULES, count=2, terms=8, verify=True)
    assert targets(module) == ["rms_norm", "rms_norm"]
    assert all(r.error is not None and 0 <= r.error <= 1 for r in outcome.rewrites)


def test_an_input_that_a_reduction_looks_into_brings_nothing_along() -> None:
    """std x has x − mean x in it: what x itself is made of, a random operation here, is no part of the match."""

    def norm(x: Any, w: Any) -> Any:
        y = F.dropout(x, 0.5, True)
        centred = y - y.mean(-1, keepdim=True)
        return centred / (y.std(-1, keepdim=True, unbiased=False) + EPS) * w

    inputs = {"x": normal(0, 2, 3, 8, grad=True), "w": normal(1, 8, grad=True)}
    module = trace(norm, inputs)
    outcome = apply(module, RULES, verify=True)
    assert [r.rule for r in outcome.rewrites] == ["rms_norm"], outcome.refusals
    assert targets(module) == ["dropout", "mean", "sub", "rms_norm"]
