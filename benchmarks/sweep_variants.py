"""What ``benchmarks.sweep`` tries: for each memory-bound kernel, settings of its launch, and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels import dequantize_4bit as deq
from weft.kernels import layer_norm as ln
from weft.kernels import quant_matvec as mv
from weft.kernels import quant_rows as qr
from weft.kernels import rms_norm as rms
from weft.kernels import rope, rows
from weft.kernels.quant_linear import quant_linear
from weft.kernels.quant_matvec import Tile

from .kernel_case import Draw, Sizes, layout_4bit
from .row_cases import _rope_inputs, bitsandbytes_dequantize, eager_dequantize, eager_rms_norm, eager_rope

EPS = 1e-5
Settings = Mapping[tuple[Any, str], Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute a group's result: a call, under settings of modules."""

    name: str
    call: Callable[..., Any]
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Ways to compute one thing. ``exact`` None: there is nothing to compare; ``limit``: relative error, 0 for none."""

    name: str
    inputs: Callable[[Draw], dict[str, Any]]
    exact: Callable[..., Any] | None
    moved: int
    variants: Sequence[Variant]
    limit: float = 5e-3


def by_loads() -> dict[tuple[Any, str], Any]:
    """Settings under which decoding looks up the code by loads: copies of its kernels that read another constant."""
    names = {**vars(mv), "SHUFFLES": tl.constexpr(False)}
    for name in ("lane_table", "look_up", "_one_row", "_several_rows"):
        given = vars(mv)[name].fn
        copy = FunctionType(given.__code__, names, name)
        copy.__annotations__, copy.__module__ = given.__annotations__, given.__module__
        names[name] = triton.jit(copy)
    return {(mv, name): names[name] for name in ("_one_row", "_several_rows")}


def _grid(call: Callable[..., Any], **choices: tuple[Sequence[tuple[Any, str]], Sequence[Any]]) -> Iterator[Variant]:
    """A variant for each combination of values of some settings; a choice may set several modules at once."""
    for values in product(*(options for _, options in choices.values())):
        settings = {at: v for (places, _), v in zip(choices.values(), values, strict=True) for at in places}
        yield Variant(" ".join(f"{n}={v}" for n, v in zip(choices, values, strict=True)), call, settings)


def floors(sizes: Sizes) -> list[Group]:
    """What a launch costs, and what a copy of a norm's size reaches."""

    def inputs(draw: Draw) -> dict[str, Any]:
        return {"x": draw(sizes.tokens, sizes.hidden)}

    moved = 4 * sizes.tokens * sizes.hidden
    return [
        Group("launch", lambda draw: {"x": draw(1)}, None, 4, [Variant("neg", torch.neg)]),
        Group("copy", inputs, None, moved, [Variant("clone", torch.clone), Variant("add", lambda x: x + 1)]),
    ]


def dequantizations(sizes: Sizes) -> list[Group]:
    """Sizes of gate and up, q and o, k and v."""
    return [_dequantization(outs, sizes.hidden) for outs in _outs(sizes)]


def _outs(sizes: Sizes) -> tuple[int, ...]:
    return sizes.intermediate, sizes.hidden, sizes.kv_heads * sizes.head_dim


def _dequantization(outs: int, ins: int) -> Group:
    layout = layout_4bit(outs, ins)

    def inputs(draw: Draw) -> dict[str, Any]:
        table = deq.four_bit.code_table("nf4", draw.device)
        return {"weight": draw.packed(layout), "layout": layout.encode(), "dtype": draw.dtype, "table": table}

    def ours(weight: list[Tensor], layout: str, dtype: torch.dtype, table: Tensor) -> Tensor:
        return deq.dequantize_4bit(weight, layout, dtype)

    def exact(weight: list[Tensor], layout: str, dtype: torch.dtype, table: Tensor) -> Tensor:
        return deq.reference(weight, layout, dtype)

    variants = list(_grid(ours, unroll=([(deq, "UNROLL")], (2, 4)), warps=([(deq, "WARPS")], (2, 4))))
    variants.append(Variant("bitsandbytes", bitsandbytes_dequantize))
    variants.append(Variant("compiled eager", torch.compile(eager_dequantize, dynamic=False)))
    return Group(f"dequantize {outs}x{ins}", inputs, exact, outs * ins * 5 // 2 + outs * ins // 64, variants, 1e-5)


def decodings(sizes: Sizes) -> list[Group]:
    """One token and eight through each linear, and other numbers through the largest."""
    shapes = [*((outs, sizes.hidden) for outs in _outs(sizes)), (sizes.hidden, sizes.intermediate)]
    several = [_decoding(rows, *shapes[0]) for rows in (2, 4, 16)]
    return [*(_decoding(rows, *shape) for rows in (1, 8) for shape in shapes), *several]


def _decoding(count: int, outs: int, ins: int) -> Group:
    layout = layout_4bit(outs, ins)

    def inputs(draw: Draw) -> dict[str, Any]:
        return {"x": draw(count, ins), "weight": draw.packed(layout), "layout": layout.encode()}

    def exact(x: Tensor, weight: list[Tensor], layout: str) -> Tensor:
        return F.linear(x.double(), deq.reference(weight, layout, torch.float32).double())

    def theirs(x: Tensor, weight: list[Tensor], layout: str) -> Tensor:
        from .product_cases import base_linear

        return base_linear(x, weight, layout)

    if count == 1:
        tiles, places, elsewhere = [Tile(*t) for t in product((4, 8), (256, 512), (4, 8))], ("ONE_ROW", "NARROW"), {}
    else:
        tiles, places = [Tile(64, 32, 4, 2), Tile(32, 64, 4), Tile(64, 32, 8), Tile(32, 32, 4)], ("SEVERAL",)
        elsewhere = {(qr, "serves"): lambda *_: False, (mv, "ALONE"): 1}
    variants = []
    for tile in tiles:
        name = f"outs={tile.outs} words={tile.words} warps={tile.warps} stages={tile.stages}"
        variants.append(Variant(name, quant_linear, {**elsewhere, **{(mv, place): tile for place in places}}))
    if count == 1:
        variants.append(Variant("loads", quant_linear, by_loads()))
    else:
        variants.append(Variant("each alone", quant_linear, {**elsewhere, (mv, "ALONE"): count}))
        settings = {
            "warps": ([(qr, "WARPS")], (4, 8)),
            "unroll": ([(qr, "UNROLL")], (2, 4)),
            "resident": ([(qr, "RESIDENT")], (3, 4)),
        }
        variants += [replace(v, name=f"matrix units {v.name}") for v in _grid(quant_linear, **settings)]
    variants += [Variant("dense", quant_linear, {(mv, "FEW_ROWS"): 0}), Variant("bitsandbytes", theirs)]
    moved = outs * ins // 2 + outs * ins // 64 + 2 * count * (outs + ins)
    return Group(f"decode {count} row {outs}x{ins}", inputs, exact, moved, variants, 8e-3)


def norms(sizes: Sizes) -> list[Group]:
    """Forward, and backward with trained weights; the backward of a frozen weight is there to compare with."""
    moved, vector = 2 * sizes.tokens * sizes.hidden, sizes.hidden

    def inputs(draw: Draw) -> dict[str, Tensor]:
        return {"x": draw(sizes.tokens, vector), "weight": draw(vector), "bias": draw(vector)}

    def gradients(draw: Draw) -> dict[str, Tensor]:
        given = inputs(draw)
        wide = given["x"].float()
        mu, square = wide.mean(-1, keepdim=True), wide.square().mean(-1, keepdim=True)
        r, r_centred = (square + EPS).rsqrt(), (square - mu.square() + EPS).rsqrt()
        return {**given, "dy": draw(sizes.tokens, vector), "mu": mu, "r": r, "r_centred": r_centred}

    groups = []
    for module, call, exact in ((rms, _rms, _exact_rms), (ln, _layer, _exact_layer)):
        name = module.__name__.rsplit(".", 1)[-1]
        tried = list(_grid(call, per_thread=([(module, "PER_THREAD")], (16, 32))))
        if module is rms:
            eager = torch.compile(lambda x, weight, bias: eager_rms_norm(x, weight, EPS), dynamic=False)
            tried.append(Variant("compiled eager", eager))
        else:
            tried.append(Variant("torch", lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS)))
        groups.append(Group(f"{name} forward", inputs, exact, 2 * moved, tried))
    for module, call, exact in ((rms, _rms_back, _exact_rms_back), (ln, _layer_back, _exact_layer_back)):
        name = module.__name__.rsplit(".", 1)[-1]
        tried = list(
            _grid(
                call,
                per_thread=([(rows, "PER_THREAD_BACKWARD")], (16, 32)),
                resident=([(rows, "RESIDENT_WARPS")], (8, 16)),
                stages=([(rows, "STAGES")], (3, 4)),
            )
        )
        tried.append(Variant("frozen", _rms_back_frozen if module is rms else _layer_back_frozen))
        groups.append(Group(f"{name} backward", gradients, exact, 3 * moved, tried))
    return groups


def _rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rms.rms_norm(x, weight, EPS)


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ln.layer_norm(x, weight, bias, EPS)


def _exact_rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rms.reference(x.double(), weight.double(), EPS)


def _exact_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ln.reference(x.double(), weight.double(), bias.double(), EPS)


def _rms_back(x: Tensor, weight: Tensor, dy: Tensor, r: Tensor, *, trained: bool = True, **_: Tensor) -> Any:
    return rms.backward(dy, x, weight, r, None, EPS, 0.0, "inside", True, trained)


def _rms_back_frozen(**inputs: Tensor) -> Any:
    return _rms_back(**inputs, trained=False)  # pyright: ignore[reportArgumentType]


def _layer_back(
    x: Tensor, weight: Tensor, dy: Tensor, mu: Tensor, r_centred: Tensor, *, trained: bool = True, **_: Tensor
) -> Any:
    needs = (True, trained, trained)
    return ln._layer_norm_backward(dy, x, weight, mu, r_centred, None, 0.0, weight.dtype, *needs)


def _layer_back_frozen(**inputs: Tensor) -> Any:
    return _layer_back(**inputs, trained=False)  # pyright: ignore[reportArgumentType]


def _exact_rms_back(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, **_: Tensor) -> Any:
    leaves = wide, factor = [t.double().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(rms.reference(wide, factor, EPS), leaves, dy.double())


def _exact_layer_back(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, **_: Tensor) -> Any:
    leaves = wide, factor, shift = [t.double().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(ln.reference(wide, factor, shift, EPS), leaves, dy.double())


def ropes(sizes: Sizes) -> list[Group]:
    """Queries and keys, forward: the backward is the same kernel."""

    def inputs(draw: Draw) -> dict[str, Any]:
        return {name: t.detach() for name, t in _rope_inputs(sizes, draw).items()}

    def exact(**tensors: Tensor) -> Any:
        return rope.reference(**{name: t.double() for name, t in tensors.items()})

    variants = list(_grid(rope.rope, tile=([(rope, "TILE")], (2048, 4096)), warps=([(rope, "WARPS")], (4, 8))))
    variants.append(Variant("compiled eager", torch.compile(eager_rope, dynamic=False)))
    elements = sizes.tokens * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    return [Group("rope", inputs, exact, 4 * elements + 4 * sizes.length * sizes.head_dim, variants)]


def groups(sizes: Sizes) -> list[Group]:
    """All of them."""
    return [*floors(sizes), *dequantizations(sizes), *decodings(sizes), *norms(sizes), *ropes(sizes)]
