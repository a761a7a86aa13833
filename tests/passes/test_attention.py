"""Attention over repeated keys and values is one operator, however the repeating is spelt; what only looks like it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.attention import FuseAttention

from ..graphs import apply, cases, check, normal, targets, trace

RULES = [FuseAttention()]

REPEATS = {
    "expand, reshape": lambda x, b, h, n, t, d: x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d),
    "open ends": lambda x, b, h, n, t, d: x[:, :, None].expand(-1, -1, n, -1, -1).reshape(b, -1, t, d),
    "ellipsis": lambda x, b, h, n, t, d: x[..., None, :, :].expand(b, h, n, t, d).contiguous().view(b, h * n, t, d),
    "unsqueeze, flatten": lambda x, b, h, n, t, d: x.unsqueeze(2).expand(b, h, n, t, d).flatten(1, 2),
    "unsqueeze, from the end": lambda x, b, h, n, t, d: torch.unsqueeze(x, -3).expand(b, h, n, t, d).flatten(1, 2),
    "repeat_interleave": lambda x, b, h, n, t, d: x.repeat_interleave(n, 1),
    "repeat_interleave, keywords": lambda x, b, h, n, t, d: torch.repeat_interleave(x, repeats=n, dim=-3),
    "groups of the library": None,
}
"""Every head n times, in place."""

MASKS = {
    "none": lambda mask: None,
    "causal": lambda mask: None,
    "bools": lambda mask: mask > 0,
    "numbers": lambda mask: mask,
}

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "repeat": st.sampled_from(sorted(REPEATS)),
        "batch": st.sampled_from((1, 2)),
        "heads": st.sampled_from((1, 2, 3)),
        "group": st.sampled_from((1, 2, 4)),
        "length": st.sampled_from((1, 3, 5)),
        "mask": st.sampled_from(sorted(MASKS)),
        "scale": st.sampled_from((None, 0.25)),
        "keywords": st.booleans(),
        "widen": st.booleans(),
        "merge": st.booleans(),
        "grad": st.sampled_from((True, True, False)),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""
    b, h, n, t, d = s["batch"], s["heads"], s["group"], s["length"], 8
    repeat = REPEATS[s["repeat"]]

    def attended(q: Any, k: Any, v: Any, mask: Any) -> Any:
        if s["widen"]:
            q, k, v = q.float(), k.float(), v.float()
        if repeat is not None:
            k, v = repeat(k, b, h, n, t, d), repeat(v, b, h, n, t, d)
        causal, mask = s["mask"] == "causal", MASKS[s["mask"]](mask)
        options = {"scale": s["scale"], "enable_gqa": repeat is None}
        if s["keywords"]:
            y = F.scaled_dot_product_attention(
                q, k, value=v, attn_mask=mask, is_causal=causal, dropout_p=0.0, **options
            )
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, **options)
        return y.transpose(1, 2).reshape(b, t, h * n * d) if s["merge"] else y

    return attended


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """q, k and v as projections leave them, and a mask of which every row reads something."""
    b, h, n, t = s["batch"], s["heads"], s["group"], s["length"]
    q, k, v = (normal(i, b, t, heads, 8, dtype=s["dtype"]).transpose(1, 2) for i, heads in enumerate((h * n, h, h)))
    kind = torch.float32 if s["widen"] else s["dtype"]
    mask = normal(3, b, 1, t, t, dtype=kind) + 9 * torch.eye(t, dtype=kind)
    return {**{name: x.requires_grad_(s["grad"]) for name, x in (("q", q), ("k", k), ("v", v))}, "mask": mask}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, outcome = check(spelt(s), inputs_of(s), RULES, count=1, terms=64)
    names = targets(module)
    assert names.count("attention") == 1 and "scaled_dot_product_attention" not in names, module.graph
    assert s["group"] == 1 or not {"expand", "repeat_interleave"} & set(names), module.graph
    assert outcome.rewrites[0].rule == "attention"


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("repeat", ["expand, reshape", "repeat_interleave", "groups of the library"])
def test_each_form_is_verified(repeat: str, mask: str) -> None:
    s = {
        "dtype": torch.bfloat16, "repeat": repeat, "batch": 2, "heads": 2, "group": 2, "length": 5, "mask": mask,
        "scale": None, "keywords": True, "widen": False, "merge": True, "grad": True,
    }  # fmt: skip
    _, outcome = check(spelt(s), inputs_of(s), RULES, count=1, terms=64, verify=True)
    assert outcome.rewrites[0].error is not None


def attended(q: Any, k: Any, v: Any) -> Any:
    """Attention without options."""
    return F.scaled_dot_product_attention(q, k, v)


REPEATED_OTHERWISE = {
    "whole heads in turn": lambda q, k, v: attended(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
    "in front of the heads": lambda q, k, v: attended(
        q, *(x[:, None].expand(2, 2, 2, 4, 8).reshape(2, 4, 4, 8) for x in (k, v))
    ),
    "keys and values differently": lambda q, k, v: attended(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1)),
}
"""Not what a group of heads reads: only the whole may become the operator, on the repeated tensors."""


@pytest.mark.parametrize("name", REPEATED_OTHERWISE)
def test_what_is_repeated_otherwise_is_read_as_it_is(name: str) -> None:
    q, k, v = (normal(i, 2, h, 4, 8, grad=True) for i, h in enumerate((4, 2, 2)))
    module, _ = check(REPEATED_OTHERWISE[name], {"q": q, "k": k, "v": v}, RULES, count=1, terms=64)
    assert {"repeat", "expand"} & set(targets(module))


def test_repeated_keys_that_others_read_stay() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        wide = k.repeat_interleave(2, 1)
        return attended(q, wide, v.repeat_interleave(2, 1)), wide.sum()

    q, k, v = (normal(i, 2, h, 4, 8, grad=True) for i, h in enumerate((4, 2, 2)))
    module, _ = check(function, {"q": q, "k": k, "v": v}, RULES, count=1, terms=64)
    assert targets(module).count("repeat_interleave") == 1


REFUSED = {
    "dropped out": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), 4),
    "not four dimensions": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), 4),
    "broadcast": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), 4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_done_is_refused(reason: str) -> None:
    function, heads = REFUSED[reason]
    inputs = {name: normal(i, 2, heads, 4, 8) for i, name in enumerate(("q", "k", "v"))}
    outcome = apply(trace(function, inputs), RULES)
    assert not outcome.rewrites and reason in outcome.refusals[0].reason
