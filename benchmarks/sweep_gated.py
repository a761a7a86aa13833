"""What ``benchmarks.sweep`` tries for the update of gate and up that is added in the activation: tiles, and the update apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.kernels import gated_activation, gated_linears
from weft.kernels.gated_linears import Tile

from .kernel_case import Draw, Sizes
from .sweep_variants import Group, Variant

TILES = [
    *(Tile(64, 64, 4, strip, stages) for strip in (1, 4, 8, 16) for stages in (1, 2, 3) if strip > 1 or stages == 1),
    *(
        Tile(64, 64, 8, 8, 1),
        Tile(64, 128, 4, 8, 1),
        Tile(64, 128, 8, 8, 2),
        Tile(64, 32, 4, 8, 1),
        Tile(64, 32, 4, 16, 2),
    ),
    *(Tile(32, 64, 2), Tile(32, 64, 2, 8, 1), Tile(32, 64, 2, 8, 2), Tile(32, 64, 2, 16, 1), Tile(32, 64, 4, 8, 1)),
    *(
        Tile(16, 64, 1, 8, 1),
        Tile(16, 128, 2, 16, 1),
        Tile(16, 256, 4, 16, 1),
        Tile(32, 128, 4, 8, 1),
        Tile(32, 32, 1, 8, 1),
    ),
]
SCALES = [2.0, 0.5]


def gated_updates(sizes: Sizes) -> list[Group]:
    """Forward and backward."""
    element = 2 * sizes.tokens * sizes.intermediate
    return [
        Group(
            "gated update forward", lambda draw: _inputs(sizes, draw), _exact, 3 * element,
            _variants("FORWARD", _forward, _apart),
        ),
        Group(
            "gated update backward", lambda draw: _gradients(sizes, draw), _exact_backward, 5 * element,
            _variants("BACKWARD", _backward, _apart_backward),
        ),
    ]  # fmt: skip


def _variants(which: str, call: Callable[..., Any], apart: Callable[..., Any]) -> list[Variant]:
    named = {tile: " ".join(f"{name}={value}" for name, value in tile._asdict().items()) for tile in TILES}
    tried = [Variant(name, call, {(gated_linears, which): tile}) for tile, name in named.items()]
    return [*tried, Variant("update apart", apart)]


def _inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    b = [draw(sizes.intermediate, sizes.rank).float() / 8 for _ in range(2)]
    gate, up = (draw(sizes.tokens, sizes.intermediate) for _ in range(2))
    return {"gate": gate, "up": up, "t": draw(sizes.tokens, 2 * sizes.rank), "b_gate": b[0], "b_up": b[1]}


def _gradients(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return _inputs(sizes, draw) | {"grad": draw(sizes.tokens, sizes.intermediate)}


def _forward(**inputs: Tensor) -> Tensor:
    return gated_linears.gated_update(**inputs, scales=SCALES, activation="silu")


def _backward(grad: Tensor, **inputs: Tensor) -> Any:
    return gated_linears._gated_update_backward(grad, *inputs.values(), SCALES, "silu")


def _sums(gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor) -> list[Tensor]:
    rank = b_gate.shape[1]
    parts = ((gate, t[:, :rank], b_gate, SCALES[0]), (up, t[:, rank:], b_up, SCALES[1]))
    return [torch.addmm(y, part, b.to(t.dtype).t(), alpha=scale) for y, part, b, scale in parts]


def _apart(**inputs: Tensor) -> Tensor:
    return gated_activation.gated_activation(*_sums(**inputs), "silu")


def _apart_backward(grad: Tensor, **inputs: Tensor) -> Any:
    gate, up = _sums(**inputs)  # in training they are stored: what this takes longer than a backward is their update
    return gated_activation._gated_activation_backward(grad, gate, up, "silu", True, up.dtype)


def _exact(**inputs: Tensor) -> Tensor:
    wide = {name: value.double() for name, value in inputs.items()}
    return gated_linears.reference(**wide, scales=SCALES, activation="silu")


def _exact_backward(grad: Tensor, **inputs: Tensor) -> Any:
    wide = {name: value.double().requires_grad_(name in ("gate", "up")) for name, value in inputs.items()}
    y = gated_linears.reference(**wide, scales=SCALES, activation="silu")
    return torch.autograd.grad(y, (wide["gate"], wide["up"]), grad.double())
