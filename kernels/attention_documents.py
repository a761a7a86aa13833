"""Attention among the tokens of each document of a packed row alone: its cost follows the sum of squared lengths.

That a mask says no more than this is seen by looking at it, once for each mask, not for each layer that it is given to. Query
i of a row reads the nᵢ keys up to and including its own. Within a document, n grows by one from token to token until it
reaches the window, if there is one; it is 1 where a document starts. A mask for which all of that holds is replaced by the
documents' ends: flash attention over ragged rows on a GPU, document by document on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .dispatch import records


@dataclass(frozen=True)
class Documents:
    """What a mask says, where it says that documents do not see each other."""

    ends: Tensor
    """(documents + 1) int32, on the mask's device: where each starts in all rows behind one another, and the last one's end."""
    longest: int
    window: int | None
    """How many keys a query reads at most; None: all of its document up to itself."""
    whole_rows: bool
    """Whether every row is one document: the mask is then the causal one."""


_ROWS = 1024
"""Queries whose part of a mask is looked at together: what that takes in memory does not grow with the square of the length."""

_seen: dict[int, tuple[StorageWeakRef, Any, Documents | None]] = {}
"""What masks say, by the memory that they are in: a layer may be given a view of the mask, or an alias of it."""


def documents(mask: Tensor | None, q: Tensor, k: Tensor) -> Documents | None:
    """The documents that ``mask`` keeps apart, if that and causality is all it does."""
    if mask is None or mask.requires_grad or q.shape[2] != k.shape[2] or not _can_look(mask, q):
        return None
    memory = StorageWeakRef(mask.untyped_storage())
    state = (mask._version, mask.dtype, mask.shape, mask.stride(), mask.storage_offset(), q.shape[0])
    known = _seen.get(memory.cdata)
    if known is not None and not known[0].expired() and known[1] == state:
        return known[2]
    found = _look(mask, q.shape[0])
    for gone in [key for key, (ref, *_) in _seen.items() if ref.expired()]:
        del _seen[gone]
    _seen[memory.cdata] = (memory, state, found)
    return found


def _can_look(mask: Tensor, q: Tensor) -> bool:
    """A mask of one row for each query, alike for all heads; none that may change and not show it, as in a CUDA graph."""
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    square = (
        mask.numel() > 0
        and q.numel() > 0
        and shape[1] == 1
        and shape[0] in (1, q.shape[0])
        and shape[2] == shape[3] == q.shape[2] > 1
    )
    return square and not mask.is_inference() and not records()


def _look(mask: Tensor, rows: int) -> Documents | None:
    mask = mask.reshape(-1, *mask.shape[-2:])
    parts = [_counts(part, at * _ROWS) for at, part in enumerate(mask.split(_ROWS, 1))]
    count, sound = torch.cat([c for c, _ in parts], 1), torch.stack([s for _, s in parts]).all()
    before, after, most = count[:, :-1], count[:, 1:], count.max()
    sound &= ((after == torch.minimum(before + 1, most)) | (after == 1)).all()
    stopped = ((after == most) & (before == most) & (most > 1)).any()
    if not bool(sound):
        return None
    count = count.expand(rows, -1).reshape(-1)
    ends = torch.cat(((count == 1).nonzero()[:, 0], count.new_tensor([count.numel()])))
    window = int(most) if bool(stopped) else None
    return Documents(ends.int(), int(ends.diff().max()), window, window is None and len(ends) == rows + 1)


def _counts(mask: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """How many keys up to itself each query reads, from the one at ``start``, and whether those are all that it reads."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    key = torch.arange(mask.shape[-1], device=mask.device)
    query = torch.arange(start, start + mask.shape[-2], device=mask.device)
    first = allowed.to(torch.uint8).argmax(-1)
    sound = (allowed == ((key >= first[..., None]) & (key <= query[:, None]))).all()
    if mask.dtype != torch.bool:
        sound &= (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()
    return query - first + 1, sound


def forward(
    found: Documents, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, in the memory order (batch, length, heads, head_dim), and the logarithm of each row's denominator."""
    if q.is_cuda:
        window = _window(found)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(_rows(x) for x in (q, k, v)), found.ends, found.ends, found.longest, found.longest, 0.0,
            found.window is None, False, scale=scale, **window,
        )  # fmt: skip
        batch, heads, length, _ = q.shape
        return _unrowed(out, batch), lse.view(heads, batch, length).transpose(0, 1).contiguous()
    out, lse = (
        torch.empty_like(_by_token(q)),
        q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
    )
    for row, start, stop in _each(found, q.shape[2]):
        piece = _piece(row, start, stop)
        bias = _band(found, stop - start, q)
        out[piece], lse[piece] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[piece], k[piece], v[piece], 0.0, bias is None, attn_mask=bias, scale=scale
        )
    return out, lse


def backward(
    found: Documents, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if q.is_cuda:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        heads = q.shape[1]
        flat = lse.transpose(0, 1).reshape(heads, -1)
        grads = torch.ops.aten._flash_attention_backward(
            *(_rows(x) for x in (grad, q, k, v, out)), flat, found.ends, found.ends, found.longest, found.longest, 0.0,
            found.window is None, *unused, scale=scale, **_window(found),
        )  # fmt: skip
        dq, dk, dv = (_unrowed(g, q.shape[0]) for g in grads)
        return dq, dk, dv
    heads, (k, v) = k.shape[1], alone(k, v, q)
    dq, dk, dv = (torch.empty_like(_by_token(x)) for x in (q, k, v))
    for row, start, stop in _each(found, q.shape[2]):
        piece = _piece(row, start, stop)
        bias = _band(found, stop - start, q)
        inner = lse[piece].transpose(1, 2).contiguous().transpose(1, 2)
        dq[piece], dk[piece], dv[piece] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x[piece] for x in (grad, q, k, v, out)), inner, 0.0, bias is None, attn_mask=bias, scale=scale
        )
    return dq, summed(dk, heads), summed(dv, heads)


def repeated(x: Tensor, heads: int) -> Tensor:
    """k or v with every head repeated for each of the heads of q that reads it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def alone(k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """k and v for a CPU's backward, which in narrow dtypes rounds the sum over a group once for each head of it."""
    wide = q.dtype in (torch.float32, torch.float64)
    return (k, v) if wide else (repeated(k, q.shape[1]), repeated(v, q.shape[1]))


def summed(grad: Tensor, heads: int) -> Tensor:
    """The gradient of a head that several heads of q read, (batch, heads, length, head_dim)."""
    if grad.shape[1] == heads:
        return grad
    return grad.transpose(1, 2).unflatten(2, (heads, -1)).sum(3).transpose(1, 2)


def _window(found: Documents) -> dict[str, int]:
    return {} if found.window is None else {"window_size_left": found.window - 1, "window_size_right": 0}


def _rows(x: Tensor) -> Tensor:
    """(batch, heads, length, width) as (batch · length, heads, width)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _unrowed(x: Tensor, batch: int) -> Tensor:
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def _by_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _each(found: Documents, length: int) -> list[tuple[int, int, int]]:
    """Row, start and stop of every document; none spans two rows."""
    ends = found.ends.tolist()
    return [(a // length, a % length, a % length + b - a) for a, b in pairwise(ends)]


def _piece(row: int, start: int, stop: int) -> tuple[slice, slice, slice]:
    return slice(row, row + 1), slice(None), slice(start, stop)


def _band(found: Documents, length: int, q: Tensor) -> Tensor | None:
    """The mask of a window inside a document that is longer than it."""
    if found.window is None or length <= found.window:
        return None
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - found.window)
    return torch.zeros(length, length, dtype=q.dtype, device=q.device).masked_fill_(~allowed, -torch.inf)
