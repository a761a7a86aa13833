"""Operators that mix along the sequence are named; what a mask keeps apart, and what mixes features, is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.passes.sequence_mixing import FindSequenceMixing

from ..graphs import normal, targets, trace

LENGTH = 11
INPUTS: dict[str, Tensor] = {
    "x": normal(0, 1, LENGTH, 6),
    "mask": normal(1, 1, LENGTH, LENGTH),
    "kernel": normal(2, 6, 1, 3),
    "point": normal(3, 4, 6, 1),
    "w": normal(4, 6, 6),
}


def found(function: Callable[..., Any]) -> list[str]:
    """The reasons for refusal, without the ends."""
    module = trace(function, INPUTS)
    before = targets(module)
    outcome = FindSequenceMixing(LENGTH).run(module, None)
    assert targets(module) == before and all(r.rule == "packing" for r in outcome.refusals)
    return [r.reason for r in outcome.refusals]


def read_in_turn(x: Any, mask: Any, kernel: Any, point: Any, w: Any) -> Any:
    state = x[:, 0]
    states = [state]
    for i in range(1, LENGTH):
        state = torch.tanh(state @ w) + x[:, i]
        states.append(state)
    return torch.stack(states, 1)


MIXING: dict[str, tuple[Callable[..., Any], str]] = {
    "convolution": (
        lambda x, mask, kernel, point, w: F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=6),
        "conv1d of kernel [3]",
    ),
    "running sum": (lambda x, mask, kernel, point, w: x.cumsum(1), "cumsum runs over"),
    "running sum, from the end": (lambda x, mask, kernel, point, w: torch.cumsum(x, dim=-2), "cumsum runs over"),
    "mean of all tokens": (lambda x, mask, kernel, point, w: x - x.mean(1, keepdim=True), "mean runs over"),
    "recurrence": (read_in_turn, "one place at a time"),
    "linear attention": (
        lambda x, mask, kernel, point, w: x @ (x.transpose(1, 2) @ x),
        "matmul sums over the places",
    ),
    "linear attention, einsum": (
        lambda x, mask, kernel, point, w: torch.einsum("btd,bde->bte", x, torch.einsum("btd,bte->bde", x, x)),
        "einsum sums over the places",
    ),
    "softmax without a mask": (
        lambda x, mask, kernel, point, w: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        "softmax over all places has no mask",
    ),
    "attention without a mask": (
        lambda x, mask, kernel, point, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        "has no mask",
    ),
    "causal attention without a mask": (
        lambda x, mask, kernel, point, w: F.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], is_causal=True
        ),
        "has no mask",
    ),
    "shift": (lambda x, mask, kernel, point, w: x + F.pad(x, (0, 0, 1, -1)), "pad shifts"),
    "shift, joined": (lambda x, mask, kernel, point, w: torch.cat((x[:, :1] * 0, x[:, :-1]), 1), "cat shifts"),
    "roll": (lambda x, mask, kernel, point, w: x.roll(1, 1), "roll runs over"),
    "reversed": (lambda x, mask, kernel, point, w: x.flip(1), "flip runs over"),
    "spectrum": (lambda x, mask, kernel, point, w: torch.fft.fft(x, dim=1).real, "fft_fft runs over"),
    "norm over time": (lambda x, mask, kernel, point, w: F.group_norm(x.transpose(1, 2), 2), "group_norm runs over"),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_named(name: str) -> None:
    function, reason = MIXING[name]
    assert any(reason in text for text in found(function)), found(function)


APART: dict[str, Callable[..., Any]] = {
    "features": lambda x, mask, kernel, point, w: F.layer_norm(F.silu(x @ w), (6,)) + x.sum(-1, keepdim=True),
    "softmax of features": lambda x, mask, kernel, point, w: x.softmax(-1),
    "pointwise convolution": lambda x, mask, kernel, point, w: F.conv1d(x.transpose(1, 2), point),
    "attention with a mask": lambda x, mask, kernel, point, w: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], mask[:, None]
    ),
    "softmax with a mask added": lambda x, mask, kernel, point, w: (
        (x @ x.transpose(1, 2) * 0.4 + mask).softmax(-1, dtype=torch.float32).to(x.dtype) @ x
    ),
    "softmax with a mask filled in": lambda x, mask, kernel, point, w: (
        (x @ x.transpose(1, 2)).masked_fill(mask > 0, -1e9).softmax(-1) @ x
    ),
    "softmax with a mask chosen": lambda x, mask, kernel, point, w: torch.einsum(
        "bqk,bkd->bqd", torch.where(mask > 0, x @ x.transpose(1, 2), -1e9).softmax(-1), x
    ),
    "a loss over all tokens": lambda x, mask, kernel, point, w: (x @ w, (x @ w).square().mean()),
    "the last token": lambda x, mask, kernel, point, w: x[:, -1] @ w,
    "halves of features": lambda x, mask, kernel, point, w: torch.cat((-x[..., 3:], x[..., :3]), -1),
    "heads": lambda x, mask, kernel, point, w: x.view(1, LENGTH, 2, 3).transpose(1, 2).reshape(1, 2, LENGTH, 3),
}


@pytest.mark.parametrize("name", APART)
def test_what_mixes_nothing_is_not_named(name: str) -> None:
    assert not found(APART[name])
