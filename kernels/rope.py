"""Rotary position embedding of queries and keys in one launch (RoFormer, arXiv:2104.09864).

Pairs (a, b) of the first R = ``rotary_dim`` elements turn by the angles in the tables; the others pass unchanged:

    y_a = x_a · cos_a - x_b · sin_a            dx_a = dy_a · cos_a + dy_b · sin_b
    y_b = x_b · cos_b + x_a · sin_b            dx_b = dy_b · cos_b - dy_a · sin_a

    dcos_a = sum of dy_a · x_a        dsin_a = - sum of dy_a · x_b        over what the table was broadcast to
    dcos_b = sum of dy_b · x_b        dsin_b =   sum of dy_b · x_a

A pair is (i, i + R/2), or (2i, 2i + 1) if ``interleaved``. A table of R entries has one for each element, and its two
need not be equal; one of R/2 entries serves both elements of a pair; so does one of R/2 complex numbers, cos + i·sin.
The backward is the forward with
(sin_a, sin_b) replaced by (-sin_b, -sin_a). Arithmetic is in float32 and rounds once, at the end. Saved for the
backward: cos and sin; x only if a table needs a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import compute_dtype, use_triton
from .operator import operator
from .toolchain import tl, triton

TILE = 2048
"""Pairs that a program turns at a time."""
WARPS = 8


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The formula in plain differentiable torch; arguments as in :func:`rope`."""
    return reference_single(q, cos, sin, **options), reference_single(k, cos, sin, **options)


def reference_single(
    x: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`rope_single`."""
    rotary_dim = _rotated(cos) if rotary_dim is None else rotary_dim
    cos, sin = _tables(cos, sin)
    wide = x.to(compute_dtype(x))
    a, b = _pair(wide[..., :rotary_dim], interleaved)
    (cos_a, cos_b), (sin_a, sin_b) = (_entries(t.to(wide.dtype), rotary_dim, interleaved) for t in (cos, sin))
    turned = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((y, wide[..., rotary_dim:]), -1).to(dtype or x.dtype)


def _rotated(cos: Tensor) -> int:
    """Elements that tables turn which do not say otherwise."""
    return cos.shape[-1] * (2 if cos.is_complex() else 1)


def _tables(cos: Tensor, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine and sine; of complex numbers, views of both."""
    if cos.is_complex() != (sin is None):
        raise ValueError("a complex table is cosine and sine in one, a real one needs its sine beside it")
    if sin is not None:
        return cos, sin
    real, imaginary = torch.view_as_real(cos.resolve_conj()).unbind(-1)
    return real, imaginary


def _pair(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second element of every pair."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _entries(table: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of a table's entries for the first and the second element of every pair."""
    return _pair(table, interleaved) if table.shape[-1] == rotary_dim else (table, table)


@triton.jit
def _load(start, step, there, HALF: tl.constexpr, FAR: tl.constexpr, ADJACENT: tl.constexpr, PAIRS: tl.constexpr):
    """Both elements of each pair, (tokens, heads, PAIRS) in float32, of the rows at ``start`` (tokens, heads, 1).

    Interleaved ones are read as they lie and split in registers: strided reads would cost twice.
    """
    if ADJACENT:
        lane = tl.arange(0, 2 * PAIRS).to(tl.int64)[None, None, :]
        both = tl.load(start + lane * step, mask=there & (lane < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (start.shape[0], start.shape[1], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS).to(tl.int64)[None, None, :]
        a = tl.load(start + pair * step, mask=there & (pair < HALF), other=0.0).to(tl.float32)
        b = tl.load(start + (pair + FAR) * step, mask=there & (pair < HALF), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(start, step, there, a, b, HALF: tl.constexpr, ADJACENT: tl.constexpr, PAIRS: tl.constexpr):
    """Writes what :func:`_load` reads, where FAR is HALF."""
    if ADJACENT:
        lane = tl.arange(0, 2 * PAIRS).to(tl.int64)[None, None, :]
        both = tl.reshape(tl.join(a, b), (start.shape[0], start.shape[1], 2 * PAIRS))
        tl.store(start + lane * step, both, mask=there & (lane < 2 * HALF))
    else:
        pair = tl.arange(0, PAIRS).to(tl.int64)[None, None, :]
        tl.store(start + pair * step, a, mask=there & (pair < HALF))
        tl.store(start + (pair + HALF) * step, b, mask=there & (pair < HALF))


@triton.jit
def _start(x, strides, outer, inner, head):
    """Addresses of the rows (tokens, heads, 1)."""
    return x + outer * strides[0] + inner * strides[1] + head * strides[2]


@triton.jit
def _finish(
    source, target, source_step, target_step, live, a, b, cos_a, cos_b, sin_a, sin_b,
    HALF: tl.constexpr, REST: tl.constexpr, ADJACENT: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Turns what was read, and copies the last REST elements of each row."""
    _store(target, target_step, live, a * cos_a - b * sin_a, b * cos_b + a * sin_b, HALF, ADJACENT, PAIRS)
    if REST > 0:
        lane = tl.arange(0, LANES).to(tl.int64)[None, None, :]
        rest = tl.load(source + (2 * HALF + lane) * source_step, mask=live & (lane < REST), other=0.0)
        tl.store(target + (2 * HALF + lane) * target_step, rest, mask=live & (lane < REST))


@triton.jit(do_not_specialize=["tokens", "inner_size"])
def _kernel(
    q, q_out, k, k_out, cos, sin, q_strides, q_out_strides, k_strides, k_out_strides, cos_strides, sin_strides,
    q_heads, k_heads, tokens, inner_size, steps, direction,
    HALF: tl.constexpr, FAR: tl.constexpr, REST: tl.constexpr, ADJACENT: tl.constexpr, ADJACENT_ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr, LANES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens, turned back if ``direction`` is negative. Every step reads its heads of q and of k before it
    turns either."""
    token = (tl.program_id(0).to(INDEX) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    outer, inner, there = (token // inner_size).to(tl.int64), (token % inner_size).to(tl.int64), token < tokens
    cos += outer * cos_strides[0] + inner * cos_strides[1]
    sin += outer * sin_strides[0] + inner * sin_strides[1]
    cos_a, cos_b = _load(cos, cos_strides[3], there, HALF, FAR, ADJACENT_ENTRIES, PAIRS)  # pyright: ignore
    sin_a, sin_b = _load(sin, sin_strides[3], there, HALF, FAR, ADJACENT_ENTRIES, PAIRS)
    # not a constant: forward and backward are one kernel to compile
    sin_a, sin_b = tl.where(direction < 0, -sin_b, sin_a), tl.where(direction < 0, -sin_a, sin_b)
    for step in range(steps):
        head = (step * Q_HEADS + tl.arange(0, Q_HEADS)).to(tl.int64)[None, :, None]
        source, target = _start(q, q_strides, outer, inner, head), _start(q_out, q_out_strides, outer, inner, head)
        live = there & (head < q_heads)
        a, b = _load(source, q_strides[3], live, HALF, HALF, ADJACENT, PAIRS)  # pyright: ignore
        if K_HEADS > 0:
            head = (step * K_HEADS + tl.arange(0, K_HEADS)).to(tl.int64)[None, :, None]
            k_source, k_target = (
                _start(k, k_strides, outer, inner, head),
                _start(k_out, k_out_strides, outer, inner, head),
            )
            k_live = there & (head < k_heads)
            k_a, k_b = _load(k_source, k_strides[3], k_live, HALF, HALF, ADJACENT, PAIRS)  # pyright: ignore
        _finish(
            source, target, q_strides[3], q_out_strides[3], live, a, b, cos_a, cos_b, sin_a, sin_b,
            HALF, REST, ADJACENT, PAIRS, LANES,
        )  # fmt: skip
        if K_HEADS > 0:
            _finish(
                k_source, k_target, k_strides[3], k_out_strides[3], k_live, k_a, k_b, cos_a, cos_b, sin_a, sin_b,
                HALF, REST, ADJACENT, PAIRS, LANES,
            )  # fmt: skip


def _launch(
    xs: list[Tensor], outs: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, transposed: bool
) -> None:
    """Run the kernel over one or two 4-d tensors that differ in one dimension at most, one which shares the tables."""
    head = _head_dim(xs, cos)
    if cos.shape[head] > 1:
        for i in range(cos.shape[head]):
            x, y, (c, s) = ([t.narrow(head, i, 1) for t in group] for group in (xs, outs, (cos, sin)))
            _launch(x, y, c, s, rotary_dim, interleaved, transposed)
        return
    order = (*(d for d in range(3) if d != head), head, 3)
    xs, outs = [x.permute(order) for x in xs], [y.permute(order) for y in outs]
    cos, sin = (t.permute(order).expand(*xs[0].shape[:2], 1, -1) for t in (cos, sin))
    tensors = (xs[0], outs[0], xs[-1], outs[-1], cos, sin)
    q_heads, k_heads = xs[0].shape[2], xs[1].shape[2] if len(xs) > 1 else 0
    count, half, rest = cos.shape[0] * cos.shape[1], rotary_dim // 2, xs[0].shape[3] - rotary_dim
    full, pairs = cos.shape[-1] == rotary_dim, triton.next_power_of_2(half)
    q_block, k_block, tokens = _tile(q_heads, k_heads, count, pairs)  # pyright: ignore
    steps = max(triton.cdiv(q_heads, q_block), triton.cdiv(k_heads, max(k_block, 1)))
    kernel: Any = _kernel
    with torch.cuda.device_of(cos):
        kernel[(triton.cdiv(count, tokens),)](
            *tensors, *(t.stride() for t in tensors), q_heads, k_heads, count, cos.shape[1], steps, -1.0 if transposed else 1.0,
            HALF=half, FAR=half if full else 0, REST=rest,
            ADJACENT=interleaved, ADJACENT_ENTRIES=interleaved and full,
            TOKENS=tokens, Q_HEADS=q_block, K_HEADS=k_block, PAIRS=pairs, LANES=triton.next_power_of_2(max(rest, 1)),
            INDEX=tl.int32 if count < 2**30 else tl.int64, num_warps=WARPS,
        )  # fmt: skip


def _head_dim(xs: list[Tensor], table: Tensor) -> int:
    """The dimension along which tensors may differ, or else the one along which most elements share the tables."""
    differing = [d for d in range(3) if xs[0].shape[d] != xs[-1].shape[d]]
    shared = [d for d in range(3) if table.shape[d] == 1]
    return max(differing or shared or [1], key=lambda d: (d > 0, xs[0].shape[d]))


def _tile(q_heads: int, k_heads: int, tokens: int, pairs: int) -> tuple[int, int, int]:
    """How many heads of q, heads of k, and tokens a program takes at a time; 0 heads of k skip k."""
    rows = max(TILE // pairs, 1)
    q_block, k_block = (min(triton.next_power_of_2(max(h, 1)), rows) for h in (q_heads, k_heads))
    together = min(rows // max(q_block, k_block), triton.next_power_of_2(tokens))
    return q_block, k_block if k_heads else 0, together  # pyright: ignore


def _turn(
    xs: list[Tensor], outs: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, transposed: bool
) -> None:
    """Turn ``xs`` into ``outs``, back if ``transposed``."""
    if not use_triton(xs[0]) or torch.float64 in (xs[0].dtype, outs[0].dtype):
        _turn_plain(xs, outs, cos, sin, rotary_dim, interleaved, transposed)
    elif any(x.numel() for x in xs):
        x, y, (cos, sin) = ([t[(None,) * (4 - t.dim())] for t in group] for group in (xs, outs, (cos, sin)))
        once = tuple(slice(1 if cos.stride(d) == sin.stride(d) == 0 else None) for d in range(3))
        _launch(x, y, cos[once], sin[once], rotary_dim, interleaved, transposed)


def _turn_plain(
    xs: list[Tensor], outs: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, transposed: bool
) -> None:
    dtype = compute_dtype(xs[0])
    cos_ab, (sin_a, sin_b) = cos.to(dtype), _entries(sin.to(dtype), rotary_dim, interleaved)
    if cos.shape[-1] < rotary_dim:
        cos_ab = cos_ab.repeat_interleave(2, -1) if interleaved else torch.cat((cos_ab, cos_ab), -1)
    if transposed:
        sin_a, sin_b = -sin_b, -sin_a
    for x, out in zip(xs, outs, strict=True):
        wide = x.to(dtype)
        y = out if out.dtype == dtype else torch.empty_like(wide)
        (a, b), (y_a, y_b) = (_pair(t[..., :rotary_dim], interleaved) for t in (wide, y))
        torch.mul(wide[..., :rotary_dim], cos_ab, out=y[..., :rotary_dim])
        y_a.addcmul_(b, sin_a, value=-1)
        y_b.addcmul_(a, sin_b)
        y[..., rotary_dim:] = wide[..., rotary_dim:]
        if y is not out:
            out.copy_(y)


@operator("weft::rope")
def _rope(
    xs: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> list[Tensor]:
    outs = _rope_fake(xs, cos, sin, rotary_dim, interleaved, dtype)
    _turn(xs, outs, cos, sin, rotary_dim, interleaved, False)
    return outs


@_rope.register_fake
def _rope_fake(
    xs: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> list[Tensor]:
    return [torch.empty_like(x, dtype=dtype) for x in xs]


@operator("weft::rope_backward")
def _rope_backward(
    grads: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, dtype: torch.dtype,
    strides: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the ``xs`` whose outputs have ``grads``, with the ``strides`` of one after those of the other."""
    outs = _rope_backward_fake(grads, cos, sin, rotary_dim, interleaved, dtype, strides)
    _turn(grads, outs, cos, sin, rotary_dim, interleaved, True)
    return outs


@_rope_backward.register_fake
def _rope_backward_fake(
    grads: list[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, dtype: torch.dtype,
    strides: list[int],
) -> list[Tensor]:  # fmt: skip
    rank = grads[0].dim()
    return [g.new_empty_strided(g.shape, strides[i * rank : (i + 1) * rank], dtype=dtype) for i, g in enumerate(grads)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, cos, sin, ctx.rotary_dim, ctx.interleaved, _ = inputs
    learns = cos.requires_grad or sin.requires_grad
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(y for x, y in zip(xs, output, strict=True) if not (learns or x.requires_grad)))
    ctx.dtype, ctx.strides = xs[0].dtype, [y.stride() for y in output]
    ctx.save_for_backward(cos, sin, *(xs if learns else ()))


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    cos, sin, *xs = ctx.saved_tensors
    needs_x, needs_cos, needs_sin, *_ = ctx.needs_input_grad
    dxs: list[Tensor | None] = [None] * len(grads)
    live = [i for i, g in enumerate(grads) if g is not None and needs_x[i]]
    if live:
        strides = [s for i in live for s in ctx.strides[i]]
        wanted: Any = [grads[i] for i in live]
        found = _rope_backward(wanted, cos, sin, ctx.rotary_dim, ctx.interleaved, ctx.dtype, strides)
        for i, dx in zip(live, found, strict=True):
            dxs[i] = dx
    dcos = dsin = None
    if (needs_cos or needs_sin) and any(g is not None for g in grads):
        dcos, dsin = _table_gradients(xs, grads, cos, ctx.rotary_dim, ctx.interleaved)
    return dxs, dcos if needs_cos else None, dsin if needs_sin else None, None, None, None


def _table_gradients(
    xs: list[Tensor], grads: list[Tensor | None], table: Tensor, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin, in plain torch: tables that learn are rare."""
    totals = []
    for x, grad in zip(xs, grads, strict=True):
        if grad is None:
            continue
        (a, b), (da, db) = (_pair(t.to(compute_dtype(x))[..., :rotary_dim], interleaved) for t in (x, grad))
        for first, second in ((da * a, db * b), (-da * b, db * a)):
            if table.shape[-1] < rotary_dim:
                both = first + second
            else:
                both = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
            totals.append(both.sum_to_size(table.shape))
    return sum(totals[2::2], totals[0]).to(table.dtype), sum(totals[3::2], totals[1]).to(table.dtype)


_rope.register_autograd(_gradients, setup_context=_setup_context)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by their positions, in one pass over memory (RoFormer, arXiv:2104.09864).

    Args:
        q: (..., D) of two to four dimensions, any floating-point dtype and strides, such as (B, H, T, D) or
            (B, T, H, D).
        k: like ``q``, from which it may differ in the size of one dimension, along which the tables are then shared.
        cos: (..., R) or (..., R/2), broadcast against ``q``'s leading dimensions; any floating-point dtype.
            Or (..., R/2) of a complex dtype: cos + i·sin.
        sin: like ``cos``, of the same shape; None if ``cos`` is complex.
        interleaved: whether pairs are (2i, 2i + 1), instead of (i, i + R/2).
        rotary_dim: R, even, at most D; the other D - R elements pass unchanged. None: as wide as the tables.
        dtype: of the results; None: ``q``'s.

    Returns:
        q and k, turned, in the memory order of each.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    rotary_dim = _rotated(cos) if rotary_dim is None else rotary_dim
    cos, sin = _tables(cos, sin)
    for x in (q, k):
        _check(x, cos, sin, rotary_dim)
    differing = [d for d in range(q.dim()) if q.dim() != k.dim() or q.shape[d] != k.shape[d]]
    if q.dtype != k.dtype or len(differing) > 1 or differing == [q.dim() - 1]:
        raise ValueError(
            f"q and k must agree in dtype and all sizes but one: {q.dtype} {tuple(q.shape)}, {k.dtype} {tuple(k.shape)}"
        )
    q_out, k_out = _rope([q, k], cos, sin, rotary_dim, interleaved, dtype or q.dtype)
    return q_out, k_out


def rope_single(
    x: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`rope` of one tensor; same arguments, same errors."""
    rotary_dim = _rotated(cos) if rotary_dim is None else rotary_dim
    cos, sin = _tables(cos, sin)
    _check(x, cos, sin, rotary_dim)
    return _rope([x], cos, sin, rotary_dim, interleaved, dtype or x.dtype)[0]


def _check(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, rotary_dim {rotary_dim}"
    if not 2 <= x.dim() <= 4 or not all(t.is_floating_point() for t in (x, cos, sin)):
        raise ValueError(f"need floating-point tensors, x of two to four dimensions: {shapes}")
    if not x.device == cos.device == sin.device:
        raise ValueError(f"x, cos and sin are on {x.device}, {cos.device} and {sin.device}")
    if cos.shape != sin.shape or cos.shape[-1] not in (rotary_dim, rotary_dim // 2):
        raise ValueError(f"cos and sin must both have rotary_dim entries, or both half of it: {shapes}")
    if rotary_dim % 2 or not 0 < rotary_dim <= x.shape[-1]:
        raise ValueError(f"rotary_dim must be even and at most x's last size: {shapes}")
    sizes = zip(reversed(cos.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if cos.dim() > x.dim() or not all(t in (1, n) for t, n in sizes):
        raise ValueError(f"cos and sin do not broadcast to x: {shapes}")
