"""Gated activation, the middle of a GLU feed-forward (arXiv:2002.05202): two tensors, or one that holds both halves.

    y = a(gate) · up            dup = dy · a(gate)            dgate = dy · up · a'(gate)

The activations a and their slopes are in :mod:`weft.kernels.activations`. Arithmetic is in float32. The kernel rounds
once, at the end. Eager rounds a(gate) too, and so does the CPU path, where torch's own 16-bit operators are much faster
than an upcast. Saved for the backward: gate, and up if gate needs a gradient; a(gate) is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import activations as A
from .dispatch import use_triton
from .operator import operator
from .toolchain import tl, triton

TILE = 2048
"""Elements that a program takes of each tensor."""
WARPS = 4

ACTIVATIONS: tuple[str, ...] = tuple(A.ACTIVATION)
"""The names that ``activation`` may take."""


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`gated_activation`."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (A.ACTIVATION[activation](gate.to(wide)) * up.to(wide)).to(dtype)


def reference_packed(gate_up: Tensor, activation: str, *, gate_first: bool = True, interleaved: bool = False) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`gated_activation_packed`."""
    return reference(*_halves(gate_up, gate_first, interleaved), activation)


def _halves(packed: Tensor, gate_first: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up in a packed tensor."""
    half = packed.shape[-1] // 2
    first, second = (packed[..., ::2], packed[..., 1::2]) if interleaved else (packed[..., :half], packed[..., half:])
    return (first, second) if gate_first else (second, first)


@triton.jit
def place(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS, 1) and first column of this program's tile."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    return program // across * ROWS + tl.arange(0, ROWS)[:, None], program % across * COLUMNS


@triton.jit
def load(start, stride, row, first, rows, columns, WIDTH: tl.constexpr):
    """A tile in float32; 0 outside of the matrix."""
    column = first + tl.arange(0, WIDTH)[None, :]
    return tl.load(start + row * stride + column, mask=(row < rows) & (column < columns), other=0.0).to(tl.float32)


@triton.jit
def store(start, stride, row, first, rows, columns, value, WIDTH: tl.constexpr):
    """Write what :func:`load` reads."""
    column = first + tl.arange(0, WIDTH)[None, :]
    tl.store(start + row * stride + column, value, mask=(row < rows) & (column < columns))


@triton.jit
def _load_pair(gate, up, strides, row, first, rows, columns, ORDER: tl.constexpr, COLUMNS: tl.constexpr):
    """gate and up. Interleaved ones are read as they lie and split in registers: strided reads would cost twice."""
    if ORDER == "apart":
        x = load(gate, strides[0], row, first, rows, columns, COLUMNS)
        u = load(up, strides[1], row, first, rows, columns, COLUMNS)
    else:
        both = load(gate, strides[0], row, 2 * first, rows, 2 * columns, 2 * COLUMNS)
        x, u = tl.split(tl.reshape(both, (row.shape[0], COLUMNS, 2)))
        if ORDER == "up_gate":
            x, u = u, x
    return x, u


@triton.jit
def _forward(
    gate, up, out, strides, rows, columns,
    ACTIVATION: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, first = place(columns, ROWS, COLUMNS)  # pyright: ignore
    x, u = _load_pair(gate, up, strides, row, first, rows, columns, ORDER, COLUMNS)
    y, _ = A.curve(x, x, ACTIVATION)
    store(out, strides[2], row, first, rows, columns, y * u, COLUMNS)


@triton.jit
def _backward(
    gate, up, grad, dgate, dup, strides, rows, columns,
    ACTIVATION: tl.constexpr, ORDER: tl.constexpr, NEEDS_GATE: tl.constexpr, NEEDS_UP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, first = place(columns, ROWS, COLUMNS)  # pyright: ignore
    # The compiler drops what only serves a gradient that is not stored, the load of up included.
    x, u = _load_pair(gate, up, strides, row, first, rows, columns, ORDER, COLUMNS)
    d = load(grad, strides[2], row, first, rows, columns, COLUMNS)
    y, dx = A.curve(x, d * u, ACTIVATION)
    du = d * y
    if ORDER == "apart":
        if NEEDS_GATE:
            store(dgate, strides[3], row, first, rows, columns, dx, COLUMNS)
        if NEEDS_UP:
            store(dup, strides[4], row, first, rows, columns, du, COLUMNS)
    else:
        both = tl.join(dx, du) if ORDER == "gate_up" else tl.join(du, dx)
        both = tl.reshape(both, (ROWS, 2 * COLUMNS))
        store(dgate, strides[3], row, 2 * first, rows, 2 * columns, both, 2 * COLUMNS)


def as_rows(x: Tensor) -> Tensor:
    """``x`` as rows of adjacent elements: a view wherever its strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(kernel: Any, tensors: list[Tensor], columns: int, **options: Any) -> None:
    """Run ``kernel`` over tensors of equal shape, a packed one twice as wide; outputs are rows of adjacent elements."""
    rows = tensors[0].numel() // tensors[0].shape[-1]
    if all(t.is_contiguous() for t in tensors):
        tensors, columns, rows = [t.view(1, -1) for t in tensors], columns * rows, 1
    else:
        tensors = [as_rows(t) for t in tensors]
    width, height = _tile(rows, columns)
    grid = (triton.cdiv(rows, height) * triton.cdiv(columns, width),)
    strides = tuple(t.stride(0) for t in tensors)
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, strides, rows, columns, ROWS=height, COLUMNS=width, num_warps=WARPS, **options)


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """Columns and rows of a program's tile; narrow enough to waste little of the last one in a row."""
    width = triton.next_power_of_2(min(columns, TILE))
    while width > 128 and triton.cdiv(columns, width) * width * 8 > columns * 9:
        width //= 2
    return width, min(max(TILE // width, 1), triton.next_power_of_2(rows))  # pyright: ignore


def _on_triton(*tensors: Tensor) -> bool:
    return use_triton(tensors[0]) and all(t.dtype != torch.float64 for t in tensors)


def _plain_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return A.ACTIVATION[activation](gate.to(dtype)).mul_(up).to(dtype).contiguous()


def _plain_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_up: bool
) -> tuple[Tensor, Tensor]:
    gate, none = gate.to(grad.dtype), grad.new_empty(0)
    dup = A.ACTIVATION[activation](gate).mul_(grad) if needs_up else none
    return none if up is None else A.CHAIN[activation](grad * up, gate), dup


@operator("weft::gated_activation")
def _gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not _on_triton(gate, up):
        return _plain_forward(gate, up, activation)
    out = _gated_activation_fake(gate, up, activation)
    if out.numel():
        _launch(_forward, [gate, up, out], out.shape[-1], ACTIVATION=activation, ORDER="apart")
    return out


@_gated_activation.register_fake
def _gated_activation_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@operator("weft::gated_activation_backward")
def _gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_up: bool, up_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of gate, unless ``up`` is None, and of up, if ``needs_up``; an empty tensor stands for none."""
    if not _on_triton(grad, gate):
        dgate, dup = _plain_backward(grad, gate, up, activation, needs_up)
        return dgate.to(gate.dtype).contiguous(), dup.to(up_dtype).contiguous()
    dgate, dup = _gated_activation_backward_fake(grad, gate, up, activation, needs_up, up_dtype)
    return _launch_backward(grad, gate, up, activation, dgate, dup, needs_up)


def _launch_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, dgate: Tensor, dup: Tensor, needs_up: bool
) -> tuple[Tensor, Tensor]:
    if grad.numel():
        tensors = [gate, gate if up is None else up, grad, gate if up is None else dgate, dup if needs_up else gate]
        flags = {"NEEDS_GATE": up is not None, "NEEDS_UP": needs_up}
        _launch(_backward, tensors, grad.shape[-1], ACTIVATION=activation, ORDER="apart", **flags)
    return dgate, dup


@_gated_activation_backward.register_overwriting("gate", "up")
def _(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_up: bool, up_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # a program reads an element of these two before it writes there, and no other program does
    alike = up is not None and needs_up and up.dtype == gate.dtype and up.is_contiguous() and gate.is_contiguous()
    if up is None or not alike or not _on_triton(grad, gate):
        return _gated_activation_backward(grad, gate, up, activation, needs_up, up_dtype)
    return _launch_backward(grad, gate, up, activation, gate, up, True)


@_gated_activation_backward.register_fake
def _gated_activation_backward_fake(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_up: bool, up_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (
        gate.new_empty(0 if up is None else gate.shape),
        gate.new_empty(gate.shape if needs_up else 0, dtype=up_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.up_dtype = up.dtype
    ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    gate, up = ctx.saved_tensors
    needs_gate, needs_up, _ = ctx.needs_input_grad
    dgate, dup = _gated_activation_backward(grad, gate, up, ctx.activation, needs_up, ctx.up_dtype)
    return dgate if needs_gate else None, dup if needs_up else None, None


_gated_activation.register_autograd(_gradients, setup_context=_setup_context)


@operator("weft::gated_activation_packed")
def _packed(gate_up: Tensor, activation: str, gate_first: bool, interleaved: bool) -> Tensor:
    gate, up = _halves(gate_up, gate_first, interleaved)
    if not _on_triton(gate_up):
        return _plain_forward(gate, up, activation)
    out = _packed_fake(gate_up, activation, gate_first, interleaved)
    if out.numel():
        order, inputs = _order(gate_up, gate, up, gate_first, interleaved)
        _launch(_forward, [*inputs, out], out.shape[-1], ACTIVATION=activation, ORDER=order)
    return out


@_packed.register_fake
def _packed_fake(gate_up: Tensor, activation: str, gate_first: bool, interleaved: bool) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _order(packed: Tensor, gate: Tensor, up: Tensor, gate_first: bool, interleaved: bool) -> tuple[str, list[Tensor]]:
    """How the kernel is to read a packed tensor, and the two tensors that it then takes."""
    if not interleaved:
        return "apart", [gate, up]
    return "gate_up" if gate_first else "up_gate", [packed, packed]


@operator("weft::gated_activation_packed_backward")
def _packed_backward(grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool, interleaved: bool) -> Tensor:
    result = _packed_backward_fake(grad, gate_up, activation, gate_first, interleaved)
    gate, up = _halves(gate_up, gate_first, interleaved)
    dgate, dup = _halves(result, gate_first, interleaved)
    if not _on_triton(grad, gate_up):
        for target, value in zip((dgate, dup), _plain_backward(grad, gate, up, activation, True), strict=True):
            target.copy_(value)
    elif grad.numel():
        order, inputs = _order(gate_up, gate, up, gate_first, interleaved)
        outputs = _order(result, dgate, dup, gate_first, interleaved)[1]
        flags = {"NEEDS_GATE": True, "NEEDS_UP": True}
        _launch(_backward, [*inputs, grad, *outputs], grad.shape[-1], ACTIVATION=activation, ORDER=order, **flags)
    return result


@_packed_backward.register_fake
def _packed_backward_fake(
    grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool, interleaved: bool
) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, *ctx.options = inputs
    ctx.save_for_backward(gate_up)


def _packed_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _packed_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_packed.register_autograd(_packed_gradients, setup_context=_packed_setup_context)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``a(gate) * up`` in one pass over memory, and both gradients in another (arXiv:2002.05202).

    Args:
        gate: (..., F), any floating-point dtype. Views whose last dimension is adjacent, such as halves of one tensor,
            are read in place.
        up: like ``gate``, which it must equal in shape; its dtype may differ.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        (..., F), contiguous, in the promoted dtype of ``gate`` and ``up``.

    Raises:
        ValueError: ``activation`` is unknown, or shapes, devices or dtypes do not fit.
    """
    check(activation, gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up differ in shape: {tuple(gate.shape)} and {tuple(up.shape)}")
    if gate.device != up.device:
        raise ValueError(f"gate is on {gate.device}, up on {up.device}")
    return _gated_activation(gate, up, activation)


def gated_activation_packed(
    gate_up: Tensor, activation: str, *, gate_first: bool = True, interleaved: bool = False
) -> Tensor:
    """``a(gate) * up`` of the two halves of one tensor; its gradient is written as one tensor, too.

    Args:
        gate_up: (..., 2F), any floating-point dtype.
        activation: one of :data:`ACTIVATIONS`.
        gate_first: whether gate comes before up.
        interleaved: whether they alternate element by element, instead of half by half.

    Returns:
        (..., F), contiguous, in ``gate_up``'s dtype.

    Raises:
        ValueError: ``activation`` is unknown, or the last dimension is odd.
    """
    check(activation, gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up holds two halves, so its last dimension must be even: {tuple(gate_up.shape)}")
    return _packed(gate_up, activation, gate_first, interleaved)


def check(activation: str, *tensors: Tensor) -> None:
    """Raises ValueError for an unknown activation, or tensors without elements of floating point in a last dimension."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    for x in tensors:
        if not x.is_floating_point() or x.dim() == 0:
            raise ValueError(f"need floating-point tensors of at least one dimension, got {x.dtype} {tuple(x.shape)}")
