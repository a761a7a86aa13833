r"""Cross-entropy of a linear layer's logits, which never exist as a whole.

Forward, for a token with hidden state ``x``, label ``y``, smoothing ``ε`` and ``V`` classes::

    u = logit_scale · (x Wᵀ + b)          z = softcap · tanh(u / softcap)          (softcap 0: z = u)
    loss = (1 - ε) · (lse(z) - z_y) + ε · (lse(z) - mean(z)),          lse(z) = log Σ_v exp(z_v)

Backward, for a gradient ``s`` of the token's loss, summed over tokens for ``W`` and ``b``::

    g = s · (softmax(z) - (1 - ε) · onehot(y) - ε / V) · (1 - (z / softcap)²) · logit_scale
    dx = g W          dW = Σ gᵀ x          db = Σ g

Sources: ``torch.nn.CrossEntropyLoss`` and label smoothing (arXiv:1512.00567), soft-capping (Gemma 2, arXiv:2408.00118),
the running maximum of lse (arXiv:1805.02867).

Tokens are taken in chunks. A chunk's logits are rounded to the dtype of ``x``, as a linear layer rounds them; one pass
over a row takes its loss, a second one overwrites the row with ``g``, and the products with ``W`` and ``x`` follow at
once. So the gradients exist when the forward ends, and backward multiplies them by one number. They are kept in units
of a power of two near ``1 / denominator``: multiplying by the unit rounds nothing, and ``g`` does not sink below
float16's range before a loss scale can reach it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy_rows import RowLoss, check_labels, rows_torch, rows_triton
from .dispatch import compute_dtype, use_triton
from .operator import most_at_once, operator
from .toolchain import tl, triton

Reduction = Literal["mean", "sum", "none"]
Gradients = tuple[Tensor, Tensor, Tensor]

CHUNK_BYTES = 2**28
"""What the logits of one chunk may take; twice that where each chunk also reads and writes the whole sum of dW."""
_FP16_HEADROOM = 256.0
"""float16 gradients are kept this much larger: |g| stays within 2⁹, and probabilities from 2e-7 up are normal."""


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """The same in plain torch, with all logits at once; ``chunk_tokens`` changes nothing here."""
    dtype = logits_dtype or x.dtype
    logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    z = logits.reshape(-1, weight.shape[0]).to(compute_dtype(x)) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if denominator is not None:
        return F.cross_entropy(z, target.flatten(), reduction="sum", **options) / (
            denominator.to(z.device) if isinstance(denominator, Tensor) else denominator
        )
    loss = F.cross_entropy(z, target.flatten(), reduction=reduction, **options)
    return loss.view(target.shape) if reduction == "none" else loss


@triton.jit
def _scale_kernel(values, factor, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
    # The zeros of ignored tokens stay zeros where the factor is infinite, as in a loss that is divided by no tokens.
    scaled = tl.where(value == 0.0, 0.0, value * tl.load(factor))
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=at < count)


def _chunk_tokens(weight: Tensor, rows: int, dtype: torch.dtype, sums_weight: bool) -> int:
    """The largest power of two of tokens whose logits fit :data:`CHUNK_BYTES`."""
    fitting = CHUNK_BYTES * (2 if sums_weight else 1) // (weight.shape[0] * dtype.itemsize)
    return max(1, min(2 ** max(fitting, 1).bit_length() // 2, rows))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``x Wᵀ + b`` into ``out``, whose dtype may be wider than that of ``x``."""
    if out.dtype == x.dtype:
        torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
        return
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weight.t().to(out.dtype), out=out)
    if bias is not None:
        out.add_(bias)


def _accumulate(total: Tensor, g: Tensor, x: Tensor, beta: int) -> None:
    """``total = beta · total + gᵀ x``; a wider ``total`` takes the product unrounded."""
    if total.dtype == x.dtype:
        torch.addmm(total, g.t(), x, beta=beta, out=total)
    elif x.is_cuda:
        torch.addmm(total, g.t(), x, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, g.t().to(total.dtype), x.to(total.dtype), beta=beta, out=total)


def _sweep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    seed: Tensor,
    loss: RowLoss,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Gradients]:
    """Every token's loss, and of ``Σ seed · loss`` the gradients that ``needs`` (x, weight, bias) asks for.

    Several half-precision dW cannot be added in their own dtype: each addition would round to 8 bits once more, where
    one product rounds once. So they are added in float32, inside the product.
    """
    (rows, hidden), vocab, wide = x.shape, weight.shape[0], compute_dtype(x)
    dtype = logits_dtype or x.dtype
    chunk = min(chunk_tokens or _chunk_tokens(weight, rows, dtype, needs[1]), rows)
    kernel = use_triton(x) and wide == torch.float32
    if not x.is_cuda:
        check_labels(target, vocab, loss.ignore_index)
    losses = x.new_empty(rows, dtype=wide)
    padded = x.new_empty(chunk, triton.cdiv(vocab, 16) * 16 if kernel else vocab, dtype=dtype)  # pyright: ignore
    logits = padded[:, :vocab]
    padded[:, vocab:] = 0
    dx = x.new_empty((rows, hidden) if needs[0] else 0)
    sum_dtype = wide if chunk < rows else _kept_dtype(weight)
    dw = weight.new_empty(weight.shape if needs[1] else 0, dtype=sum_dtype)
    db = weight.new_zeros(vocab if needs[2] else 0, dtype=wide)
    for start in range(0, rows, max(chunk, 1)):
        part = slice(start, min(start + chunk, rows))
        tokens, block = x[part], logits[: part.stop - start]
        _project(tokens, weight, bias, block)
        row_pass = rows_triton if kernel else rows_torch
        g = row_pass(block, target[part], seed[part], losses[part], loss, any(needs)).to(x.dtype)
        if needs[0]:
            torch.mm(g, weight, out=dx[part])
        if needs[1]:
            _accumulate(dw, g, tokens, int(start > 0))
        if needs[2]:
            db += g.sum(0, dtype=wide)
    return losses, (dx, dw if rows else dw.zero_(), db)


def _kept_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which dW waits for its factor: a sum over tokens may leave float16's range."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _units(denominator: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``seed`` in (1, 2] · headroom and ``unit``, a power of two, with ``seed · unit = 1 / denominator``."""
    headroom = _FP16_HEADROOM if dtype == torch.float16 else 1.0
    mantissa = torch.frexp(denominator).mantissa
    unit = torch.where(denominator == 0, 1.0, mantissa / denominator)
    return headroom / mantissa, unit / headroom


@operator("weft::linear_cross_entropy")
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    reduction: str,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the unit of the gradients, and the gradients in that unit (empty where ``needs`` says no)."""
    loss = RowLoss(ignore_index, label_smoothing, softcap, logit_scale)
    flat, labels, wide = x.reshape(-1, x.shape[-1]), target.reshape(-1).contiguous(), compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if denominator is not None:
            total = denominator.to(x.device, wide)
        else:
            total = ((labels != ignore_index).sum() if reduction == "mean" else labels.new_ones(())).to(wide)
        seed, unit = _units(total, x.dtype)
        seed, needs = seed.reshape(1).expand(flat.shape[0]), [need and reduction != "none" for need in needs]
        losses, (dx, dw, db) = _sweep(flat, weight, bias, labels, seed, loss, chunk_tokens, logits_dtype, needs)
        value = losses.view(target.shape) if reduction == "none" else losses.sum() / total
        return value, unit, dx.view(x.shape) if needs[0] else dx, dw.to(_kept_dtype(weight)), db


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, denominator: Tensor | None, *rest: Any) -> Any:
    reduction, needs, wide, kept = rest[4], rest[7], compute_dtype(x), _kept_dtype(weight)
    keeps = [need and reduction != "none" for need in needs]
    scalar = () if denominator is None else denominator.shape
    return (
        x.new_empty(target.shape if reduction == "none" else scalar, dtype=wide),
        x.new_empty(scalar, dtype=wide),
        x.new_empty(x.shape if keeps[0] else 0),
        weight.new_empty(weight.shape if keeps[1] else 0, dtype=kept),
        weight.new_empty(weight.shape[:1] if keeps[2] else 0, dtype=wide),
    )


@operator("weft::linear_cross_entropy_backward")
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for the gradients of single tokens' losses, from logits taken anew."""
    loss = RowLoss(ignore_index, label_smoothing, softcap, logit_scale)
    flat, labels, seed = x.reshape(-1, x.shape[-1]), target.reshape(-1).contiguous(), grad.reshape(-1)
    with torch.autocast(x.device.type, enabled=False):
        _, (dx, dw, db) = _sweep(flat, weight, bias, labels, seed, loss, chunk_tokens, logits_dtype, needs)
        return dx.view(x.shape) if needs[0] else dx, dw.to(weight.dtype), db.to(weight.dtype)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> Gradients:
    needs = rest[6]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[:1] if needs[2] else 0),
    )


@operator("weft::linear_cross_entropy_scale")
def _scale_op(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``values · factor`` in ``dtype``, rounded once; torch would first round ``factor`` to the dtype of ``values``."""
    if not use_triton(values) or values.dtype == torch.float64:
        scaled = (values * factor).to(dtype)
        exact = not values.is_cuda and bool(factor.isfinite().all())
        return scaled if exact else scaled.masked_fill_(values == 0, 0)
    values, out = values.contiguous(), values.new_empty(values.shape, dtype=dtype)
    if values.numel():
        launch: Any = _scale_kernel[(triton.cdiv(values.numel(), 4096),)]
        with torch.cuda.device_of(values):
            launch(values, factor, out, values.numel(), BLOCK=4096, num_warps=8)
    return out


@_scale_op.register_fake
def _(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, target, denominator, *loss, reduction, chunk_tokens, logits_dtype, needs = inputs
    # Without this, the outputs that hold gradients would each be given a gradient of zeros, as large as the weight.
    ctx.set_materialize_grads(False)
    ctx.recomputes, ctx.needs, ctx.parameter_dtype = reduction == "none", needs, weight.dtype
    ctx.options = (*loss, chunk_tokens, logits_dtype, needs)
    if ctx.recomputes:
        ctx.save_for_backward(x, weight, bias, target)
    else:
        total, unit, dx, dw, db = output
        divides = denominator is not None and denominator.requires_grad
        ctx.save_for_backward(unit, dx, dw, db, *((total, denominator) if divides else ()))


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    unused = (None,) * 8
    if grad is None:
        return *unused, *(None,) * 5
    if ctx.recomputes:
        grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
        dx, dw, db = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
        return dx, dw, db, None, None, *unused
    unit, dx, dw, db, *division = ctx.saved_tensors
    factor = grad * unit
    scaled = (
        _scale_op(g, factor, dtype) if need else None
        for g, need, dtype in zip((dx, dw, db), ctx.needs, (dx.dtype, *[ctx.parameter_dtype] * 2), strict=True)
    )
    by_denominator = (-grad * division[0] / division[1].to(grad.device)).to(division[1]) if division else None
    return *scaled, None, by_denominator, *unused


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not form a linear layer")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target {tuple(target.shape)} must have the leading shape of x, {tuple(x.shape[:-1])}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, not {target.dtype}")


def _check_options(reduction: str, chunk_tokens: int | None, denominator: Tensor | float | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, not {chunk_tokens}")
    if denominator is not None and reduction == "none":
        raise ValueError("denominator divides a sum of losses: reduction must be 'mean' or 'sum'")
    if isinstance(denominator, Tensor) and denominator.numel() != 1:
        raise ValueError(f"denominator must be one number, not of shape {tuple(denominator.shape)}")


def _under_autocast(x: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would take its product."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@most_at_once(CHUNK_BYTES)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias).float(), target)`` without the logits.

    With ``reduction`` "mean" or "sum" the gradients of ``x``, ``weight`` and ``bias``, where required, are taken in the
    forward, and only they are saved. With "none" the inputs are saved, and backward takes the logits anew. Under
    ``torch.no_grad`` nothing but the losses is computed. Double backward raises.

    Args:
        x: hidden states, (..., hidden); float16, bfloat16, float32 or float64.
        weight: (vocab, hidden), of the dtype of ``x`` unless autocast is on.
        bias: (vocab,) or None.
        target: int64, the leading shape of ``x``. Tokens that hold ``ignore_index`` cost no loss and get a gradient of
            exactly zero, whatever their logits.
        ignore_index: label of tokens that do not count.
        label_smoothing: ε in [0, 1].
        softcap: bound of the logits; 0 for none.
        logit_scale: factor of the logits, applied in float32.
        reduction: "mean" divides by the number of tokens that count (none: NaN, as in torch), "sum", or "none".
        chunk_tokens: tokens whose logits exist at a time. None: the largest power of two whose logits fit 256 MiB, or
            512 MiB where ``weight`` requires a gradient.
        logits_dtype: dtype to which the logits are rounded. None: that of ``x``, as a linear layer does. float32 with
            half-precision ``x``: not rounded (without CUDA this casts ``weight`` once a chunk); the gradient of the
            logits is rounded to the dtype of ``x`` all the same.
        denominator: one number to divide the sum of losses by, whatever ``reduction`` says (``num_items_in_batch``).

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape of ``target`` for "none".

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.
        IndexError: a label outside [0, vocab), on the CPU. On a GPU such a token's loss and gradients are NaN.
    """
    _check(x, weight, bias, target)
    _check_options(reduction, chunk_tokens, denominator)
    dtype = _under_autocast(x)
    if dtype != x.dtype and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if logits_dtype not in (None, x.dtype, compute_dtype(x)):
        raise ValueError(f"logits of {x.dtype} products can be {x.dtype} or {compute_dtype(x)}, not {logits_dtype}")
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = x.new_full((), denominator, dtype=compute_dtype(x))
    recording = torch.is_grad_enabled()
    needs = [recording and t is not None and t.requires_grad for t in (x, weight, bias)]
    options = (ignore_index, label_smoothing, softcap, logit_scale, reduction, chunk_tokens, logits_dtype)
    return _op(x, weight, bias, target, denominator, *options, needs)[0]
