"""Attention over keys and values of fewer heads than queries, which are read as they are (GQA, arXiv:2305.13245).

Head h of q reads head h // (heads of q / heads of k) of k and v:

    s = scale · q kᵀ + mask        p = softmax(s)        y = p v
    dv = sum over the group of pᵀ dy
    ds = p · (dy vᵀ - (dy · y) summed over head_dim)
    dq = scale · ds k        dk = sum over the group of scale · dsᵀ q

The kernels are torch's (``attention_backends.py``): cuDNN's where the shapes and dtypes allow and there is no mask, else what
``scaled_dot_product_attention`` picks; on a CPU its own, so that no bit changes. Saved for the backward: q, k, v, the mask, y,
and the logarithm of each row's denominator; k and v never repeated. The result lies in memory as (batch, length, heads,
head_dim), so that merging the heads behind it costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_backends as backends
from .attention_backends import Route
from .dispatch import compute_dtype, owned
from .operator import operator


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`attention`."""
    wide = compute_dtype(q)
    k, v = (backends.repeated(t, q.shape[1]).to(wide) for t in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    bias = backends.additive(mask, q)
    scores = scores if bias is None else scores + bias
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return (scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v).to(q.dtype)


@operator("weft::attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, route: int
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each row's denominator."""
    with owned():
        return backends.forward(Route(route), q, k, v, mask, is_causal, scale)


@_attention.register_fake
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, route: int
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=compute_dtype(q))
    return _by_token(q, (batch, heads, length, v.shape[-1])), lse


def _by_token(x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    batch, heads, length, width = shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


@operator("weft::attention_backward")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float | None, route: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v: one kernel computes all three, whichever are asked for."""
    return backends.backward(Route(route), grad, q, k, v, mask, out, lse, is_causal, scale)


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float | None, route: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _by_token(q, q.shape), _by_token(k, k.shape), _by_token(v, v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale, ctx.route = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, *output)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    q, k, v, mask, out, lse = ctx.saved_tensors
    found = _attention_backward(grad, q, k, v, mask, out, lse, ctx.is_causal, ctx.scale, ctx.route)
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)), *(None,) * 4


_attention.register_autograd(_gradients, setup_context=_setup_context)


@torch.compiler.allow_in_graph
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, with keys and values that several heads of q may share.

    Args:
        q: (batch, heads, length, head_dim), any floating-point dtype and strides.
        k: (batch, heads of k, keys, head_dim); the heads of k divide those of q.
        v: (batch, heads of k, keys, any width).
        mask: broadcast to (batch, heads, length, keys). Of bools: True where a query may read a key. Of numbers: added to
            the scores. Rows that may read nothing are zero. It gets a gradient if it requires one.
        is_causal: query i reads keys 0 to i alone; not together with a mask.
        scale: None: 1 / √head_dim.

    Returns:
        (batch, heads, length, width of v) in q's dtype, in the memory order (batch, length, heads, width).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(q, k, v, mask, is_causal)
    if not q.numel():  # torch 2.11 returns no tensor for no rows in 16 bits
        return reference(q, k, v, mask, is_causal=is_causal, scale=scale)
    if mask is not None and _tracked(mask) and not _tracked(q, k, v):
        # the library keeps what a backward needs only if q, k or v asks for one: its fused kernels then fail in it
        return reference(q, k, v, mask, scale=scale)
    route, repeat = backends.choose(q, k, v, mask, is_causal, scale)
    if route is Route.PLAIN or (q.shape[2] == 1 and not _tracked(q, k, v)):
        heads = q.shape[1]
        k, v = (backends.repeated(t, heads) if repeat else t for t in (k, v))
        grouped = bool(heads != k.shape[1])
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return _attention(q, k, v, mask, is_causal, scale, int(route))[0]


def _tracked(*tensors: Tensor) -> bool:
    """Whether one of ``tensors`` needs a gradient. A single query that needs none gains nothing from an operator of its own."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    if not (q.dim() == k.dim() == v.dim() == 4 and q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise ValueError(f"need floating-point tensors of four dimensions and one dtype: {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch, keys and head_dim must agree: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k must divide those of q: {shapes}")
    if mask is not None and is_causal:
        raise ValueError("a mask says by itself what is causal: pass one of mask and is_causal")
