"""One measure for every operator: forward and each gradient against float64, judged by eager's own error.

A result passes if its largest error is at most twice that of the reference in the same dtype, plus one unit in the last
place of the result's largest magnitude, plus the rounding that a reduction of ``reduction`` float32 terms may leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = Mapping[str, Any]


def run(function: Callable[..., Any], inputs: Inputs, seed: int) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs of ``function(**inputs)``, and the gradient of every leaf that requires one for random output gradients."""
    leaves: dict[str, Tensor] = {}

    def fresh(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().as_strided(value.shape, value.stride()).requires_grad_(value.requires_grad)
        if value.requires_grad:
            leaves[name] = copy
        return copy

    arguments = {
        name: [fresh(f"{name}[{i}]", v) for i, v in enumerate(value)] if isinstance(value, list) else fresh(name, value)
        for name, value in inputs.items()
    }
    outputs = [o for o in tree_leaves(function(**arguments)) if isinstance(o, Tensor)]
    live = [o for o in outputs if o.requires_grad]
    if not live or not leaves:
        return [o.detach() for o in outputs], {}
    generator = torch.Generator().manual_seed(seed)
    # laid out like the outputs, as gradients of a model are: cuDNN keeps its plans for attention (torch 2.11) by the strides of
    # q, k and v alone, and one made for a gradient of other strides computes nonsense for the next
    seeds = [torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator)) for o in live]
    grads = torch.autograd.grad(live, list(leaves.values()), seeds, allow_unused=True)
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def in_float64(inputs: Inputs) -> dict[str, Any]:
    """``inputs`` with every floating-point tensor upcast to float64, and ``dtype`` arguments with it."""

    def upcast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    return dict(tree_map(upcast, dict(inputs)))


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Unit in the last place of ``dtype`` at ``magnitude``."""
    return torch.finfo(dtype).eps * max(magnitude, torch.finfo(dtype).tiny)


def largest(x: Tensor) -> float:
    """Largest magnitude in ``x``; 0 for an empty tensor."""
    return float(x.double().abs().max()) if x.numel() else 0.0


def assert_accurate(
    operator: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Inputs,
    *,
    reduction: int = 1,
    scale: float | None = None,
    seed: int = 0,
) -> None:
    """Check ``operator(**inputs)`` and all its gradients against ``reference`` in float64.

    Args:
        reduction: the longest sum that a result takes, in terms.
        scale: largest magnitude of such a term, where it exceeds the results themselves (cancellation).
    """
    truth = run(reference, in_float64(inputs), seed)
    eager = run(reference, inputs, seed)
    ours = run(operator, inputs, seed)
    named = [(f"output {i}", *three) for i, three in enumerate(zip(truth[0], eager[0], ours[0], strict=True))]
    named += [(f"gradient of {n}", truth[1][n], eager[1][n], ours[1].get(n)) for n in truth[1]]
    for name, exact, peer, got in named:
        if exact is None or peer is None:
            assert got is None or largest(got) == 0.0, f"{name}: gradient where the reference has none"
            continue
        assert got is not None, f"{name} is missing"
        assert got.shape == peer.shape and got.dtype == peer.dtype, (
            f"{name}: {got.shape} {got.dtype}, {peer.shape} {peer.dtype}"
        )
        bad = ~torch.isfinite(peer)
        assert torch.equal(~torch.isfinite(got), bad), f"{name}: other NaN or inf than the reference"
        magnitude = max(largest(exact.masked_fill(bad, 0)), 0.0)
        term = max(scale or 0.0, magnitude)
        error = largest((got.double() - exact).masked_fill(bad, 0))
        own = largest((peer.double() - exact).masked_fill(bad, 0))
        allowed = 2 * own + ulp(got.dtype, magnitude) + ulp(torch.float32, term) * reduction**0.5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (reference {own:.3g}, {got.dtype})"
