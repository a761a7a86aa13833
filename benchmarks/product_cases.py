"""The operators that are bound by matrix products: linears with adapters, 4-bit linears, the loss behind the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from weft.kernels import linear_cross_entropy, lora_linear, parallel_linears, quant_linear
from weft.quant.layout import Layout

from .kernel_case import Case, Draw, Sizes, layout_4bit
from .row_cases import quant_state

SCALE = 1.0


def _weight(draw: Draw, rows: int, columns: int, nf4: bool) -> tuple[list[Tensor], str]:
    layout = layout_4bit(rows, columns) if nf4 else Layout("rows", rows, columns)
    return (draw.packed(layout) if nf4 else [draw.weight(rows, columns)]), layout.encode()


def _adapter(draw: Draw, rank: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return draw(rank, columns, scale=columns**-0.5, grad=True), draw(rows, rank, scale=rank**-0.5, grad=True)


def _lora_inputs(sizes: Sizes, draw: Draw, *, rows: int, columns: int, nf4: bool) -> dict[str, Any]:
    weight, layout = _weight(draw, rows, columns, nf4)
    a, b = _adapter(draw, sizes.rank, rows, columns)
    x = draw(sizes.batch, sizes.length, columns, grad=True)
    return {"x": x, "weight": weight, "layout": layout, "bias": None, "a": a, "b": b, "scale": SCALE}


def _parallel_inputs(sizes: Sizes, draw: Draw, *, outs: tuple[int, ...], nf4: bool) -> dict[str, Any]:
    weights, layouts = zip(*(_weight(draw, out, sizes.hidden, nf4) for out in outs), strict=True)
    a, b = zip(*(_adapter(draw, sizes.rank, out, sizes.hidden) for out in outs), strict=True)
    x = draw(sizes.batch, sizes.length, sizes.hidden, grad=True)
    return {
        "x": x, "weights": list(weights), "layouts": list(layouts), "biases": [None] * len(outs),
        "a": list(a), "b": list(b), "scales": [SCALE] * len(outs),
    }  # fmt: skip


def _quant_inputs(sizes: Sizes, draw: Draw, *, decoding: bool) -> dict[str, Any]:
    weight, layout = _weight(draw, sizes.intermediate, sizes.hidden, nf4=True)
    shape = (1, 1) if decoding else (sizes.batch, sizes.length)
    return {"x": draw(*shape, sizes.hidden, grad=not decoding), "weight": weight, "layout": layout}


def _loss_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(sizes.tokens, sizes.hidden, grad=True), "weight": draw.weight(sizes.vocab, sizes.hidden),
        "bias": None, "target": draw.integers(sizes.vocab, sizes.tokens),
    }  # fmt: skip


def base_linear(x: Tensor, weight: list[Tensor], layout: str) -> Tensor:
    """``nn.Linear``, or bitsandbytes' ``Linear4bit``."""
    if not Layout.decode(layout).is_4bit:
        return F.linear(x, weight[0])
    import bitsandbytes

    state = quant_state(weight, layout, x.dtype)
    return bitsandbytes.matmul_4bit(x, weight[0].t(), quant_state=state)  # pyright: ignore[reportPrivateImportUsage]


def eager_lora(x: Tensor, weight: list[Tensor], layout: str, bias: None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """As PEFT writes it."""
    return base_linear(x, weight, layout) + F.linear(F.linear(x, a), b) * scale


def eager_parallel(
    x: Tensor, weights: list[list[Tensor]], layouts: list[str], biases: list[None], a: list[Tensor], b: list[Tensor],
    scales: list[float],
) -> list[Tensor]:  # fmt: skip
    """One after the other."""
    each = zip(weights, layouts, biases, a, b, scales, strict=True)
    return [eager_lora(x, *operands) for operands in each]


def eager_loss(x: Tensor, weight: Tensor, bias: None, target: Tensor) -> Tensor:
    """As transformers' loss for causal language models writes it."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


def _product_flops(shapes: list[tuple[int, int]], tokens: int, rank: int) -> tuple[float, float]:
    """Base products forward and to the input; the adapters' two forward and four backward."""
    base = sum(2.0 * tokens * rows * columns for rows, columns in shapes)
    adapter = sum(2.0 * tokens * rank * (rows + columns) for rows, columns in shapes)
    return base + adapter, base + 2 * adapter


def _lora_case(name: str, shape: Callable[[Sizes], tuple[int, int]], nf4: bool) -> Case:
    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        rows, columns = shape(sizes)
        return _lora_inputs(sizes, draw, rows=rows, columns=columns, nf4=nf4)

    return Case(
        f"lora_linear/{name}", inputs, lora_linear.lora_linear, eager_lora, lora_linear.reference,
        ("x", "weight", "a", "b"), ("x", "a", "b"), lambda s: _product_flops([shape(s)], s.tokens, s.rank),
    )  # fmt: skip


def _parallel_case(name: str, outs: Callable[[Sizes], tuple[int, ...]], nf4: bool) -> Case:
    return Case(
        f"parallel_linears/{name}", lambda s, draw: _parallel_inputs(s, draw, outs=outs(s), nf4=nf4),
        parallel_linears.parallel_linears, eager_parallel, parallel_linears.reference,
        ("x", "weights", "a", "b"), ("x", "a", "b"),
        lambda s: _product_flops([(out, s.hidden) for out in outs(s)], s.tokens, s.rank),
    )  # fmt: skip


def _qkv(s: Sizes) -> tuple[int, ...]:
    return s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim


def _quant_flops(s: Sizes) -> tuple[float, float]:
    return 2.0 * s.tokens * s.hidden * s.intermediate, 2.0 * s.tokens * s.hidden * s.intermediate


def _loss_flops(s: Sizes) -> tuple[float, float]:
    return 2.0 * s.tokens * s.hidden * s.vocab, 2.0 * s.tokens * s.hidden * s.vocab


PRODUCT_CASES: tuple[Case, ...] = (
    _lora_case("o", lambda s: (s.hidden, s.hidden), nf4=False),
    _lora_case("down", lambda s: (s.hidden, s.intermediate), nf4=False),
    _lora_case("down-nf4", lambda s: (s.hidden, s.intermediate), nf4=True),
    _parallel_case("qkv", _qkv, nf4=False),
    _parallel_case("gate-up", lambda s: (s.intermediate, s.intermediate), nf4=False),
    _parallel_case("gate-up-nf4", lambda s: (s.intermediate, s.intermediate), nf4=True),
    Case(
        "quant_linear", lambda s, draw: _quant_inputs(s, draw, decoding=False), quant_linear.quant_linear, base_linear,
        quant_linear.reference, ("weight",), ("x",), _quant_flops,
    ),
    # one token: bound by the bytes of the weight
    Case(
        "quant_linear/decode", lambda s, draw: _quant_inputs(s, draw, decoding=True), quant_linear.quant_linear,
        base_linear, quant_linear.reference,
    ),
    Case(
        "linear_cross_entropy", _loss_inputs, linear_cross_entropy.linear_cross_entropy, eager_loss,
        linear_cross_entropy.reference, ("x", "weight", "target"), ("x",), _loss_flops,
    ),
)  # fmt: skip


def needs_bitsandbytes(case: Case) -> bool:
    """Whether the eager spelling of ``case`` multiplies with a 4-bit weight."""
    return case.name.endswith("-nf4") or case.name.startswith("quant_linear")
