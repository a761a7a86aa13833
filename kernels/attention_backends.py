"""Which of torch's attention kernels serves a call, and how each is called forward and backward.

All take k and v of fewer heads than q, compute in q's dtype, and hand over one form of everything: results and gradients
in the memory order (batch, length, heads, head_dim), the logarithm of the softmax's denominator as (batch, heads, length).
Grouped heads: cuDNN's, flash attention's and the CPU's kernels read k and v as they are; the memory-efficient one gets
them repeated, and its gradients are summed over the group.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    flash_sdp_enabled,
    is_flash_attention_available,
)

from . import attention_documents as ragged
from .attention_documents import Documents, repeated, summed
from .dispatch import compute_dtype

_MASK_ALIGNMENT = 8
"""The memory-efficient kernel reads rows of a mask that start at multiples of so many elements."""
_ALIGNMENT = 16
"""Bytes at multiples of which cuDNN reads vectors."""
_WIDEST_RAGGED = 256
"""Flash attention's widest head."""


class Route(IntEnum):
    """A kernel; those of CUDA have the numbers of ``torch.nn.attention.SDPBackend``."""

    PLAIN = 0
    """None of ours: ``scaled_dot_product_attention`` decides, and autograd saves what it saves."""
    FLASH = 1
    EFFICIENT = 2
    CUDNN = 3
    CPU = 10


def choose(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Route, bool]:
    """The kernel for a call, from shapes, dtypes and torch's own switches; whether k and v must be repeated for it."""
    grouped = bool(k.shape[1] != q.shape[1])
    if mask is not None and (mask.requires_grad or mask.dtype not in (torch.bool, q.dtype)):
        return Route.PLAIN, grouped
    if q.device.type == "cpu":
        chosen = torch.ops.aten._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
        return (Route.CPU if chosen == Route.FLASH else Route.PLAIN), False
    if q.device.type != "cuda" or q.shape[-1] % 8 or v.shape[-1] % 8:
        return Route.PLAIN, grouped
    if mask is None and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, is_causal, grouped)):
        return Route.CUDNN, False
    return _chosen_by_torch(q, k, v, mask, is_causal, scale, grouped)


def _chosen_by_torch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, grouped: bool
) -> tuple[Route, bool]:
    """What ``scaled_dot_product_attention`` would run; where only its slowest kernel takes groups, with k and v repeated."""
    chosen = torch.ops.aten._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    if chosen or not grouped:
        return _known(chosen), False
    one_head = (t[:, :1].expand(-1, q.shape[1], -1, -1) for t in (k, v))  # the sizes of the repeated ones, uncomputed
    return _known(torch.ops.aten._fused_sdp_choice(q, *one_head, mask, 0.0, is_causal, scale=scale)), True


def _known(backend: int) -> Route:
    return Route(backend) if backend in (Route.FLASH, Route.EFFICIENT, Route.CUDNN) else Route.PLAIN


def forward(
    route: Route, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The result and the logarithm of each row's denominator."""
    apart = _apart(route, q, k, v, mask)
    if apart is not None and not apart.whole_rows:
        return ragged.forward(apart, q, k, v, scale)
    if apart is not None:
        route, mask, is_causal = _causal(route, q, k, v, mask)
    aten, heads = torch.ops.aten, q.shape[1]
    if not (q.numel() and k.numel()):  # the kernels of CUDA return no logarithm for no rows
        out = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[-1])
        return by_token(out), q.new_zeros(q.shape[:3], dtype=compute_dtype(q))
    if route is Route.CPU:
        out, lse, *_ = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=additive(mask, q), scale=scale
        )
    elif route is Route.CUDNN:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *map(_laid_out, (q, k, v)), _expanded(mask, q, k), True, 0.0, is_causal, scale=scale
        )
    elif route is Route.FLASH:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    else:
        k, v = repeated(k, heads), repeated(v, heads)
        bias = _aligned(mask, q, k)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return by_token(out), lse[..., : q.shape[2]].contiguous()


def backward(
    route: Route, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    apart = _apart(route, q, k, v, mask)
    if apart is not None and not apart.whole_rows:
        return ragged.backward(apart, grad, q, k, v, out, lse, scale)
    if apart is not None:
        route, mask, is_causal = _causal(route, q, k, v, mask)
    if not (q.numel() and k.numel()):
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        return by_token(dq), by_token(dk), by_token(dv)
    aten, shared = torch.ops.aten, (q.shape[2], k.shape[2], 0.0, is_causal)
    if route is Route.CPU:
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # the order in which the forward's kernel writes it
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, *ragged.alone(k, v, q), out, lse, 0.0, is_causal, attn_mask=additive(mask, q), scale=scale
        )
    elif route is Route.CUDNN:
        # cuDNN's plans are kept by the memory order of q, k and v alone, and assume that of out and grad: all have one here
        grad, q, k, v, out = map(_laid_out, (grad, q, k, v, out))
        unused = [torch.empty((), dtype=torch.long, device=q.device) for _ in range(2)]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), *unused, _expanded(mask, q, k), None, None, *shared, scale=scale
        )
    elif route is Route.FLASH:
        unused = [torch.empty(n, dtype=torch.uint64, device=q.device) for n in ((2,), ())]
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *shared, *unused, scale=scale
        )
    else:
        grads = _efficient_backward(grad, q, k, v, mask, out, lse, is_causal, scale)
    dq, dk, dv = (by_token(g) for g in grads)
    return dq, summed(dk, k.shape[1]), summed(dv, v.shape[1])


def _apart(route: Route, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Documents | None:
    """The documents that the mask keeps apart, where there is a kernel for documents."""
    if mask is None or q.shape[-1] != v.shape[-1]:
        return None
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= _WIDEST_RAGGED
    return ragged.documents(mask, q, k) if route is Route.CPU or (half and _has_flash()) else None


def _has_flash() -> bool:
    return flash_sdp_enabled() and is_flash_attention_available()


def _causal(route: Route, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Route, Tensor | None, bool]:
    """The kernel, mask and flag for a mask that says no more than the flag does."""
    without = Route.CPU if route is Route.CPU else choose(q, k, v, None, True, None)[0]
    return (route, mask, False) if without is Route.PLAIN else (without, None, True)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)  # as its forward leaves it
    unused = [torch.empty((), dtype=torch.long, device=q.device) for _ in range(2)]
    needs = [True, True, True, False]
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _aligned(mask, q, k), out, lse, *unused, 0.0, needs, is_causal, scale=scale
    )[:3]


def by_token(x: Tensor) -> Tensor:
    """``x`` in the memory order (batch, length, heads, head_dim), which makes the merging of heads a view."""
    flat = x.transpose(1, 2)
    return x if flat.is_contiguous() else flat.contiguous().transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    """``x`` by token, with the strides that a new tensor would have: dimensions of one element may carry any.

    What lies by token in a larger tensor, as v does beside q and k of one projection, stays there: cuDNN takes any strides.
    """
    if min(x.shape) > 1 and _lies_apart(x):
        return x
    flat = by_token(x).transpose(1, 2)
    _, length, heads, width = flat.shape
    return flat.as_strided(flat.shape, (length * heads * width, heads * width, width, 1)).transpose(1, 2)


def _lies_apart(x: Tensor) -> bool:
    """Whether vectors that cuDNN can read whole lie by token, with or without something between them."""
    (_, heads, length, width), (batch, head, token, element) = x.shape, x.stride()
    ordered = element == 1 and width <= head and heads * head <= token and length * token <= batch
    return ordered and all(
        n % _ALIGNMENT == 0 for n in (x.data_ptr(), *(s * x.element_size() for s in (batch, head, token)))
    )


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """``mask`` as numbers to add to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)


def _expanded(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    bias = additive(mask, q)
    if bias is None:
        return None
    bias = bias[(None,) * (4 - bias.dim())]
    return bias.expand(q.shape[0], bias.shape[1], q.shape[2], k.shape[2])


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """As the memory-efficient kernel reads it."""
    bias = additive(mask, q)
    if bias is None:
        return None
    if bias.stride(-1) != 1 or any(s % _MASK_ALIGNMENT for s in bias.stride()[:-1]):
        length = bias.shape[-1]
        bias = F.pad(bias, (0, -length % _MASK_ALIGNMENT))[..., :length]
    return bias.expand(*q.shape[:3], k.shape[2])
