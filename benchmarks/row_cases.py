"""The operators that are bound by the bytes that they move: norms, rotary embedding, gates, dequantization."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels import dequantize_4bit, gated_activation, layer_norm, residual_rms_norm, rms_norm, rope
from weft.quant import four_bit
from weft.quant.layout import Layout

from .kernel_case import Case, Draw, Sizes, layout_4bit

EPS = 1e-5


def _hidden(sizes: Sizes, draw: Draw) -> Tensor:
    return draw(sizes.batch, sizes.length, sizes.hidden, grad=True)


def _norm_inputs(sizes: Sizes, draw: Draw, *, frozen: bool = False, residual: bool = False) -> dict[str, Any]:
    inputs: dict[str, Any] = {"x": _hidden(sizes, draw)}
    if residual:
        inputs["residual"] = _hidden(sizes, draw)
    return inputs | {"weight": draw(sizes.hidden, grad=not frozen), "eps": EPS}


def _layer_norm_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    inputs = _norm_inputs(sizes, draw)
    return inputs | {"bias": draw(sizes.hidden, grad=True)}


def _rope_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """q and k as views of (batch, length, heads, head_dim), tables as the model's rotary embedding makes them."""
    shape = (sizes.batch, sizes.length)
    heads = {"q": sizes.heads, "k": sizes.kv_heads}
    views = {n: draw(*shape, count, sizes.head_dim).transpose(1, 2).requires_grad_() for n, count in heads.items()}
    frequency = 500000.0 ** -(torch.arange(0, sizes.head_dim, 2, device=draw.device) / sizes.head_dim)
    angle = torch.arange(sizes.length, device=draw.device)[:, None] * torch.cat((frequency, frequency))
    return views | {"cos": angle.cos()[None, None].to(draw.dtype), "sin": angle.sin()[None, None].to(draw.dtype)}


def _gate_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    shape = (sizes.batch, sizes.length, sizes.intermediate)
    return {"gate": draw(*shape, grad=True), "up": draw(*shape, grad=True), "activation": "silu"}


def _packed_gate_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    gate_up = draw(sizes.batch, sizes.length, 2 * sizes.intermediate, grad=True)
    return {"gate_up": gate_up, "activation": "silu"}


def _dequantize_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    layout = layout_4bit(sizes.intermediate, sizes.hidden)
    table = torch.tensor(four_bit.NF4, device=draw.device)
    return {"weight": draw.packed(layout), "layout": layout.encode(), "dtype": draw.dtype, "table": table}


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As Llama writes it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def eager_residual_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As a decoder layer writes it."""
    h = residual + x
    return eager_rms_norm(h, weight, eps), h


def eager_layer_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor) -> Tensor:
    """``nn.LayerNorm``."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama writes it."""
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def eager_gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As Llama's MLP writes it."""
    assert activation == "silu"
    return F.silu(gate) * up


def eager_packed_gate(gate_up: Tensor, activation: str) -> Tensor:
    """As Phi-3's MLP writes it."""
    gate, up = gate_up.chunk(2, -1)
    return eager_gate(gate, up, activation)


def eager_dequantize(weight: list[Tensor], layout: str, dtype: torch.dtype, table: Tensor) -> Tensor:
    """The formula in plain torch."""
    shape, (packed, absmax, nested, code, offset) = Layout.decode(layout), weight
    scale = code[absmax.int()] * nested.repeat_interleave(shape.nested_block_size)[: absmax.numel()] + offset
    pairs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1)
    values = table[pairs.view(-1, shape.block_size).int()] * scale[:, None]
    return values.to(dtype).view(shape.out_features, shape.in_features)


def quant_state(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Any:
    """The same weight as bitsandbytes describes it."""
    from bitsandbytes.functional import QuantState

    shape, (_, absmax, nested, code, offset) = Layout.decode(layout), weight
    inner = QuantState(absmax=nested, code=code, blocksize=shape.nested_block_size, dtype=torch.float32)
    return QuantState(
        absmax=absmax, shape=torch.Size((shape.out_features, shape.in_features)), blocksize=shape.block_size,
        quant_type=shape.kind, dtype=dtype, offset=offset, state2=inner,
    )  # fmt: skip


def bitsandbytes_dequantize(weight: list[Tensor], layout: str, dtype: torch.dtype, table: Tensor) -> Tensor:
    """bitsandbytes' own kernels."""
    from bitsandbytes.functional import dequantize_4bit as theirs

    return theirs(weight[0], quant_state(weight, layout, dtype))


def _dequantize(weight: list[Tensor], layout: str, dtype: torch.dtype, table: Tensor) -> Tensor:
    return dequantize_4bit.dequantize_4bit(weight, layout, dtype)


def _exact_dequantize(weight: list[Tensor], layout: str, dtype: torch.dtype, table: Tensor) -> Tensor:
    return dequantize_4bit.reference(weight, layout, dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor) -> Tensor:
    return layer_norm.layer_norm(x, weight, bias, eps)


def _exact_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor) -> Tensor:
    return layer_norm.reference(x, weight, bias, eps)


ROW_CASES: tuple[Case, ...] = (
    Case(
        "rms_norm", _norm_inputs, rms_norm.rms_norm, eager_rms_norm, rms_norm.reference,
        ("x", "weight"), ("x", "weight"),
    ),
    Case(
        "rms_norm/frozen", lambda sizes, draw: _norm_inputs(sizes, draw, frozen=True),
        rms_norm.rms_norm, eager_rms_norm, rms_norm.reference, ("x", "weight"), ("x",),
    ),
    # the sum is read again in place of x, and x and the residual share one gradient
    Case(
        "residual_rms_norm/frozen", lambda sizes, draw: _norm_inputs(sizes, draw, frozen=True, residual=True),
        residual_rms_norm.residual_rms_norm, eager_residual_rms_norm, residual_rms_norm.reference,
        ("x", "weight"), ("x",),
    ),
    Case(
        "layer_norm", _layer_norm_inputs, _norm, eager_layer_norm, _exact_norm,
        ("x", "weight"), ("x", "weight", "bias"),
    ),
    Case("rope", _rope_inputs, rope.rope, eager_rope, rope.reference, ("cos", "sin"), ("q", "k")),
    Case(
        "gated_activation", _gate_inputs, gated_activation.gated_activation, eager_gate, gated_activation.reference,
        ("gate", "up"), ("gate", "up"),
    ),
    Case(
        "gated_activation_packed", _packed_gate_inputs, gated_activation.gated_activation_packed, eager_packed_gate,
        gated_activation.reference_packed, ("gate_up",), ("gate_up",),
    ),
    Case(
        "dequantize_4bit", _dequantize_inputs, _dequantize, eager_dequantize, _exact_dequantize,
        others={"bitsandbytes": bitsandbytes_dequantize},
    ),
)  # fmt: skip
