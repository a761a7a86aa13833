"""Logits that are laid out, ordered or chosen otherwise before the loss reads them: exact, or left alone for the true reason."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.passes.linear_cross_entropy import FuseLinearCrossEntropy

from ..graphs import apply, check, normal, record, targets, trace

RULES = [FuseLinearCrossEntropy()]
HIDDEN, CLASSES = 6, 10


def head(dtype: torch.dtype = torch.float32, length: int = 3) -> dict[str, Tensor]:
    """Rows of hidden states, the weight of the classes, and labels, of which one is ignored."""
    x, w = normal(0, 2, length, HIDDEN, dtype=dtype, grad=True), normal(1, CLASSES, HIDDEN, dtype=dtype, grad=True)
    t = torch.arange(2 * length).view(2, length) % CLASSES
    t[0, 2] = -100
    return {"x": x, "w": w, "t": t}


def after_last(z: Any, t: Any) -> Any:
    """The loss of a model whose first dimension is time, as it runs over batches."""
    return F.cross_entropy(z.transpose(0, 1)[:-1].permute(1, 2, 0), t[:, 1:])


LAYOUTS = {
    "transposed": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "transposed, then a part": lambda z, t: F.cross_entropy(z.transpose(1, 2)[..., :-1], t[:, 1:]),
    "one loss a label": lambda z, t: F.cross_entropy(z.transpose(1, 2), t, reduction="none"),
    "one loss a label, masked": lambda z, t: (
        (F.cross_entropy(z.mT, t, reduction="none") * (t != -100)).sum() / (t != -100).sum()
    ),
    "moved": lambda z, t: F.cross_entropy(z.movedim(-1, 1), t),
    "moved, another name": lambda z, t: F.cross_entropy(torch.moveaxis(z, (2,), (1,)), t, label_smoothing=0.1),
    "permuted": lambda z, t: F.cross_entropy(z.permute(0, -1, 1), t, reduction="sum"),
    "twice permuted": lambda z, t: F.cross_entropy(z.permute(2, 0, 1).transpose(0, 1), t),
    "nll, transposed": lambda z, t: F.nll_loss(z.log_softmax(-1).transpose(1, 2), t),
    "nll, one loss a label": lambda z, t: F.nll_loss(F.log_softmax(z, 2).movedim(2, 1), t, reduction="none"),
    "nll, permuted first": lambda z, t: F.nll_loss(z.permute(0, 2, 1).log_softmax(1), t),
    "nll, in float32": lambda z, t: F.nll_loss(F.log_softmax(z.swapaxes(1, 2).float(), dim=1), t, reduction="sum"),
    "nll, four dimensions": lambda z, t: F.nll_loss(z[None].log_softmax(-1).permute(0, 3, 1, 2).contiguous(), t[None]),
    "four dimensions": lambda z, t: F.cross_entropy(z[:, :, None].movedim(-1, 1), t[..., None]),
    "time first": lambda z, t: F.cross_entropy(z.transpose(0, 1).reshape(-1, CLASSES), t.t().reshape(-1)),
    "time first, nll": lambda z, t: F.nll_loss(
        z.log_softmax(-1).permute(1, 0, 2).flatten(0, 1), t.t().flatten(), reduction="none"
    ),
    "time first, a matrix a step": lambda z, t: F.cross_entropy(z.permute(1, 2, 0), t.t(), reduction="none"),
    "time first and back": after_last,
    "time first, picked": lambda z, t: (
        z.transpose(0, 1).log_softmax(-1).gather(-1, t.clamp(min=0).t().unsqueeze(-1)).mean()
    ),
}
CHOSEN = {
    "one row": lambda z, t: F.cross_entropy(z[0], t[0]),
    "the last tokens": lambda z, t: F.cross_entropy(z[:, -1], t[:, -1]),
    "the last tokens, selected": lambda z, t: F.cross_entropy(z.select(1, -1), t[:, -1]),
    "narrowed": lambda z, t: F.cross_entropy(z.narrow(1, 0, 2).flatten(0, 1), t[:, 1:].flatten()),
    "rows, then a part": lambda z, t: F.cross_entropy(z.view(-1, CLASSES)[:-1], t.view(-1)[1:]),
    "rows, then a part of float32": lambda z, t: F.cross_entropy(z.view(-1, CLASSES).float()[1:], t.view(-1)[1:]),
    "rows by number": lambda z, t: F.cross_entropy(z.view(-1, CLASSES)[t[0].clamp(min=0)], t[1]),
    "rows by number, a function": lambda z, t: F.cross_entropy(z[0].index_select(0, t[0].clamp(min=0)), t[1]),
    "log probabilities, then a part": lambda z, t: (
        -(z.log_softmax(-1)[:, :-1].gather(-1, t[:, 1:, None].clamp(min=0)).squeeze(-1).mean())
    ),
    "log probabilities, then the last": lambda z, t: F.nll_loss(F.log_softmax(z, -1)[:, -1], t[:, -1]),
    "log probabilities of rows, then a part": lambda z, t: F.nll_loss(
        F.log_softmax(z.view(-1, CLASSES), 1)[:-1], t.view(-1)[1:]
    ),
    "log probabilities, a part, then rows": lambda z, t: F.nll_loss(
        z.log_softmax(-1)[..., :-1, :].reshape(-1, CLASSES), t[:, 1:].reshape(-1)
    ),
    "log probabilities as rows, picked": lambda z, t: (
        -z.log_softmax(-1).flatten(0, 1).gather(1, t.clamp(min=0).view(-1, 1)).view_as(t).mean()
    ),
    "labels behind": lambda z, t: (z[:, :-1].log_softmax(-1).gather(2, t[:, 1:, None].clamp(min=0))).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS | CHOSEN)
def test_logits_are_read_in_every_order(name: str, dtype: torch.dtype) -> None:
    loss = (LAYOUTS | CHOSEN)[name]
    module, _ = check(lambda x, w, t: loss(F.linear(x, w), t), head(dtype), RULES, count=1, terms=8 * CLASSES)
    assert not {"cross_entropy", "nll_loss", "gather", "linear"} & set(targets(module)), module.graph


@pytest.mark.parametrize("name", LAYOUTS)
def test_beside_logits_that_are_returned(name: str) -> None:
    def both(x: Any, w: Any, t: Any) -> Any:
        z = F.linear(x, w)
        return LAYOUTS[name](z, t), z

    check(both, head(), RULES, count=1, terms=8 * CLASSES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sequence_as_long_as_there_are_classes(name: str) -> None:
    inputs = head(length=CLASSES)
    check(lambda x, w, t: LAYOUTS[name](F.linear(x, w), t), inputs, RULES, count=1, terms=8 * CLASSES)


@pytest.mark.parametrize("name", ["-1", "length - 1", "narrow"])
def test_parts_whose_ends_the_graph_computes(name: str) -> None:
    parts = {
        "-1": lambda z, t: z[:, :-1],
        "length - 1": lambda z, t: z[:, : t.size(1) - 1],
        "narrow": lambda z, t: z.narrow(1, 0, t.size(1) - 1),
    }

    def loss(x: Any, w: Any, t: Any) -> Any:
        return F.cross_entropy(parts[name](F.linear(x, w), x).reshape(-1, CLASSES), t[:, 1:].reshape(-1))

    check(loss, head(), RULES, count=1, terms=8 * CLASSES, verify=True, dynamic=True)


NEAR = {
    "tokens for classes": lambda z, t: F.cross_entropy(z, t % 3),
    "batches for classes": lambda z, t: F.cross_entropy(z.permute(1, 0, 2), t[:1].expand(10, 10) % 2),
    "reshaped, not moved": lambda z, t: F.cross_entropy(z.view(2, CLASSES, CLASSES), t),
    "transposed and flattened": lambda z, t: F.cross_entropy(z.transpose(1, 2).reshape(-1, CLASSES), t.flatten()),
    "nll, softmax over tokens": lambda z, t: F.nll_loss(z.transpose(1, 2).log_softmax(2), t),
    "nll, softmax over tokens first": lambda z, t: F.nll_loss(z.log_softmax(1).transpose(1, 2), t),
    "a class": lambda z, t: F.cross_entropy(z[..., 0], t[:, 0]),
    "classes by number": lambda z, t: F.cross_entropy(z[..., t[0]].flatten(0, 1), t.flatten()),
    "of a list": lambda z, t: F.cross_entropy(z[[0, 1]].flatten(0, 1), t.flatten()),
    "classes turned": lambda z, t: F.cross_entropy(z.flip(-1).transpose(1, 2), t),
}


@pytest.mark.parametrize("name", NEAR)
def test_other_orders_are_left_alone(name: str) -> None:
    inputs = head(length=CLASSES)
    inputs["t"] = inputs["t"].clamp(min=0)
    module, _ = check(lambda x, w, t: NEAR[name](F.linear(x, w), t), inputs, RULES, count=0, terms=8 * CLASSES)
    assert "linear" in targets(module)


def test_who_reads_logits_in_another_order_reads_them() -> None:
    def both(x: Any, w: Any, t: Any) -> Any:
        z = F.linear(x, w).transpose(1, 2)
        return F.cross_entropy(z, t), z.argmax(1)

    outcome = apply(trace(both, head()), RULES)
    assert not outcome.rewrites and "logits are also read by argmax" in outcome.refusals[0].reason


def filled(t: Any, where: Any, value: int) -> Any:
    """``t`` after ``t[where] = value``"""
    record(operator.setitem, t, where, value)
    return t


def shifted_in_place(t: Any) -> Any:
    """Labels one step earlier, written into a tensor of their own."""
    made = torch.full_like(t, -100)
    record(operator.setitem, made, (slice(None), slice(None, -1)), t[:, 1:])
    return made


LATE = {
    "shifted in place": lambda t, z: shifted_in_place(t),
    "filled where masked": lambda t, z: filled(t.clone(), t == 3, -100),
    "masked_fill_": lambda t, z: t.clone().masked_fill_(t == 3, -100),
    "filled twice": lambda t, z: filled(filled(t * 1, (0, 0), -100), (1, 1), 2),
}


@pytest.mark.parametrize("name", LATE)
def test_labels_that_are_made_after_the_head_ran(name: str) -> None:
    def loss(x: Any, w: Any, t: Any) -> Any:
        z = F.linear(x, w)
        return F.cross_entropy(z.flatten(0, 1), LATE[name](t, z).flatten())

    check(loss, head(), RULES, count=1, terms=8 * CLASSES, verify=True)


LATE_NEAR = {
    "the logits": lambda t, z, x: (filled(z, (0, 0), 0.0), t)[1],
    "what the head read": lambda t, z, x: (filled(x, (0, 0), 0.0), t)[1],
    "the labels, from logits": lambda t, z, x: z.argmax(-1),
}


@pytest.mark.parametrize("name", LATE_NEAR)
def test_what_is_written_to_what_the_head_read_stays(name: str) -> None:
    def loss(x: Any, w: Any, t: Any) -> Any:
        x = x * 1.0
        z = F.linear(x, w)
        return F.cross_entropy(z.flatten(0, 1), LATE_NEAR[name](t, z, x).flatten()), x

    given = {k: v.detach() for k, v in head().items()}
    check(loss, given, RULES, count=0, terms=8 * CLASSES)


def test_two_losses_of_the_same_logits_are_said_to_be_that() -> None:
    def losses(x: Any, w: Any, t: Any) -> Any:
        z = F.linear(x, w)
        first = F.cross_entropy(z[:, :-1].flatten(0, 1), t[:, 1:].flatten())
        return first + F.cross_entropy(z[:, :-2].flatten(0, 1), t[:, 2:].flatten())

    _, outcome = check(losses, head(length=5), RULES, count=0, terms=8 * CLASSES)
    assert all("the logits are also read by" in r.reason for r in outcome.refusals) and len(outcome.refusals) == 2
