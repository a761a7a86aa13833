"""Losses that pick log probabilities at labels by hand become one operator with the last linear; near misses do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.passes.linear_cross_entropy import FuseLinearCrossEntropy

from ..graphs import apply, check, here, normal, targets, trace

RULES = [FuseLinearCrossEntropy()]
HIDDEN, CLASSES = 6, 10


def mean_of(picked: Any, mask: Any) -> Any:
    """What a loop of one's own makes of log probabilities."""
    return -(picked.squeeze(-1) * mask).sum() / mask.sum()


def averaged(loss: Any, t: Any) -> Any:
    """What it makes of losses: the mean over the labels that count."""
    mask = t > 2
    return (mask * loss).sum() / mask.sum()


def at_labels(z: Any, t: Any) -> Any:
    """z at the labels, in their shape."""
    return z.gather(-1, t.unsqueeze(-1)).squeeze(-1)


DIFFERENCES = {
    "logsumexp": lambda z, t: averaged(torch.logsumexp(z, -1) - at_labels(z, t), t),
    "method": lambda z, t: averaged(z.logsumexp(dim=2) - torch.gather(z, 2, t[..., None])[..., 0], t),
    "largest taken off": lambda z, t: averaged(
        (m := z.amax(-1, keepdim=True)).squeeze(-1) + (z - m).exp().sum(-1).log() - at_labels(z, t), t
    ),
    "largest taken off, detached": lambda z, t: averaged(
        -at_labels((y := z - z.max(-1, keepdim=True)[0].detach()) - y.exp().sum(-1, keepdim=True).log(), t), t
    ),
    "in float32": lambda z, t: averaged(z.float().logsumexp(-1) - at_labels(z.float(), t), t),
    "partly in float32": lambda z, t: averaged(z.float().logsumexp(-1) - at_labels(z, t), t),
    "kept": lambda z, t: (z.logsumexp(-1, keepdim=True) - z.gather(-1, t[..., None])).mean(),
    "selected": lambda z, t: (z.logsumexp((2,)) - z.gather(-1, t[..., None]).select(-1, 0)).sum(),
    "turned": lambda z, t: -averaged(at_labels(z, t) - z.logsumexp(-1), t),
    "negative added": lambda z, t: averaged(-at_labels(z, t) + z.logsumexp(-1), t),
    "rows": lambda z, t: averaged(
        (flat := z.view(-1, CLASSES)).logsumexp(1) - flat.gather(1, t.view(-1, 1)).view(-1), t.view(-1)
    ),
    "shifted": lambda z, t: averaged((y := z[:, :-1]).logsumexp(-1) - at_labels(y, t[:, 1:]), t[:, 1:]),
    "capped": lambda z, t: averaged((y := 2.0 * torch.tanh(z / 2.0)).logsumexp(-1) - at_labels(y, t), t),
    "beside the logits": lambda z, t: (averaged(torch.logsumexp(z, -1) - at_labels(z, t), t), z),
    "log probabilities": lambda z, t: -at_labels(z - z.logsumexp(-1, keepdim=True), t).sum(),
    "log probabilities, dimension added": lambda z, t: -at_labels(z - z.logsumexp(-1)[..., None], t).sum(),
    "log probabilities, library's loss": lambda z, t: F.nll_loss(
        (z - z.logsumexp(-1).unsqueeze(-1)).view(-1, CLASSES), t.view(-1)
    ),
    "smoothed": lambda z, t: averaged(0.9 * -at_labels(p := z.log_softmax(-1), t) + 0.1 * -p.mean(dim=-1), t),
    "smoothed, kept": lambda z, t: (
        -(0.9 * (p := F.log_softmax(z, -1)).gather(-1, t[..., None]) + 0.1 * p.mean(-1, keepdim=True)).mean()
    ),
    "smoothed by a sum": lambda z, t: averaged(
        -at_labels(p := F.log_softmax(z.float(), -1), t) * (1 - 0.2) - p.sum(-1) * (0.2 / CLASSES), t
    ),
    "smoothed rows": lambda z, t: (
        (p := z.view(-1, CLASSES).log_softmax(1)).mean(1) * -0.1 - 0.9 * p.gather(1, t.view(-1, 1)).squeeze(1)
    ).mean(),
    "smoothed difference": lambda z, t: averaged(
        0.9 * (z.logsumexp(-1) - at_labels(z, t)) + 0.1 * -z.log_softmax(-1).mean(-1), t
    ),
    "one-hot": lambda z, t: averaged(-(F.one_hot(t, CLASSES) * z.log_softmax(-1)).sum(-1), t),
    "one-hot numbers": lambda z, t: averaged(-(z.log_softmax(2) * F.one_hot(t, CLASSES).type_as(z)).sum(dim=2), t),
    "one-hot rows": lambda z, t: (
        -(F.log_softmax(z.view(-1, CLASSES), -1) * F.one_hot(t.view(-1), CLASSES).float()).sum(1).mean()
    ),
    "one-hot by einsum": lambda z, t: averaged(
        -torch.einsum("btv,btv->bt", F.one_hot(t, CLASSES).type_as(z), z.log_softmax(-1)), t
    ),
    "one-hot mask": lambda z, t: averaged(
        -torch.where(F.one_hot(t, CLASSES).bool(), z.log_softmax(-1), 0.0).sum(-1), t
    ),
    "one-hot mask, filled": lambda z, t: averaged(
        -z.log_softmax(-1).masked_fill(F.one_hot(t, CLASSES).to(torch.bool).logical_not(), 0).sum(-1), t
    ),
    "one-hot difference": lambda z, t: averaged(z.logsumexp(-1) - (F.one_hot(t, CLASSES) * z).sum(-1), t),
}
"""−log_softmax(z) at the labels without gather from it."""


def labelled(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows, the weight of the classes, and a label for each row."""
    x, w = normal(0, 2, 3, HIDDEN, dtype=dtype, grad=True), normal(1, CLASSES, HIDDEN, dtype=dtype, grad=True)
    return {"x": x, "w": w, "t": torch.tensor([[3, 1, 0], [1, 5, 9]])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_log_probabilities_as_differences_and_sums(name: str, dtype: torch.dtype) -> None:
    inputs = labelled(dtype)
    module, _ = check(
        lambda x, w, t: DIFFERENCES[name](F.linear(x, w), t), inputs, RULES, count=1, terms=8 * CLASSES, verify=True
    )
    assert not {"gather", "logsumexp", "one_hot", "linear"} & set(targets(module)), module.graph


PICKED = {
    "method": lambda x, w, t: mean_of(F.linear(x, w).log_softmax(-1).gather(-1, t[..., None]), t > 2),
    "function": lambda x, w, t: -torch.gather(F.log_softmax(F.linear(x, w), dim=2), 2, t.unsqueeze(2)).mean(),
    "shifted": lambda x, w, t: mean_of(
        F.log_softmax(F.linear(x, w)[:, :-1], dim=-1, dtype=torch.float32).gather(-1, t[:, 1:].unsqueeze(-1)),
        t[:, 1:] > 2,
    ),
    "rows": lambda x, w, t: -F.linear(x, w).view(-1, CLASSES).log_softmax(-1).gather(1, t.view(-1, 1)).sum(),
    "capped": lambda x, w, t: (
        -(torch.tanh(F.linear(x, w) / 2.0) * 2.0).float().log_softmax(-1).gather(-1, t[..., None])
    ),
    "beside the logits": lambda x, w, t: (-(z := F.linear(x, w)).log_softmax(-1).gather(-1, t[..., None]).sum(), z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PICKED)
def test_log_probabilities_picked_by_hand(name: str, dtype: torch.dtype) -> None:
    inputs = labelled(dtype)
    module, _ = check(PICKED[name], inputs, RULES, count=1, terms=8 * CLASSES)
    assert "gather" not in targets(module)


PICKED_NEAR = {
    "of another dimension": lambda z, t: z.log_softmax(-1).gather(1, t[:, :1, None].expand(-1, -1, CLASSES)),
    "several a row": lambda z, t: z.log_softmax(-1).gather(-1, t[:, :, None].expand(-1, -1, 2)),
    "of a part": lambda z, t: z.log_softmax(-1).gather(-1, t[:, :2, None]),
    "of probabilities": lambda z, t: z.softmax(-1).gather(-1, t[..., None]),
    "of a logarithm": lambda z, t: z.softmax(-1).log().gather(-1, t[..., None]),
    "of two logits": lambda z, t: (2 * z).logsumexp(-1) - at_labels(z, t),
    "less than one": lambda z, t: z[..., :5].logsumexp(-1) - at_labels(z, t),
    "twice": lambda z, t: torch.sub(z.logsumexp(-1), at_labels(z, t), alpha=2),
    "sum over tokens": lambda z, t: z.logsumexp(1)[:, :3] - at_labels(z, t),
    "broadcast": lambda z, t: z[0].logsumexp(-1, keepdim=True) - at_labels(z[0], t[0]),
    "log probabilities, broadcast": lambda z, t: at_labels((y := z[0, :, :3]) - y.logsumexp(-1), t[0]),
    "smoothed too much": lambda z, t: 0.9 * at_labels(p := z.log_softmax(-1), t) + 0.2 * p.mean(-1),
    "smoothed the other way": lambda z, t: 1.1 * at_labels(p := z.log_softmax(-1), t) - 0.1 * p.mean(-1),
    "smoothed with logits": lambda z, t: 0.9 * at_labels(z.log_softmax(-1), t) + 0.1 * z.mean(-1),
    "smoothed with the mean of all": lambda z, t: 0.9 * at_labels(p := z.log_softmax(-1), t) + 0.1 * p.mean(),
    "smoothed with the next": lambda z, t: 0.9 * at_labels(p := z.log_softmax(-1), t) + 0.1 * p.mean(-1).roll(1, 1),
    "one-hot, smoothed": lambda z, t: ((F.one_hot(t, CLASSES) * 0.9 + 0.01) * z.log_softmax(-1)).sum(-1),
    "one-hot, summed over tokens": lambda z, t: (F.one_hot(t, CLASSES) * z.log_softmax(-1)).sum(1),
    "one-hot of fewer": lambda z, t: (F.one_hot(t, 3)[..., :1] * z.log_softmax(-1)).sum(-1),
    "with an entropy": lambda z, t: (p := z.log_softmax(-1)).gather(-1, t[..., None]).sum() - (p.exp() * p).sum(),
}


@pytest.mark.parametrize("name", PICKED_NEAR)
def test_what_is_picked_otherwise_is_left_alone(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, HIDDEN, grad=True), "w": normal(1, CLASSES, HIDDEN, grad=True)}
    inputs["t"] = torch.tensor([[3, 1, 0], [1, 5, 9]]) % 3
    check(lambda x, w, t: PICKED_NEAR[name](F.linear(x, w), t), inputs, RULES, count=0, terms=8 * CLASSES)


def test_a_label_out_of_range_is_an_error_as_before() -> None:
    inputs = {"x": normal(0, 2, 3, HIDDEN), "w": normal(1, CLASSES, HIDDEN), "t": torch.zeros(2, 3, dtype=torch.long)}
    module = trace(PICKED["method"], inputs)
    apply(module, RULES)
    for label in (-100, CLASSES):
        with pytest.raises((IndexError, RuntimeError)):
            module(**inputs | {"t": torch.full((2, 3), label)})


COUNTED = {
    "log_softmax": lambda z, t: -z.view(-1, CLASSES).log_softmax(-1)[here(z, torch.arange, 6), t.view(-1)].mean(),
    "difference": lambda z, t: (
        (y := z.view(-1, CLASSES)).logsumexp(-1) - y[here(z, torch.arange, 6), t.view(-1)]
    ).sum(),
    "three dimensions": lambda z, t: (
        -z.log_softmax(-1)[here(z, torch.arange, 2)[:, None], here(z, torch.arange, 3), t].mean()
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_labels_below_zero_count_from_the_end_where_they_did(name: str) -> None:
    def loss(x: Any, w: Any, t: Any) -> Any:
        return COUNTED[name](F.linear(x, w), t)

    inputs = {"x": normal(0, 2, 3, HIDDEN, grad=True), "w": normal(1, CLASSES, HIDDEN, grad=True)}
    module, _ = check(loss, inputs | {"t": torch.tensor([[3, -1, 0], [-10, 5, 9]])}, RULES, count=1, verify=True)
    for label in (-CLASSES - 1, CLASSES):
        with pytest.raises(IndexError):
            module(inputs["x"], inputs["w"], torch.full((2, 3), label))


def test_labels_that_nobody_checks_are_left_alone() -> None:
    def loss(x: Any, w: Any, t: Any) -> Any:
        return torch.take_along_dim(F.linear(x, w).log_softmax(-1), t[..., None], -1)

    inputs = {"x": normal(0, 2, 3, HIDDEN, grad=True), "w": normal(1, CLASSES, HIDDEN)}
    check(loss, inputs | {"t": torch.tensor([[3, -1, 0], [-10, 5, 9]])}, RULES, count=0, terms=8 * CLASSES)


class Masked(nn.Module):
    """A head and a loss of somebody's own, over the tokens that count."""

    def __init__(self, of_logits: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(CLASSES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.of_logits = of_logits

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        counts = labels != -100
        loss = self.of_logits(self.head(self.embed(ids)), labels.clamp(min=0))
        return (counts * loss).sum() / counts.sum()


OWN = {
    "logsumexp": lambda z, t: torch.logsumexp(z, -1) - at_labels(z, t),
    "log_softmax": lambda z, t: -at_labels(z.log_softmax(-1), t),
    "log_softmax, kept": lambda z, t: -F.log_softmax(z, -1).gather(2, t[..., None])[..., 0],
    "one-hot": lambda z, t: -(F.one_hot(t, CLASSES) * z.log_softmax(-1)).sum(-1),
    "rows": lambda z, t: -z.flatten(0, 1).log_softmax(-1)[torch.arange(t.numel()), t.flatten()].view_as(t),
    "places": lambda z, t: -z.log_softmax(-1)[torch.arange(len(t))[:, None], torch.arange(t.shape[1])[None], t],
}


@pytest.mark.parametrize("name", OWN)
def test_a_loss_of_ones_own_in_a_model_of_any_length(name: str) -> None:
    torch.manual_seed(0)
    model: Any = Masked(OWN[name])
    plain = copy.deepcopy(model)
    ids, labels = torch.arange(14).view(2, 7) % CLASSES, torch.arange(14).view(2, 7) % CLASSES
    labels[labels < 4] = -100
    weft.optimize(model, example_inputs={"ids": ids, "labels": labels})
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("linear_cross_entropy") == 1, str(model.rewrite_report)
    for length in (7, 4):
        for each in (model, plain):
            each.zero_grad()
            each(ids[:, :length], labels[:, :length]).backward()
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad)
