"""What only hands a value on is no place of its own; a tensor that is asked for its dtype alone is no input."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from weft.passes.gated_mlp import FuseGatedMlp
from weft.passes.layer_norm import FuseLayerNorm
from weft.passes.lora_linear import FuseLoraLinear
from weft.passes.rms_norm import FuseRmsNorm

from ..graphs import check, here, normal, record, targets


def normed(x: Any) -> Any:
    """x / rms(x)"""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_transpose_undone_is_not_where_the_norm_stands() -> None:
    def function(x: Any) -> Any:
        return normed(x).transpose(1, 2).transpose(1, 2) * 2.0

    module, _ = check(function, {"x": normal(0, 2, 3, 4)}, [FuseRmsNorm()], count=1)
    assert targets(module) == ["rms_norm", "transpose", "transpose", "mul"]


def test_equal_values_computed_twice_are_both_rewritten() -> None:
    def function(x: Any, y: Any) -> Any:
        first = normed(x)
        y.add_(1.0)
        return first, normed(x) + y

    _, outcome = check(function, {"x": normal(0, 2, 3, 4), "y": normal(1, 4)}, [FuseRmsNorm()], count=2)
    assert not outcome.refusals


def test_what_gives_only_its_dtype_may_change_in_between() -> None:
    """``like`` is made from a tensor that is written into; its values are not read."""

    def function(x: Any, w: Any, a: Any, b: Any, y: Any) -> Any:
        z = y * 1.0
        record(operator.setitem, z, 0, 0.0)
        like = torch.cat((z, y), -1)
        xs = x.type_as(like)
        return F.linear(xs, w) + 2.0 * F.linear(F.linear(xs, a), b), like

    inputs = {"x": normal(0, 3, 4), "w": normal(1, 5, 4), "a": normal(2, 2, 4), "b": normal(3, 5, 2)}
    inputs["y"] = normal(4, 3, 4)
    module, outcome = check(function, inputs, [FuseLoraLinear()], count=1, terms=16)
    assert targets(module).count("lora_linear") == 1 and not outcome.refusals


def test_an_activation_times_a_number_is_no_gate() -> None:
    _, outcome = check(lambda x: torch.tanh(x / 30.0) * 30.0, {"x": normal(0, 3, 4)}, [FuseGatedMlp()], count=0)
    assert not outcome.refusals


def test_a_replacement_keeps_the_memory_order() -> None:
    """Readers may take a view that exists in one order alone."""

    def function(x: Any) -> Any:
        return F.layer_norm(x.transpose(1, 2), (4,)).view(2, 12)

    module, _ = check(function, {"x": normal(0, 2, 4, 3)}, [FuseLayerNorm()], count=1, terms=16, dynamic=True)
    assert "layer_norm" in targets(module) and "contiguous" in targets(module)


def test_what_is_laid_out_alike_is_not_copied() -> None:
    def function(x: Any) -> Any:
        y = x.transpose(1, 2)
        return normed(y).transpose(1, 2).view(2, 12)

    module, _ = check(function, {"x": normal(0, 2, 4, 3)}, [FuseRmsNorm()], count=1, terms=16, dynamic=True)
    assert targets(module) == ["transpose", "rms_norm", "transpose", "view"]


def test_a_cast_that_is_none_may_stand_under_another_mode() -> None:
    """Only the products run without gradients; what hands their input on was computed before."""

    def function(x: Any, w: Any, a: Any, b: Any) -> Any:
        y = torch.tanh(x).float()
        here(x, torch._C._set_grad_enabled, False)
        z = F.linear(y, w) + 2.0 * F.linear(F.linear(y, a), b)
        here(x, torch._C._set_grad_enabled, True)
        return z, y

    inputs = {"x": normal(0, 3, 4), "w": normal(1, 5, 4), "a": normal(2, 2, 4), "b": normal(3, 5, 2)}
    _, outcome = check(function, inputs, [FuseLoraLinear()], count=1, terms=16)
    assert not outcome.refusals


def test_replay_at_the_traced_sizes_where_no_smaller_ones_fit() -> None:
    """The width that a weight asks for is four times a length that is longer than replays are."""

    def function(x: Any, w: Any) -> Any:
        y = x.reshape(2, 3, -1)
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    inputs = {"x": normal(0, 6, 100, 4), "w": normal(1, 400)}
    _, outcome = check(function, inputs, [FuseRmsNorm()], count=1, terms=16, dynamic=True, verify=True)
    assert outcome.rewrites[0].error is not None
