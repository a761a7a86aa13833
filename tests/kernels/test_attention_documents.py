"""Masks that only keep documents apart: found to be such, and never taken for such where they say more."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import attention_documents as module
from weft.kernels.attention import _attention, attention
from weft.kernels.attention_backends import Route
from weft.kernels.attention_documents import documents

from .accuracy import assert_accurate
from .drawing import among, drawn
from .norm_cases import DEVICE, cases, checkpointed
from .test_attention import laid, library

DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cpu" else (torch.bfloat16, torch.float16)


def apart(rows: list[list[int]], window: int | None = None) -> Tensor:
    """The mask, (rows, 1, length, length), of rows of documents of these lengths."""
    places = torch.arange(sum(rows[0]), device=DEVICE)
    number = torch.stack([torch.repeat_interleave(torch.tensor(r)) for r in rows]).to(DEVICE)
    allowed = (number[:, :, None] == number[:, None, :]) & (places <= places[:, None])
    if window is not None:
        allowed &= places > places[:, None] - window
    return allowed[:, None]


def as_numbers(mask: Tensor, dtype: torch.dtype, lowest: float) -> Tensor:
    """``mask`` as numbers to add."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


@drawn
def lengths(draw: st.DrawFn) -> list[list[int]]:
    """Rows of one length, cut into documents anyhow."""
    total, rows = draw(st.integers(2, 24)), draw(st.integers(1, 3))
    cuts = [sorted(draw(st.sets(st.integers(1, total - 1), max_size=5))) for _ in range(rows)]
    return [[b - a for a, b in zip([0, *c], [*c, total], strict=True)] for c in cuts]


@drawn
def calls(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``attention`` with a mask of documents."""
    rows, window = draw(lengths()), draw(among((None, None, 1, 2, 5)))
    mask = apart(rows, window)
    if draw(st.booleans()):
        mask = as_numbers(mask, dtype, draw(among((-torch.inf, torch.finfo(dtype).min))))
    group, width = draw(among((1, 2))), draw(among((8, 16)))
    order = draw(among(("by head", "by token", "sliced")))
    q, k, v = (
        laid(i, (len(rows), h, sum(rows[0]), width), dtype, order).requires_grad_(draw(st.booleans()))
        for i, h in enumerate((2 * group, 2, 2))
    )
    return {"q": q, "k": k, "v": v, "mask": mask, "is_causal": False, "scale": draw(among((None, 0.3)))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_the_mask(dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(calls(dtype))
    assert documents(inputs["mask"], inputs["q"], inputs["k"]) is not None
    assert_accurate(attention, library, inputs, reduction=80, scale=10.0)


def empty(length: int, rows: int = 1) -> Tensor:
    """Something of the shape of q."""
    return torch.empty(rows, 2, length, 8, device=DEVICE)


@cases
@given(rows=lengths(), window=among((None, 1, 2, 5)))
def test_documents_are_found(rows: list[list[int]], window: int | None) -> None:
    q = empty(sum(rows[0]), len(rows))
    found = documents(apart(rows, window), q, q)
    assert found is not None
    if window != 1:
        ends = torch.tensor([0, *(n for r in rows for n in r)]).cumsum(0)
        assert found.ends.tolist() == ends.tolist() and found.longest == max(map(max, rows))
        cut = window is not None and found.longest > window
        assert found.window == (window if cut else None)
        assert found.whole_rows == (all(len(r) == 1 for r in rows) and not cut)


@cases
@given(rows=lengths(), at=st.integers(0, 2**16), window=among((None, 2)))
def test_one_entry_that_differs_is_seen(rows: list[list[int]], at: int, window: int | None) -> None:
    """What is found describes the mask to the last entry, whichever is turned."""
    mask = apart(rows, window)
    mask.view(-1)[at % mask.numel()] ^= True
    q = empty(sum(rows[0]), len(rows))
    found = documents(mask, q, q)
    if found is not None:
        ends = found.ends.tolist()
        flat = [b - a for a, b in pairwise(ends)]
        again: list[list[int]] = []
        for n in flat:
            if not again or sum(again[-1]) == sum(rows[0]):
                again.append([])
            again[-1].append(n)
        assert torch.equal(apart(again, found.window), mask)


OTHERS = {
    "padding behind": lambda m: m & (torch.arange(6, device=DEVICE) < 4),
    "padding in front": lambda m: m & (torch.arange(6, device=DEVICE) > 1),
    "both ways": lambda m: m | m.transpose(-1, -2),
    "a prefix that all see": lambda m: m | (torch.arange(6, device=DEVICE) < 2),
    "other for each head": lambda m: m.expand(2, 2, 6, 6),
    "one row for all": lambda m: m[:, :, :1],
    "numbers between": lambda m: as_numbers(m, torch.float32, -5.0),
    "a bias": lambda m: as_numbers(m, torch.float32, -torch.inf) - torch.arange(6.0, device=DEVICE),
    "not a number": lambda m: as_numbers(m, torch.float32, torch.nan),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay_masks(name: str) -> None:
    q = empty(6, 2)
    assert documents(OTHERS[name](apart([[2, 4], [6]])), q, q) is None


def test_a_mask_is_looked_at_once_and_again_when_written() -> None:
    mask, q = apart([[2, 4], [6]]), empty(6, 2)
    with patch.object(module, "_look", wraps=module._look) as look:
        for alias in (mask, mask, mask.detach(), mask[:, :], mask.view(2, 1, 6, 6)):
            assert documents(alias, q, q) is not None
        assert look.call_count == 1
        mask[0, 0, 3, 0] = True
        assert documents(mask, q, q) is None and look.call_count == 2


def test_masks_that_are_gone_are_forgotten() -> None:
    gc.collect()  # those of other tests
    q = empty(6, 2)
    for _ in range(5):
        documents(apart([[2, 4], [6]]), q, q)
    assert sum(not ref.expired() for ref, *_ in module._seen.values()) <= len(module._seen) <= 2


def test_a_mask_whose_changes_do_not_show_stays_a_mask() -> None:
    with torch.inference_mode():
        q, mask = empty(6, 2), apart([[2, 4], [6]])
        assert documents(mask, q, q) is None
        assert attention(q.normal_(), q, q, mask).isfinite().all()


def test_the_cost_is_that_of_the_documents() -> None:
    if DEVICE == "cuda":
        pytest.skip("counted on the CPU, where every document is a call of its own")
    shapes = list[Any]()
    real = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(q.shape[2])
        return real(q, *args, **kwargs)

    q = laid(0, (1, 2, 12, 8), torch.float32, "by token")
    with patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", counted):
        attention(q, q, q, apart([[3, 5, 4]]))
    assert shapes == [3, 5, 4]


def test_opcheck() -> None:
    q, k, v = (laid(i, (2, h, 6, 8), DTYPES[-1], "by token").requires_grad_() for i, h in enumerate((4, 2, 2)))
    route = Route.CPU if DEVICE == "cpu" else Route.EFFICIENT
    torch.library.opcheck(_attention.overload, (q, k, v, apart([[2, 4], [6]]), False, None, int(route)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_changes_nothing(use_reentrant: bool) -> None:
    mask = apart([[2, 4], [6]])
    leaves = [laid(i, (2, h, 6, 8), DTYPES[0], "by token").requires_grad_() for i, h in enumerate((4, 2, 2))]
    got = checkpointed(lambda *t: attention(*t, mask=mask), use_reentrant, leaves)
    wanted = torch.autograd.grad(attention(*leaves, mask=mask).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
