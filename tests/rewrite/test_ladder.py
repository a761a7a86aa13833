"""Where Dynamo captures nothing, torch.fx traces: the module, else those that it calls, and the report says which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from weft import optimize, undo
from weft.rewrite.errors import CaptureError
from weft.rewrite.trace import state, trace

SIZE = 16


class Norm(nn.Module):
    """An RMS norm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) · w"""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class HiddenNorm(Norm):
    """The same, where Dynamo may not look."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """As :class:`Norm`."""
        return super().forward(x)


class Block(nn.Module):
    """A norm and a gated MLP."""

    def __init__(self, norm: type[nn.Module] = Norm) -> None:
        super().__init__()
        self.norm = norm()
        self.gate, self.up, self.down = nn.Linear(SIZE, 32), nn.Linear(SIZE, 32), nn.Linear(32, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """x + mlp(norm(x))"""
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class HiddenBlock(Block):
    """The same, where Dynamo may not look."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """As :class:`Block`."""
        return super().forward(x)


class Branching(Block):
    """A block that torch.fx cannot trace either: it branches on a value."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """As :class:`Block`, or its negative."""
        return super().forward(x) if float(x.sum()) > 0 else -super().forward(x)


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """All blocks."""
        for layer in self.layers:
            x = layer(x)
        return x


def x_of(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(sum(shape)))


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The result and every gradient."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model: nn.Module, plain: nn.Module, *shape: int) -> None:
    """Both compute the same, forward and gradients."""
    for a, b in zip(outcome(model, x_of(*shape)), outcome(plain, x_of(*shape)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def rungs(model: nn.Module) -> dict[str, str]:
    """Which rung each region reached."""
    return {path: region.rung for region in model.rewrite_report.regions for path in region.paths}


def twins(make: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal models, one of them optimized."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    return plain, optimize(make(), example_inputs={"x": x_of(2, 5)})


def test_a_hidden_block_is_traced_whole() -> None:
    plain, model = twins(lambda: Stack(HiddenBlock(), HiddenBlock()))
    assert rungs(model) == {"": "fx"}
    rules = {(r.rule, r.module_path) for r in model.rewrite_report.rewrites}
    assert rules >= {("rms_norm", "layers.0.norm"), ("gated_mlp", "layers.1")}
    for shape in ((2, 5), (3, 7), (1, 1), (0, 4)):
        assert_same(model, plain, *shape)


def test_a_hidden_norm_inside_a_captured_block() -> None:
    plain, model = twins(lambda: Stack(*(Block(HiddenNorm) for _ in range(2))))
    assert rungs(model)["layers.0.norm"] == "fx" and rungs(model)["layers.0"] == "graph"
    found = [(r.rule, r.module_path) for r in model.rewrite_report.rewrites]
    assert sorted(set(found)) == sorted(found) and ("rms_norm", "layers.1.norm") in found
    assert_same(model, plain, 3, 4)


def test_what_cannot_be_traced_says_so_and_its_modules_are_tried() -> None:
    plain, model = twins(lambda: Stack(Branching(), Branching()))
    assert rungs(model)["layers.0"] == "untouched" and rungs(model)["layers.0.norm"] == "fx"
    notes = [r.note for r in model.rewrite_report.regions if r.rung == "untouched"]
    assert notes and all("torch.fx could not trace" in note for note in notes)
    assert "could not trace" in model.rewrite_report.why_not("layers.0")
    for shape in ((2, 5), (3, 4), (4, 3)):
        assert_same(model, plain, *shape)


def test_undo_gives_the_forwards_back() -> None:
    plain, model = twins(lambda: Stack(HiddenBlock(), HiddenBlock()))
    undo(model)
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(model(x_of(2, 5)), plain(x_of(2, 5)))


def test_attributes_modes_and_arguments_are_compared() -> None:
    plain, model = twins(HiddenNorm)
    model.eps = plain.eps = 1.0
    assert_same(model, plain, 2, 5)
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x_of(2, 3)), plain(x_of(2, 3)))
    torch.testing.assert_close(model(x=x_of(2, 3)), plain(x_of(2, 3)))
    torch.testing.assert_close(model(x_of(2, 3).double()), plain(x_of(2, 3).double()))
    with pytest.raises(TypeError):
        model(x_of(2, 3), 1)


def test_a_weight_that_is_replaced_is_read_anew() -> None:
    plain, model = twins(HiddenNorm)
    for m in (model, plain):
        m.weight = nn.Parameter(torch.full((SIZE,), 3.0))
    assert_same(model, plain, 2, 5)


def test_other_strides_are_other_conditions() -> None:
    plain, model = twins(HiddenNorm)
    wide = x_of(4, 6).repeat(1, 1, 2)[..., ::2]
    torch.testing.assert_close(model(wide), plain(wide))
    turned = x_of(4, 6).transpose(0, 1)
    torch.testing.assert_close(model(turned), plain(turned))


def test_tensors_made_while_tracing_are_no_constants() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(SIZE)

    leaves, spec = tree_flatten(((x_of(2),), {}))
    with pytest.raises(CaptureError, match="makes a tensor"):
        module = Noisy()
        trace(module, module.forward, leaves, spec)


def test_what_parameters_alone_compute_is_computed_each_time() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(SIZE, 3)), nn.Parameter(torch.randn(3, SIZE))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.a @ self.b)

    module = Product()
    leaves, spec = tree_flatten(((x_of(2),), {}))
    traced = trace(module, module.forward, leaves, spec)
    with torch.no_grad():
        module.a.mul_(2)
    torch.testing.assert_close(traced.module(*traced.inputs(module, leaves)), module(x_of(2)))


def test_the_state_knows_hooks_attributes_and_modes() -> None:
    module = Block()
    before = state(module)
    assert state(module) == before
    handle = module.norm.register_forward_hook(lambda *_: None)
    assert state(module) != before
    handle.remove()
    assert state(module) == before
    module.norm.eps = 0.5
    assert state(module) != before
    module.norm.eps = 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert state(module) != before
    module.eval()
    assert state(module) != before
