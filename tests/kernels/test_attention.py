"""Attention over shared keys and values: against float64, and bit for bit against the library's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels.attention import _attention, _attention_backward, attention, reference
from weft.kernels.attention_backends import Route, choose, repeated

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn
from .norm_cases import DEVICE, cases, checkpointed, normal

MASKS = ("none", "causal", "bools", "bools for each head", "numbers", "rows that read nothing", "one row for all")
ORDERS = {"by head": (0, 1, 2, 3), "by token": (0, 2, 1, 3), "length first": (2, 0, 1, 3), "sliced": (0, 2, 1, 3)}


def laid(seed: int, shape: tuple[int, ...], dtype: torch.dtype, order: str) -> Tensor:
    """Normal numbers in the memory order that ``order`` names."""
    dims = ORDERS[order]
    made = normal(seed, tuple(shape[d] for d in dims[:3]) + (shape[3] * (1 + (order == "sliced")),), dtype)
    return made[..., : shape[3]].permute([dims.index(d) for d in range(4)])


def masked(kind: str, batch: int, heads: int, length: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    """A mask of the kind that is named; ``causal`` is none."""
    if kind in ("none", "causal"):
        return None
    shape = (batch, heads if "each" in kind else 1, 1 if kind.startswith("one row") else length, keys)
    if kind == "numbers":
        return normal(7, shape, dtype)
    allowed = normal(7, shape, torch.float32) < 0.5
    allowed[..., :1] = True
    if kind == "rows that read nothing":
        allowed[:, :, :1] = False
    return allowed


def library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """What a model without the operator computes: its rounding is what the operator is judged by."""
    if not q.numel():  # of no rows in 16 bits torch 2.11 returns no tensor on a GPU
        return reference(q, k, v, mask, is_causal=is_causal, scale=scale)
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)


@drawn
def calls(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``attention``."""
    batch, kv_heads, group = (draw(among(s)) for s in ((0, 1, 2, 3), (1, 2, 3), (1, 1, 2, 8)))
    length, width = draw(among((0, 1, 3, 17))), draw(among((1, 4, 8, 20)))
    keys = draw(among((length, length, 5)))
    kind = draw(among(MASKS))
    other = draw(among((width, width, 8)))
    orders = [draw(among(sorted(ORDERS))) for _ in range(3)]
    shapes = ((batch, kv_heads * group, length, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, other))
    q, k, v = (laid(i, s, dtype, o) for i, (s, o) in enumerate(zip(shapes, orders, strict=True)))
    return {
        **{name: x.requires_grad_(draw(st.booleans())) for name, x in (("q", q), ("k", k), ("v", v))},
        "mask": masked(kind, batch, kv_heads * group, length, keys, dtype),
        "is_causal": kind == "causal",
        "scale": draw(among((None, None, 0.3, 1.0))),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(calls(dtype))
    assert_accurate(attention, library, inputs, reduction=80, scale=10.0)


@cases
@given(inputs=calls(torch.float64))
def test_the_formula_is_the_library_function(inputs: dict[str, Any]) -> None:
    assert_accurate(reference, library, inputs, reduction=80, scale=10.0)


@pytest.mark.skipif(DEVICE != "cpu", reason="other kernels than the library's choice run on a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_no_bit_differs_from_the_library_on_a_cpu(dtype: torch.dtype, kind: str) -> None:
    shapes = ((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    q, k, v = (laid(i, s, dtype, "by token").requires_grad_() for i, s in enumerate(shapes))
    mask = masked(kind, 2, 6, 9, 9, dtype)
    ours = attention(q, k, v, mask, is_causal=kind == "causal")
    theirs = F.scaled_dot_product_attention(q, repeated(k, 6), repeated(v, 6), mask, is_causal=kind == "causal")
    grouped = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)
    assert torch.equal(ours, theirs) and torch.equal(ours, grouped)
    if dtype == torch.float32:  # in narrower ones the library rounds the sum over a group once for each head of it
        both = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, grouped))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_opcheck(group: int, kind: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    shapes = ((2, 2 * group, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    q, k, v = (laid(i, s, dtype, "by token").requires_grad_() for i, s in enumerate(shapes))
    mask = masked(kind, 2, 2 * group, 9, 9, dtype)
    route, _ = choose(q, k, v, mask, kind == "causal", None)
    assert route is not Route.PLAIN
    options = kind == "causal", None, int(route)
    torch.library.opcheck(_attention.overload, (q, k, v, mask, *options))
    with torch.no_grad():
        out, lse = _attention(q, k, v, mask, *options)
        tensors = (torch.ones_like(out), q.detach(), k.detach(), v.detach(), mask, out, lse)
        torch.library.opcheck(_attention_backward.overload, (*tensors, *options))


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_merging_the_heads_is_a_view(order: str) -> None:
    q, k, v = (laid(i, (2, h, 9, 8), torch.float32, order).requires_grad_() for i, h in enumerate((4, 2, 2)))
    y = attention(q, k, v, is_causal=True)
    assert y.transpose(1, 2).reshape(2, 9, 32).data_ptr() == y.data_ptr()
    assert all(g.transpose(1, 2).is_contiguous() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_saves_no_repeated_keys() -> None:
    saved: list[Tensor] = []
    q, k, v = (laid(i, (2, h, 9, 8), torch.float32, "by token").requires_grad_() for i, h in enumerate((8, 2, 2)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = attention(q, k, v, is_causal=True)
    assert [t.shape for t in saved] == [q.shape, k.shape, v.shape, y.shape, (2, 8, 9)]
    assert [t.data_ptr() for t in saved[:4]] == [t.data_ptr() for t in (q, k, v, y)]


@pytest.mark.parametrize("tracked", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 8, 33])
def test_a_mask_that_learns_gets_its_gradient(length: int, tracked: tuple[int, ...]) -> None:
    """Alone too, and for lengths that no kernel's blocks divide."""
    shapes = [(2, h, length, 8) for h in (4, 2, 2)]
    q, k, v = (laid(i, s, torch.float32, "by token").requires_grad_(i in tracked) for i, s in enumerate(shapes))
    mask = normal(3, (1, 4, length, length), torch.float32).requires_grad_()
    inputs = {"q": q, "k": k, "v": v, "mask": mask, "is_causal": False, "scale": None}
    # the library keeps what a backward needs only if q, k or v asks for one
    assert_accurate(attention, library if tracked else reference, inputs, reduction=80, scale=10.0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_changes_nothing(use_reentrant: bool) -> None:
    leaves = [laid(i, (2, h, 9, 8), torch.float32, "by token").requires_grad_() for i, h in enumerate((4, 2, 2))]
    got = checkpointed(lambda *t: attention(*t, is_causal=True), use_reentrant, leaves)
    wanted = torch.autograd.grad(attention(*leaves, is_causal=True).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_compiled_with_free_sizes() -> None:
    compiled = torch.compile(
        lambda q, k, v: attention(q * 2, k, v, is_causal=True), backend="aot_eager", dynamic=True, fullgraph=True
    )
    for batch, length in ((2, 5), (3, 9)):
        leaves = [
            laid(i, (batch, h, length, 8), torch.float32, "by token").requires_grad_() for i, h in enumerate((4, 2, 2))
        ]
        both = compiled(*leaves), attention(leaves[0] * 2, *leaves[1:], is_causal=True)
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in both]
        assert all(torch.equal(a, b) for a, b in zip((both[0], *grads[0]), (both[1], *grads[1]), strict=True))


def test_a_result_may_be_written_into() -> None:
    q, k, v = (laid(i, (2, h, 5, 8), torch.float32, "by token").requires_grad_() for i, h in enumerate((4, 2, 2)))
    y = attention(q, k, v, is_causal=True)
    y.mul_(2)
    torch.testing.assert_close(y, 2 * reference(q, k, v, is_causal=True))


def test_wrong_arguments_raise() -> None:
    q, k = (normal(i, (2, h, 5, 8), torch.float32) for i, h in enumerate((4, 3)))
    for call, text in (
        (lambda: attention(q, k, k), "divide"),
        (lambda: attention(q[0], k[0], k[0]), "four dimensions"),
        (lambda: attention(q, q.half(), q), "one dtype"),
        (lambda: attention(q, q[..., :4], q), "agree"),
        (lambda: attention(q, q, q, torch.ones(5, 5, dtype=torch.bool), is_causal=True), "one of"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
