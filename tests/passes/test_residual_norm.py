"""A residual sum and the norm that reads it are one operator with two results, wherever the sum goes on to."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.residual_norm import FuseResidualNorm
from weft.passes.rms_norm import FuseRmsNorm

from ..graphs import cases, check, normal, record, targets

RULES = [FuseRmsNorm(), FuseResidualNorm()]
EPS = 1e-3

BRANCHES = {
    "plain": lambda r: r,
    "scaled": lambda r: r * 0.5,
    "dropped": lambda r: F.dropout(r, 0.5, False),
    "product": lambda r: torch.tanh(r) * r,
}
SUMS = {
    "x + r": lambda x, r: x + r,
    "r + x": lambda x, r: torch.add(r, x),
    "alpha": lambda x, r: torch.add(x, r, alpha=2),
    "in place": lambda x, r: (x * 1.0).add_(r),
    "+=": lambda x, r: record(operator.iadd, x + 0.0, r),
}
NORMS = {
    "w": lambda h, w: w * (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype),
    "1 + w": lambda h, w: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w),
    "none": lambda h, w: h / torch.sqrt((h * h).mean(-1, keepdim=True) + EPS),
    "library": lambda h, w: F.rms_norm(h, (8,), w, EPS),
}
LATER = {
    "nowhere": lambda h, y: y,
    "returned": lambda h, y: (y, h),
    "added": lambda h, y: h + torch.tanh(y),
    "read first": lambda h, y: (h * 2, y),
    "overwritten after": lambda h, y: (y * 1.0, h.mul_(2.0)),
}

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "branch": st.sampled_from(sorted(BRANCHES)),
        "sum": st.sampled_from(sorted(SUMS)),
        "norm": st.sampled_from(sorted(NORMS)),
        "later": st.sampled_from(sorted(LATER)),
        "early": st.booleans(),
        "shape": st.sampled_from(((2, 3, 8), (1, 1, 8), (0, 2, 8), (8, 8, 8))),
        "dynamic": st.sampled_from((False, False, True)),
        "grads": st.tuples(st.booleans(), st.booleans(), st.booleans()),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""

    def block(x: Any, r: Any, w: Any) -> Any:
        h = SUMS[s["sum"]](x, BRANCHES[s["branch"]](r))
        first = torch.sigmoid(h) if s["early"] else None
        found = LATER[s["later"]](h, NORMS[s["norm"]](h, w))
        return (found, first) if s["early"] else found

    return block


@cases
@given(s=spellings)
def test_every_sum_and_norm_become_one_operator(s: dict[str, Any]) -> None:
    grads = (False,) * 3 if "overwritten" in s["later"] else s["grads"]  # autograd itself forbids that otherwise
    x, r = (normal(i, *s["shape"], dtype=s["dtype"], grad=grads[i]) for i in range(2))
    inputs = {"x": x, "r": r, "w": normal(2, 8, dtype=s["dtype"], grad=grads[2])}
    module, _ = check(spelt(s), inputs, RULES, terms=8, dynamic=s["dynamic"])
    assert targets(module).count("residual_rms_norm") == (s["sum"] != "alpha"), module.graph


@pytest.mark.parametrize("shape", [(8,), (1, 3, 8), (2, 1, 8), (2, 3, 1)])
def test_a_broadcast_addend_is_no_residual(shape: tuple[int, ...]) -> None:
    inputs = {"x": normal(0, 2, 3, 8, grad=True), "r": normal(1, *shape, grad=True)}
    module, outcome = check(lambda x, r: F.rms_norm(x + r, (8,)), inputs, RULES, count=1, terms=8)
    assert "residual_rms_norm" not in targets(module)
    assert "addends have shapes" in outcome.refusals[0].reason


def test_a_sum_that_writes_into_an_input_of_the_graph_stays() -> None:
    def block(x: Any, r: Any, w: Any) -> Any:
        return F.rms_norm(x.add_(r), (8,), w, EPS)

    inputs = {"x": normal(0, 2, 3, 8), "r": normal(1, 2, 3, 8), "w": normal(2, 8, grad=True)}
    module, _ = check(block, inputs, RULES, terms=8)
    assert targets(module) == ["add_", "rms_norm"]


def test_a_sum_that_is_overwritten_before_the_norm_stays() -> None:
    def block(x: Any, r: Any) -> Any:
        h = x + r
        first = h * 3.0
        h.mul_(2.0)
        return F.rms_norm(h, (8,)), first, h

    inputs = {"x": normal(0, 2, 3, 8, grad=True), "r": normal(1, 2, 3, 8, grad=True)}
    module, _ = check(block, inputs, RULES, terms=8)
    assert "residual_rms_norm" not in targets(module), module.graph


def test_the_sum_of_mixed_dtypes_is_verified() -> None:
    inputs = {"x": normal(0, 2, 3, 8, grad=True), "r": normal(1, 2, 3, 8, dtype=torch.bfloat16, grad=True)}
    check(lambda x, r: F.rms_norm(x + r, (8,), None, EPS), inputs, RULES, terms=8, verify=True)


def test_a_chain_of_blocks_keeps_every_sum() -> None:
    def blocks(x: Any, r: Any, w: Any) -> Any:
        for _ in range(3):
            x = x + torch.tanh(r)
            r = F.rms_norm(x, (8,), w, EPS)
        return x + r

    inputs = {"x": normal(0, 2, 3, 8, grad=True), "r": normal(1, 2, 3, 8, grad=True), "w": normal(2, 8, grad=True)}
    module, outcome = check(blocks, inputs, RULES, count=6, terms=8, verify=True)
    assert targets(module).count("residual_rms_norm") == 3
    assert sum(r.rule == "residual_norm" for r in outcome.rewrites) == 3
