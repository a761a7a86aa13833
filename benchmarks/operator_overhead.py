"""What a call of an operator costs the host: tiny tensors, so that nothing but the calls themselves takes time.

    python -m benchmarks.operator_overhead

Microseconds a call; forward without gradients, forward that saves for a backward, and the backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.kernels.lora_linear import lora_linear
from weft.kernels.parallel_linears import parallel_linears
from weft.kernels.quant_linear import quant_linear
from weft.kernels.rms_norm import rms_norm
from weft.kernels.rope import rope
from weft.quant.layout import Layout

WIDTH, RANK, BLOCK = 64, 4, 64
Case = tuple[Callable[..., Any], list[Tensor]]


def packed(device: str) -> tuple[list[Tensor], str]:
    """A 4-bit weight and its layout."""
    count = WIDTH * WIDTH
    codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device)
    return [codes, torch.rand(count // BLOCK, device=device)], Layout("nf4", WIDTH, WIDTH, BLOCK).encode()


def cases(device: str, dtype: torch.dtype) -> dict[str, Case]:
    """Each call, and the tensors whose gradients it computes."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    weight, layout = packed(device)
    x, q = normal(4, WIDTH).requires_grad_(), normal(1, 2, 4, 16).requires_grad_()
    adapters = [(normal(RANK, WIDTH).requires_grad_(), normal(WIDTH, RANK).requires_grad_()) for _ in range(3)]
    a, b = ([each[i] for each in adapters] for i in range(2))
    scale, cos, sin = normal(WIDTH), normal(1, 1, 4, 16), normal(1, 1, 4, 16)
    return {
        "rms_norm": (partial(rms_norm, x, scale, 1e-6), [x]),
        "rope": (partial(rope, q, q, cos, sin), [q]),
        "quant_linear": (partial(quant_linear, x, weight, layout), [x]),
        "lora_linear": (partial(lora_linear, x, weight, layout, None, a[0], b[0], 2.0), [x, a[0], b[0]]),
        "parallel_linears": (
            partial(parallel_linears, x, [weight] * 3, [layout] * 3, None, a, b, [2.0] * 3),
            [x, *a, *b],
        ),
    }


def microseconds(call: Callable[[], Any], repeats: int, calls: int = 50) -> float:
    """The least over ``repeats`` of the mean over ``calls``: what else runs only ever adds."""
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - started) / calls * 1e6)
    return min(samples)


def measure(call: Callable[[], Any], inputs: list[Tensor], repeats: int) -> tuple[float, float, float]:
    """Forward without gradients, forward, and backward."""

    def forward() -> tuple[Tensor, ...]:
        y = call()
        return y if isinstance(y, tuple) else (y,)

    def plain() -> Any:
        with torch.no_grad():
            return call()

    ys = forward()
    ones = [torch.ones_like(y) for y in ys]
    back = partial(torch.autograd.grad, ys, inputs, ones, retain_graph=True)
    return microseconds(plain, repeats), microseconds(forward, repeats), microseconds(back, repeats)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"{'µs a call':<18}{'no gradients':>14}{'forward':>10}{'backward':>10}")
    for name, (call, inputs) in cases(options.device, getattr(torch, options.dtype)).items():
        plain, forward, backward = measure(call, inputs, options.repeats)
        print(f"{name:<18}{plain:>14.1f}{forward:>10.1f}{backward:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
