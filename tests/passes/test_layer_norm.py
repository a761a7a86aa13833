"""LayerNorm, however it is spelt, is one operator; what only looks like one is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.defaults import default_passes
from weft.passes.layer_norm import FuseLayerNorm
from weft.rewrite.verify import Replayer

from ..graphs import cases, check, normal, targets, trace

RULES = [FuseLayerNorm()]
pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")
EPS = 1e-3

WIDEN = {"not": lambda x: x, "float": lambda x: x.float(), "to": lambda x: x.to(torch.float32)}
CENTRES = {
    "x - x.mean": lambda x: x - x.mean(-1, keepdim=True),
    "torch.mean": lambda x: torch.sub(x, torch.mean(x, dim=(-1,), keepdim=True)),
    "sum": lambda x: x - x.sum(2, keepdim=True) / x_size(x),
}
VARIANCES = {
    "mean of squares": lambda x, c: c.pow(2).mean(-1, keepdim=True),
    "c·c": lambda x, c: (c * c).mean(2, True),
    "sum of squares": lambda x, c: (c**2).sum(-1, keepdim=True) / x_size(x),
    "var": lambda x, c: x.var(-1, keepdim=True, unbiased=False),
    "var, correction": lambda x, c: torch.var(x, dim=-1, correction=0, keepdim=True),
    "var of the centred": lambda x, c: c.var(-1, keepdim=True, correction=0),
    "var_mean": lambda x, c: torch.var_mean(x, -1, unbiased=False, keepdim=True)[0],
    "no dimension kept": lambda x, c: c.square().mean(-1).unsqueeze(-1),
}
FACTORS = {
    "c · rsqrt(v + e)": lambda c, v: c * torch.rsqrt(v + EPS),
    "c / sqrt(v + e)": lambda c, v: c / torch.sqrt(EPS + v),
    "c · (v + e)^-0.5": lambda c, v: (v + EPS).pow(-0.5) * c,
    "in place": lambda c, v: c * v.add_(EPS).rsqrt(),
}
AFFINE = {
    "none": lambda y, w, b: y,
    "w": lambda y, w, b: w * y,
    "1 + w": lambda y, w, b: y * (1 + w),
    "b": lambda y, w, b: y + b,
    "w, b": lambda y, w, b: y * w + b,
    "b + w": lambda y, w, b: b + w * y,
    "1 + w, b": lambda y, w, b: y * (w + 1.0) + b,
    "addcmul": lambda y, w, b: torch.addcmul(b, y, w),
    "in place": lambda y, w, b: (y * w).add_(b),
    "w, b, expanded": lambda y, w, b: y * w.expand_as(y) + b.expand_as(y),
    "rows": lambda y, w, b: y * w.view(1, 1, -1) + b[None, None],
}


def x_size(x: Any) -> int:
    """The normalized size, which all drawn shapes share."""
    return 8


LIBRARY = {
    "all": lambda x, w, b: F.layer_norm(x, (8,), w, b, EPS),
    "keywords": lambda x, w, b: F.layer_norm(x, normalized_shape=[8], weight=w, bias=b),
    "no bias": lambda x, w, b: torch.layer_norm(x, (8,), w, eps=EPS),
    "no weight": lambda x, w, b: F.layer_norm(x, (8,)),
    "weight behind": lambda x, w, b: F.layer_norm(x, (8,), eps=EPS) * w + b,
    "1 + w behind": lambda x, w, b: F.layer_norm(x, (8,), None, None, EPS) * (1 + w),
    "native": lambda x, w, b: torch.native_layer_norm(x, (8,), w, b, EPS)[0],
    "one group": lambda x, w, b: F.group_norm(x.reshape(-1, 8), 1, w, b, EPS),
    "float32": lambda x, w, b: F.layer_norm(x.float(), (8,), w.float(), b.float(), EPS).to(x.dtype),
}

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "affine_dtype": st.sampled_from(("same", "float32")),
        "widen": st.sampled_from(sorted(WIDEN)),
        "centre": st.sampled_from(sorted(CENTRES)),
        "variance": st.sampled_from(sorted(VARIANCES)),
        "factor": st.sampled_from(sorted(FACTORS)),
        "affine": st.sampled_from(sorted(AFFINE)),
        "narrow": st.sampled_from(("not", "before the weight", "last")),
        "more": st.sampled_from(("nothing", "centre", "variance")),
        "shape": st.sampled_from(((2, 3, 8), (1, 1, 8), (0, 3, 8), (8, 8, 8))),
        "frozen": st.booleans(),
        "dynamic": st.sampled_from((False, False, False, True)),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""

    def norm(x: Any, w: Any, b: Any) -> Any:
        wide = WIDEN[s["widen"]](x)
        centre = CENTRES[s["centre"]](wide)
        variance = VARIANCES[s["variance"]](wide, centre)
        y = FACTORS[s["factor"]](centre, variance)
        y = y.to(s["dtype"]) if s["narrow"] == "before the weight" else y
        y = AFFINE[s["affine"]](y, w, b)
        y = y.to(s["dtype"]) if s["narrow"] == "last" else y
        return y if s["more"] == "nothing" else (y, {"centre": centre, "variance": variance}[s["more"]])

    return norm


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, affine: torch.dtype, grad: bool = True) -> dict[str, Any]:
    """An input, a weight and a bias."""
    x = normal(0, *shape, dtype=dtype, grad=True)
    return {"x": x, "w": normal(1, 8, dtype=affine, grad=grad), "b": normal(2, 8, dtype=affine, grad=grad)}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    affine = torch.float32 if s["affine_dtype"] == "float32" else s["dtype"]
    inputs = inputs_of(s["shape"], s["dtype"], affine, not s["frozen"])
    module, _ = check(spelt(s), inputs, RULES, terms=8, dynamic=s["dynamic"])
    view = s["variance"] in ("no dimension kept", "var_mean")
    seen_writing = s["factor"] == "in place" and view
    assert targets(module).count("layer_norm") == (not seen_writing), module.graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIBRARY)
def test_spellings_by_library_functions(name: str, dtype: torch.dtype) -> None:
    module, outcome = check(LIBRARY[name], inputs_of((2, 3, 8), dtype, dtype), RULES, count=1, terms=8, verify=True)
    assert targets(module)[-1] == "layer_norm" and not {"mul", "add"} & set(targets(module)), module.graph
    assert outcome.rewrites[0].error is not None


def factor(x: Any, mean: Any) -> Any:
    """1/√(var x + eps)"""
    return torch.rsqrt((x * x).mean(-1, keepdim=True) - mean * mean + EPS)


FOLDED = {
    "x·a + (b - m·a)": lambda x, w, b, m, r: x * (r * w) + (b - m * (r * w)),
    "b - m·r·w + a·x": lambda x, w, b, m, r: (b - m * r * w) + (w * r) * x,
    "x·a - m·a + b": lambda x, w, b, m, r: (x * (w * r) - m * (w * r)) + b,
    "x·a + b - m·a": lambda x, w, b, m, r: x * r * w + b - w * (m * r),
    "x·a + (b + -m·a)": lambda x, w, b, m, r: x * (r * w) + (b + -m * (r * w)),
    "addcmul": lambda x, w, b, m, r: torch.addcmul(torch.addcmul(b, m, r * w, value=-1), x, r * w),
    "1 + w": lambda x, w, b, m, r: x * (r * (1 + w)) + (b - m * (r * (1 + w))),
    "no bias": lambda x, w, b, m, r: x * (r * w) - m * (r * w),
    "no weight": lambda x, w, b, m, r: x * r - m * r,
    "c·(r·w) + b": lambda x, w, b, m, r: (x - m) * (r * w) + b,
}
"""The mean is taken off last."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_into_a_gain_and_a_shift(name: str, dtype: torch.dtype) -> None:
    def norm(x: Any, w: Any, b: Any) -> Any:
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        return FOLDED[name](wide, w, b, mean, factor(wide, mean)).to(dtype)

    module, _ = check(norm, inputs_of((2, 3, 8), dtype, dtype), RULES, count=1, terms=8, verify=True)
    assert targets(module)[-1] == "layer_norm" and not {"mul", "add", "sub"} & set(targets(module)), module.graph


WEIGHTED_FIRST = {
    "w·c / s + b": lambda c, s, w, b: w * c / s + b,
    "b + (c·w) / s": lambda c, s, w, b: b + c * w / s,
    "addcdiv": lambda c, s, w, b: torch.addcdiv(b, c * w, s),
    "(1 + w)·c / s + b": lambda c, s, w, b: (1 + w) * c / s + b,
    "no bias": lambda c, s, w, b: w * c * (1 / s),
    "addcmul": lambda c, s, w, b: torch.addcmul(b, w * c, s.reciprocal()),
}
"""γ·(x − mean x) over the root, as papers write it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTED_FIRST)
def test_weighted_before_it_is_divided(name: str, dtype: torch.dtype) -> None:
    def norm(x: Any, w: Any, b: Any) -> Any:
        root = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)
        return WEIGHTED_FIRST[name](x - x.mean(-1, keepdim=True), root, w, b)

    module, _ = check(norm, inputs_of((2, 3, 8), dtype, dtype), RULES, count=1, terms=8, verify=True)
    assert targets(module)[-1] == "layer_norm" and not {"mul", "add", "sub"} & set(targets(module)), module.graph


NEAR = {
    "folded, another mean": lambda x, y, w, e: x * factor(x, _mean(x)) - _mean(y) * factor(x, _mean(x)),
    "folded, another factor": lambda x, y, w, e: x * factor(x, _mean(x)) - _mean(x) * factor(y, _mean(y)),
    "folded, added": lambda x, y, w, e: x * factor(x, _mean(x)) + (w + _mean(x) * factor(x, _mean(x))),
    "folded, weighted once": lambda x, y, w, e: x * (factor(x, _mean(x)) * w) - _mean(x) * factor(x, _mean(x)),
    "one group of more than the last dimension": lambda x, y, w, e: F.group_norm(x, 1, w, w, EPS),
    "two groups": lambda x, y, w, e: F.group_norm(x[0], 2, w, w, EPS),
    "moments of a norm": lambda x, y, w, e: torch.native_layer_norm(x, (8,), w, w, EPS)[1],
    "centre of another tensor": lambda x, y, w, e: (x - y.mean(-1, keepdim=True)) * torch.rsqrt(_variance(x) + EPS),
    "variance of another tensor": lambda x, y, w, e: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(_variance(y) + EPS),
    "unbiased variance": lambda x, y, w, e: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "eps beside the root": lambda x, y, w, e: (x - x.mean(-1, keepdim=True)) / (_variance(x).sqrt() + EPS),
    "another dimension": lambda x, y, w, e: (x - x.mean(-2, keepdim=True)) * torch.rsqrt(_variance(x, -2) + EPS),
    "mixed dimensions": lambda x, y, w, e: (x - x.mean(-2, keepdim=True)) * torch.rsqrt(_variance(x) + EPS),
    "no keepdim": lambda x, y, w, e: (x - x.mean(-1)) * torch.rsqrt(x.var(-1, unbiased=False) + EPS),
    "the mean minus x": lambda x, y, w, e: (x.mean(-1, keepdim=True) - x) * torch.rsqrt(_variance(x) + EPS),
    "eps is a tensor": lambda x, y, w, e: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(_variance(x) + e),
    "two dimensions": lambda x, y, w, e: F.layer_norm(x, (8, 8), None, None, EPS) * w,
}
"""None of these is a LayerNorm over the last dimension; sizes are equal, so that only the spelling tells."""


def _mean(x: Any) -> Any:
    return x.mean(-1, keepdim=True)


def _variance(x: Any, dim: int = -1) -> Any:
    return (x - x.mean(dim, keepdim=True)).pow(2).mean(dim, keepdim=True)


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    x, y, w = normal(0, 8, 8, 8, grad=True), normal(1, 8, 8, 8, grad=True), normal(2, 8, grad=True)
    _, outcome = check(NEAR[name], {"x": x, "y": y, "w": w, "e": normal(3, 1).abs()}, RULES, count=0, terms=64)
    assert "eps is" not in name or "eps" in outcome.refusals[0].reason


@pytest.mark.parametrize("shape", [(8, 1), (8, 8, 8), (1,)])
def test_an_affine_map_that_is_none_per_feature_stays_behind_the_norm(shape: tuple[int, ...]) -> None:
    inputs = {"x": normal(0, 8, 8, 8, grad=True), "w": normal(1, *shape, grad=True), "b": normal(2, *shape, grad=True)}
    module, outcome = check(lambda x, w, b: F.layer_norm(x, (8,)) * w + b, inputs, RULES, count=1, terms=64)
    assert {"mul", "add"} <= set(targets(module)) and "has shape" in outcome.refusals[0].reason


def test_is_found_before_the_norm_inside_it() -> None:
    """(x − mean x) / √(var x + eps) is an RMSNorm of x − mean x, too."""

    def norm(x: Any, w: Any, b: Any) -> Any:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + EPS) * w + b

    module = trace(norm, inputs_of((2, 3, 8), torch.float32, torch.float32))
    for each in default_passes("train"):
        each.run(module, Replayer())
    assert targets(module) == ["layer_norm"]
