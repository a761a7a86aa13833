r"""Cross-entropy of rows of logits, and its gradient in their place: the part of the operator that reads each logit.

Of a row ``l`` of logits with label ``y``, and of ``s · loss``::

    z = softcap · tanh(logit_scale · l / softcap)            (softcap 0: z = logit_scale · l)
    loss = (1 - ε) · (lse(z) - z_y) + ε · (lse(z) - mean(z)),          lse(z) = log Σ_v exp(z_v)
    g = s · (softmax(z) - (1 - ε) · onehot(y) - ε / V) · (1 - (z / softcap)²) · logit_scale

The kernel reads a row twice: for the loss, with a running maximum (arXiv:1805.02867), and again to overwrite it with
``g``, mostly from the L2 cache. Used by :mod:`.linear_cross_entropy`, which holds the sources of the formula.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .toolchain import tl, triton

MAX_BLOCK = 8192
"""Most columns that a program of the row kernel holds at a time."""


class RowLoss(NamedTuple):
    """The part of the loss that looks at one row of logits."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    logit_scale: float


@triton.jit
def _cap(u, softcap):
    a = u / softcap
    # (1 - e) / (1 + e) cancels near zero, where the odd series is exact to float32.
    s = a * a
    near = a * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488))))
    e = tl.exp(-2.0 * tl.abs(a))
    far = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(tl.abs(a) < 0.3, near, tl.where(a < 0, -far, far))


@triton.jit
def _row_kernel(
    logits,
    stride,
    target,
    seed,
    seed_stride,
    losses,
    vocab,
    ignore_index,
    smoothing,
    softcap,
    logit_scale,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: its loss, then ``g`` in place of its logits. ``stride`` is the width, padded to sixteens."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(target + row)
    live = label != ignore_index
    inside = (label >= 0) & (label < vocab)
    z_label = tl.load(logits + label, mask=live & inside, other=float("nan")).to(tl.float32) * logit_scale
    if CAPPED:
        z_label = _cap(z_label, softcap)
    # Sums and differences are taken relative to z_label and to the maximum: logits of 1e4 keep their differences.
    shift = tl.where(tl.abs(z_label) < float("inf"), z_label, 0.0)
    top = tl.full([], float("-inf"), tl.float32)
    base = tl.full([], 0.0, tl.float32)
    mass = tl.full([BLOCK], 0.0, tl.float32)
    shifted = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, tl.where(live, vocab, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # The mask is the padded width, because a limit that 16 does not divide would make every access scalar.
        raw = tl.load(logits + cols, mask=cols < stride, other=0.0)
        z = raw.to(tl.float32) * logit_scale
        if CAPPED:
            z = _cap(z, softcap)
        z = tl.where(cols < vocab, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        mass = mass * tl.exp(top - base) + tl.exp(z - base)
        if SMOOTHED:
            shifted += tl.where(cols < vocab, z - shift, 0.0)
        top = new_top
    total = tl.where(live, tl.sum(mass, axis=0), 1.0)
    advantage = z_label - top
    if SMOOTHED:
        mean = tl.sum(shifted, axis=0) / vocab + (shift - top)
        advantage = (1.0 - smoothing) * advantage + smoothing * mean
    tl.store(losses + row, tl.where(live, tl.log(total) - advantage, 0.0))
    if GRADIENT:
        scale = tl.where(inside, tl.load(seed + row * seed_stride).to(tl.float32), float("nan"))
        inverse = 1.0 / total
        width = tl.where(live, stride, 0)
        column = label.to(tl.int32)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            raw = tl.load(logits + cols, mask=cols < width, other=0.0)
            z = raw.to(tl.float32) * logit_scale
            slope = logit_scale
            if CAPPED:
                z = _cap(z, softcap)
                slope = logit_scale * (1.0 - (z / softcap) * (z / softcap))
            g = tl.where(cols < vocab, tl.exp(z - base) * inverse, 0.0)
            if SMOOTHED:
                g -= smoothing / vocab
            g = tl.where(cols == column, g - (1.0 - smoothing), g) * (scale * slope)
            g = tl.where(live, g, 0.0)
            tl.store(logits + cols, g.to(logits.dtype.element_ty), mask=cols < stride)


def rows_triton(logits: Tensor, target: Tensor, seed: Tensor, losses: Tensor, loss: RowLoss, gradient: bool) -> Tensor:
    """Write the rows' losses; with ``gradient``, turn ``logits`` into ``g``, and return it."""
    (rows, vocab), block = logits.shape, min(MAX_BLOCK, triton.next_power_of_2(logits.shape[1]))
    variant: dict[str, Any] = {"CAPPED": loss.softcap != 0, "SMOOTHED": loss.label_smoothing != 0, "GRADIENT": gradient}
    variant |= {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}
    arguments = (logits, logits.stride(0), target, seed, seed.stride(0), losses, vocab, *loss)
    launch: Any = _row_kernel[(rows,)]
    with torch.cuda.device_of(logits):
        launch(*arguments, **variant)
    return logits


def rows_torch(logits: Tensor, target: Tensor, seed: Tensor, losses: Tensor, loss: RowLoss, gradient: bool) -> Tensor:
    """What :func:`rows_triton` does, in torch; overwrites ``logits`` too."""
    z = logits.to(losses.dtype)
    if loss.logit_scale != 1:
        z.mul_(loss.logit_scale)
    slope = None
    if loss.softcap:
        z.div_(loss.softcap).tanh_()
        slope = torch.addcmul(z.new_ones(()), z, z, value=-1) if gradient else None
        z.mul_(loss.softcap)
    smoothing, ignored = loss.label_smoothing, target == loss.ignore_index
    label = target.masked_fill(ignored, 0).unsqueeze(1)
    p = torch.log_softmax(z, 1)
    advantage = p.gather(1, label).squeeze(1)
    if smoothing:
        advantage.mul_(1 - smoothing).add_(p.mean(1), alpha=smoothing)
    torch.neg(advantage.masked_fill_(ignored, 0), out=losses)
    if not gradient:
        return logits
    g = p.exp_()
    if smoothing:
        g.sub_(smoothing / g.shape[1])
    g.scatter_add_(1, label, g.new_full((), smoothing - 1).expand_as(label))
    g.mul_((seed * loss.logit_scale).unsqueeze(1))
    if slope is not None:
        g.mul_(slope)
    g.index_fill_(0, ignored.nonzero().squeeze(1), 0)
    return g if g.dtype == logits.dtype else logits.copy_(g)


def check_labels(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise what ``F.cross_entropy`` raises on the CPU."""
    wrong = target[((target < 0) | (target >= vocab)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")
