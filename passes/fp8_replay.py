"""Measures a product in FP8 against float64: it is less exact than what it replaces, and may be so only as far as FP8 is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..kernels import fp8
from ..kernels.dequantize_4bit import dense
from ..quant.four_bit import dequantize
from ..quant.layout import Layout
from ..rewrite import graph as g
from ..rewrite.change import Change
from ..rewrite.driver import Verifier
from ..rewrite.errors import first_line
from ..rewrite.exact import Float64, upcast
from ..rewrite.joint import unseen
from ..rewrite.verify import Replayer
from .storage import product_dtype

ROWS = 64
"""Rows of the x that is drawn."""
NORM = math.sqrt(2) * fp8.ROUNDING + fp8.OTHERWISE
"""What the error of a product may be, as a norm, relative to what independent terms sum up to.

Roundings of two factors, each of at most 2⁻⁴, in terms that are independent because x is drawn: less than half of it is
expected. What underflows in a row of up to 2¹⁴ elements is below 2⁻¹⁰ of its norm. In long sums this is far below
:func:`.fp8.error_bound`, which holds for whatever x.
"""


@dataclass(frozen=True)
class Product:
    """One linear of a call: the nodes of its input and its weight, and how that is stored and multiplied."""

    x: Any
    weight: list[fx.Node]
    layout: Layout


@dataclass(frozen=True)
class Measured:
    """The largest error of a replay: as a share of what FP8 allows, and of a result in FP8 relative to it, as norms."""

    share: float
    relative: float


@dataclass(frozen=True)
class _Results:
    """Outputs, the gradients that were drawn for them, and those of the tracked inputs."""

    outputs: list[Tensor]
    seeds: list[Tensor]
    gradients: list[Tensor]


_Pair = tuple[Tensor, Tensor]
"""The factors of a product in FP8: (m, k) and (n, k)."""


def measure(
    module: fx.GraphModule, change: Change, products: list[Product], verifier: Verifier
) -> tuple[Measured | None, str]:
    """Replay ``change``, a call of some ``products`` that may run in FP8 by now, forward and gradients.

    Returns what was measured, or None and why the change must not be.
    """
    old = g.copy_nodes(change.old, change.inputs, change.old_outputs, module)
    new = g.copy_nodes(change.new, change.inputs, change.new_outputs, module)
    x, values = products[0].x, _examples(change, products, verifier)
    stored = {n for p in products if p.layout.is_4bit for n in p.weight}
    wide = [v if n in stored else upcast(v) for n, v in values.items()]
    kind, narrow = product_dtype(x) or torch.float32, list(values.values())
    runs = ((Float64(old).run, wide), (old, narrow), (new, narrow))
    try:
        with unseen():
            exact, eager, ours = (_run(function, given, kind) for function, given in runs)
    except Exception as error:  # what does not run proves nothing, and stays as it was written
        return None, f"it does not run by itself: {first_line(error)}"
    outputs, gradient = _pairs(values[x].detach().to(kind), exact.seeds, products, values)
    leaves = [n for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad]
    pairs: list[list[_Pair]] = [*outputs, *(gradient if n is x else [] for n in leaves)]
    worst, relative = 0.0, 0.0
    results = zip(pairs, *((*run.outputs, *run.gradients) for run in (exact, eager, ours)), strict=True)
    for i, (behind, truth, peer, got) in enumerate(results):
        share, error = _share(truth, peer, got, behind)
        if not share <= 1.0:
            what = f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}"
            return None, f"{what} is off by {share:.3g} times what FP8 allows ({error:.2%} of its norm)"
        worst, relative = max(worst, share), max(relative, error if behind else 0.0)
    return Measured(worst, relative), ""


def _examples(change: Change, products: list[Product], verifier: Verifier) -> dict[fx.Node, Any]:
    """Real weights, and drawn rows for what the linears read."""
    replayer = verifier if isinstance(verifier, Replayer) else Replayer()
    generator, node = torch.Generator().manual_seed(0), change.old[0]
    read = tree_leaves([products[0].x, node.kwargs.get("x_adapters"), node.kwargs.get("x_adapter")])
    made = dict[fx.Node, Any]()
    for each in change.inputs:
        fake = g.tensor_of(each)
        if each in read and fake is not None:
            drawn = torch.randn(ROWS, g.hint(fake.shape[-1]), generator=generator).to(fake.device, fake.dtype)
            made[each] = drawn.requires_grad_(fake.requires_grad)
        else:
            made[each] = replayer.example(each, generator)
    return made


def _run(function: Callable[..., Any], values: list[Any], kind: torch.dtype) -> _Results:
    """What ``function`` computes; gradients of outputs are drawn in ``kind``."""
    given = [v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values]
    leaves = [v for v in given if isinstance(v, Tensor) and v.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        outputs = tree_leaves(function(*given))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator).to(o.device, kind).to(o.dtype) for o in outputs]
    live = [(o, d) for o, d in zip(outputs, seeds, strict=True) if o.requires_grad]
    tracked, drawn = zip(*live, strict=True) if live else ((), ())
    gradients = torch.autograd.grad(tracked, leaves, drawn) if leaves else ()
    return _Results([o.detach() for o in outputs], seeds, list(gradients))


def _pairs(
    x: Tensor, dys: list[Tensor], products: list[Product], values: dict[fx.Node, Any]
) -> tuple[list[list[_Pair]], list[_Pair]]:
    """The products in FP8 behind each output, and those behind the gradient of x."""
    outputs, gradient = list[list[_Pair]](), list[_Pair]()
    for product, dy in zip(products, dys, strict=True):
        outputs.append([])
        if product.layout.fp8:
            stored, layout = [values[n].detach() for n in product.weight], product.layout
            w = dequantize(stored, layout, torch.float32) if layout.is_4bit else dense(stored, layout, x.dtype)
            outputs[-1].append((x, w))
            gradient.append((dy, w.t()))
    return outputs, gradient


def _share(truth: Tensor, peer: Tensor, got: Tensor, pairs: list[_Pair]) -> tuple[float, float]:
    """The error of ``got`` over what is allowed, by element and as a norm, NaN if it is not finite; and over the truth.

    Allowed is twice what the original is off, one unit in the last place, and what the products of ``pairs`` may lose.
    """
    off, own = got.double() - truth, (peer.double() - truth).abs()
    tiny = torch.finfo(torch.float32).tiny
    ulp = torch.finfo(got.dtype).eps * max(float(truth.abs().max()), tiny)
    allowed = torch.full_like(truth, 2 * float(own.max()) + ulp)
    for left, right in pairs:
        allowed += fp8.error_bound(left, right)
    share = float((off.abs() / allowed).max())
    relative = float(off.norm() / truth.norm().clamp_min(tiny))
    if pairs:
        energy = sum(float(left.double().square().sum(0) @ right.double().square().sum(0)) for left, right in pairs)
        share = max(share, float(off.norm()) / (NORM * math.sqrt(energy) + 2 * float(own.norm()) + ulp))
    return (share if bool(off.isfinite().all()) else math.nan), relative
