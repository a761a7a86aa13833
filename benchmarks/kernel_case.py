"""What the kernel benchmark needs to know of one operator, and the random inputs of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from weft.quant.layout import Layout

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """One layer of a model, and the tokens that go through it. The defaults are those of Llama-3-8B."""

    batch: int = 4
    length: int = 2048
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    rank: int = 16

    @property
    def tokens(self) -> int:
        """Rows of every matrix product."""
        return self.batch * self.length


TINY = Sizes(batch=2, length=8, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=320, rank=4)


@dataclass
class Draw:
    """Fresh random numbers on one device; no two calls give the same."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        """Normal numbers, as a leaf that requires a gradient or not."""
        made = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return made.mul_(scale).to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform integers below ``high``."""
        return torch.randint(0, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        """A frozen dense weight that keeps the variance of what it multiplies."""
        return self(rows, columns, scale=columns**-0.5)

    def packed(self, layout: Layout) -> list[Tensor]:
        """A 4-bit weight with double quantization: random codes, positive scales of about 1 / sqrt(in_features)."""
        blocks = layout.out_features * layout.in_features // layout.block_size
        spread, float32 = layout.in_features**-0.5, {"device": self.device, "dtype": torch.float32}
        nested = torch.rand(-(-blocks // layout.nested_block_size), generator=self.generator, **float32) * spread
        return [
            self.integers(256, layout.out_features * layout.in_features // 2, 1, dtype=torch.uint8),
            self.integers(256, blocks, dtype=torch.uint8),
            nested,
            torch.linspace(-1, 1, 256, **float32),
            torch.tensor(2 * spread, **float32),
        ]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Args:
        name: the operator, and after a slash what it is applied to.
        inputs: draws the keyword arguments that every arm is called with.
        weft: the operator.
        eager: the same as transformers and PEFT write it; None: there is no such spelling in torch.
        reference: the operator's formula, called with everything in float64.
        reads: inputs that the backward must read again, and ``writes``: those whose gradient it must write, once each.
        flops: floating-point operations of the forward and of the backward; None: what counts is bytes.
        others: further arms, by the name of the package that they need.
    """

    name: str
    inputs: Callable[[Sizes, Draw], dict[str, Any]]
    weft: Callable[..., Any]
    eager: Callable[..., Any] | None
    reference: Callable[..., Any]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    flops: Callable[[Sizes], tuple[float, float]] | None = None
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def layout_4bit(rows: int, columns: int) -> Layout:
    """NF4 as QLoRA stores it: blocks of 64, their scales in blocks of 256."""
    return Layout("nf4", rows, columns, 64, 256)


def in_float64(inputs: Inputs) -> dict[str, Any]:
    """``inputs`` with every floating-point tensor upcast, and ``dtype`` arguments with it."""

    def upcast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    return dict(tree_map(upcast, dict(inputs)))
