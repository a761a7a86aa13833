"""The last linear and the loss behind it, however they are spelt, are one operator where nobody else reads the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.kernels.deferred_logits import DeferredLogits, OverwrittenLogitsError
from weft.passes.linear_cross_entropy import FuseLinearCrossEntropy
from weft.rewrite.errors import DroppedOutputError

from ..graphs import apply, cases, check, computed, copied, normal, targets, trace

RULES = [FuseLinearCrossEntropy()]
HIDDEN, CLASSES = 6, 10

LINEARS = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "bias": lambda x, w, b: F.linear(x, w, b),
    "@": lambda x, w, b: x @ w.t(),
    "@ and bias": lambda x, w, b: torch.matmul(x, w.T) + b,
    "by columns": lambda x, w, b: x @ w.view(HIDDEN, CLASSES),
    "by columns, bias": lambda x, w, b: x.matmul(w.reshape(HIDDEN, CLASSES)) + b,
}
SCALED = {
    "not": lambda z, s: z,
    "times": lambda z, s: z * 0.5,
    "over": lambda z, s: z / 3.0,
    "times a tensor": lambda z, s: z * s,
    "over a tensor": lambda z, s: z / s,
    "times an exponential": lambda z, s: s.exp() * z,
    "over a tensor and a number": lambda z, s: z / s * 0.5,
    "over a tensor of one dimension": lambda z, s: z / s.view(1).clamp(min=0.1),
}
CAPPED = {
    "not": lambda z: z,
    "at 2": lambda z: torch.tanh(z / 2.0) * 2.0,
    "at 3": lambda z: 3.0 * (z / 3.0).tanh(),
    "by a factor": lambda z: 3.0 * torch.tanh(z * (1 / 3.0)),
    "and scaled": lambda z: torch.tanh(z / 2.0) * 3.0,
}
SHIFTED = {
    "flat": lambda z, t: (z.view(-1, CLASSES), t.view(-1)),
    "reshaped": lambda z, t: (z.reshape(-1, CLASSES), t.reshape(-1)),
    "flattened": lambda z, t: (z.flatten(0, 1), t.flatten()),
    "logits sliced": lambda z, t: (z[..., :-1, :].contiguous().view(-1, CLASSES), t[..., 1:].contiguous().view(-1)),
    "first dimensions sliced": lambda z, t: (z[:, :-1].reshape(-1, CLASSES), t[:, 1:].reshape(-1)),
    "labels padded": lambda z, t: (z.view(-1, CLASSES), F.pad(t, (0, 1), value=-100)[..., 1:].reshape(-1)),
}
LOSSES = {
    "mean": lambda z, t: F.cross_entropy(z, t),
    "ignore_index": lambda z, t: F.cross_entropy(z, t, ignore_index=-100, reduction="mean"),
    "another ignored": lambda z, t: F.cross_entropy(z, t.clamp(min=0), ignore_index=0),
    "sum": lambda z, t: F.cross_entropy(z, t, reduction="sum"),
    "sum over a number": lambda z, t: F.cross_entropy(z, t, reduction="sum") / 7,
    "none": lambda z, t: F.cross_entropy(z, t, reduction="none"),
    "smoothed": lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
    "nll": lambda z, t: F.nll_loss(F.log_softmax(z, dim=-1), t),
    "nll, method": lambda z, t: F.nll_loss(z.log_softmax(-1), t, ignore_index=-100, reduction="sum"),
}
LABELS = {
    "all": [3, 1, 4, 1, 5, 9],
    "some ignored": [3, -100, 4, 1, -100, 9],
    "all ignored": [-100] * 6,
}

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "linear": st.sampled_from(sorted(LINEARS)),
        "scaled": st.sampled_from(sorted(SCALED)),
        "capped": st.sampled_from(sorted(CAPPED)),
        "behind": st.booleans(),
        "shifted": st.sampled_from(sorted(SHIFTED)),
        "loss": st.sampled_from(sorted(LOSSES)),
        "labels": st.sampled_from(sorted(LABELS)),
        "widen": st.sampled_from(("not", "logits", "last")),
        "returned": st.sampled_from(("loss", "logits", "wide logits")),
        "rows": st.sampled_from((2, 2, 0)),
        "grads": st.tuples(*[st.booleans()] * 4),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""

    def loss(x: Any, w: Any, b: Any, t: Any, scale: Any) -> Any:
        z = LINEARS[s["linear"]](x, w, b)
        z = z.float() if s["widen"] == "logits" else z
        z = z if s["behind"] else CAPPED[s["capped"]](SCALED[s["scaled"]](z, scale))
        read, labels = SHIFTED[s["shifted"]](z, t)
        read = CAPPED[s["capped"]](SCALED[s["scaled"]](read, scale)) if s["behind"] else read
        found = LOSSES[s["loss"]](read.float() if s["widen"] == "last" else read, labels)
        return {"loss": found, "logits": (found, z), "wide logits": (found, z.float())}[s["returned"]]

    return loss


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """Hidden states of two rows of three tokens (or of none), the head and the labels."""
    gx, gw, gb, gs = s["grads"]
    labels = torch.tensor(LABELS[s["labels"]]).view(2, 3)[: s["rows"]]
    return {
        "x": normal(0, s["rows"], 3, HIDDEN, dtype=s["dtype"], grad=gx),
        "w": normal(1, CLASSES, HIDDEN, dtype=s["dtype"], grad=gw),
        "b": normal(2, CLASSES, dtype=s["dtype"], grad=gb),
        "t": labels,
        "scale": torch.tensor(1.25, dtype=s["dtype"], requires_grad=gs),
    }


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, count=1, terms=8 * CLASSES)
    names = targets(module)
    assert names.count("linear_cross_entropy") == 1 and "cross_entropy" not in names and "nll_loss" not in names


READERS = {
    "argmax": lambda z: z.argmax(-1),
    "the last position": lambda z: z[:, -1, :],
    "a penalty": lambda z: z.float().logsumexp(-1).square().mean(),
    "detached": lambda z: z.detach(),
}


@pytest.mark.parametrize("name", READERS)
def test_logits_that_somebody_reads_are_kept(name: str) -> None:
    def loss(x: Any, w: Any, t: Any) -> Any:
        z = F.linear(x, w)
        return F.cross_entropy(z.view(-1, CLASSES), t.view(-1)), READERS[name](z)

    inputs = {"x": normal(0, 2, 3, HIDDEN, grad=True), "w": normal(1, CLASSES, HIDDEN), "t": torch.arange(6).view(2, 3)}
    module, outcome = check(loss, inputs, RULES, count=0, terms=8 * CLASSES)
    assert "linear_cross_entropy" not in targets(module)
    assert "logits are also read by" in outcome.refusals[0].reason


NEAR = {
    "classes cut off": lambda x, w, t, k: F.cross_entropy(F.linear(x[0], w)[:, :-1], t[0] % 8),
    "classes chosen": lambda x, w, t, k: F.cross_entropy(F.linear(x, w)[..., :5].reshape(-1, 5), t.view(-1) % 5),
    "weighted classes": lambda x, w, t, k: F.cross_entropy(F.linear(x, w).view(-1, CLASSES), t.view(-1), weight=k),
    "probabilities": lambda x, w, t, k: F.cross_entropy(F.linear(x, w)[0], torch.softmax(x @ w.t(), -1)[0].detach()),
    "scaled by a tensor": lambda x, w, t, k: F.cross_entropy((F.linear(x, w) * k).view(-1, CLASSES), t.view(-1)),
    "scaled row by row": lambda x, w, t, k: F.cross_entropy((F.linear(x[0], w) * k[:3, None]), t[0]),
    "scaled into more dimensions": lambda x, w, t, k: F.cross_entropy(
        (F.linear(x[0], w) * k[:1].view(1, 1, 1, 1)).view(-1, CLASSES), t[0]
    ),
    "scaled by the logits": lambda x, w, t, k: F.cross_entropy(((z := F.linear(x[0], w)) * z.mean()), t[0]),
    "capped by a tensor": lambda x, w, t, k: F.cross_entropy(torch.tanh(F.linear(x[0], w) / k[0]) * k[0], t[0]),
    "rows and classes mixed": lambda x, w, t, k: F.cross_entropy(
        F.linear(x, w).view(-1, 5), t.repeat(2, 1).view(-1) % 5
    ),
    "masked": lambda x, w, t, k: F.cross_entropy(
        F.linear(x, w).masked_fill(k > 1.5, -9.0).view(-1, CLASSES), t.view(-1)
    ),
    "log-softmax over rows": lambda x, w, t, k: F.nll_loss(
        F.log_softmax(F.linear(x, w).view(-1, CLASSES), 0), t.view(-1)
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, HIDDEN, grad=True), "w": normal(1, CLASSES, HIDDEN, grad=True)}
    inputs |= {"t": torch.arange(6).view(2, 3), "k": normal(2, CLASSES).abs() + 1}
    check(NEAR[name], inputs, RULES, count=0, terms=8 * CLASSES)


MATRICES = {
    "classes in the middle": lambda x, w, t: F.cross_entropy(F.linear(x, w).transpose(1, 2), t),
    "of a part, summed": lambda x, w, t: F.cross_entropy(F.linear(x, w)[:, :-1].mT, t[:, 1:], reduction="sum"),
    "capped unevenly": lambda x, w, t: F.cross_entropy(
        (torch.tanh(F.linear(x, w) / 2.0) * 3.0).view(-1, CLASSES), t.view(-1)
    ),
    "log-softmax before the rows": lambda x, w, t: F.nll_loss(
        F.linear(x, w).log_softmax(-1, dtype=torch.float32).reshape(-1, CLASSES), t.view(-1), reduction="sum"
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_spellings_that_reorder_or_rescale(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, HIDDEN, grad=True), "w": normal(1, CLASSES, HIDDEN, grad=True)}
    inputs["t"] = torch.tensor([[3, 1, -100], [1, 5, 9]])
    check(MATRICES[name], inputs, RULES, count=1, terms=8 * CLASSES, verify=True)


def shifted(x: Any, w: Any, t: Any) -> Any:
    """Loss and logits as transformers computes them."""
    z = F.linear(x, w)
    labels = F.pad(t, (0, 1), value=-100)[..., 1:].reshape(-1)
    return F.cross_entropy(z.float().view(-1, CLASSES), labels, ignore_index=-100, reduction="mean"), z


INPUTS = {
    "x": normal(0, 2, 3, HIDDEN, grad=True),
    "w": normal(1, CLASSES, HIDDEN, grad=True),
    "t": torch.arange(6).view(2, 3),
}


def test_kept_logits_keep_the_loss_as_it_was() -> None:
    module, outcome = check(shifted, INPUTS, [FuseLinearCrossEntropy("keep")], count=0)
    assert "keep" in outcome.refusals[0].reason and "linear_cross_entropy" not in targets(module)
    module, _ = check(lambda x, w, t: shifted(x, w, t)[0], INPUTS, [FuseLinearCrossEntropy("keep")], count=1)


def test_dropped_logits_explain_themselves() -> None:
    module = trace(shifted, INPUTS)
    original = copied(module)
    assert len(apply(module, [FuseLinearCrossEntropy("drop")], verify=True).rewrites) == 1
    loss, logits = module(*INPUTS.values())
    torch.testing.assert_close(loss, original(*INPUTS.values())[0])
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 3, CLASSES) and logits.dtype == torch.float32
    for read in (lambda: logits + 1, lambda: logits.argmax(-1), lambda: logits[0], lambda: float(logits.sum())):
        with pytest.raises(DroppedOutputError, match="defer"):
            read()


def test_deferred_logits_are_computed_when_read() -> None:
    module = trace(shifted, INPUTS)
    original = copied(module)
    assert len(apply(module, RULES, verify=True).rewrites) == 1
    logits, wanted = module(*INPUTS.values())[1], original(*INPUTS.values())[1]
    assert isinstance(logits, DeferredLogits) and logits.values is None
    assert (logits.shape, logits.dtype, logits.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert logits.values is None
    torch.testing.assert_close(logits.argmax(-1), wanted.argmax(-1))
    torch.testing.assert_close(logits.float()[..., 0], wanted[..., 0])
    gradients = [torch.autograd.grad(z.square().sum(), [INPUTS["x"], INPUTS["w"]]) for z in (logits, wanted)]
    for found, peer in zip(*gradients, strict=True):
        torch.testing.assert_close(found, peer)


@pytest.mark.parametrize("name", ["x", "w"])
def test_deferred_logits_know_when_it_is_too_late(name: str) -> None:
    """After a step they would be those of other weights."""
    inputs = {n: v.detach().clone() for n, v in INPUTS.items()}
    module = trace(shifted, inputs)
    apply(module, RULES)
    (_, early, *_), (_, late, *_) = module(*inputs.values()), module(*inputs.values())
    kept = (early + 0).clone()
    inputs[name].add_(1.0)
    torch.testing.assert_close(early + 0, kept)
    with pytest.raises(OverwrittenLogitsError, match=r"optimizer's step.*logits="):
        late.sum()


def test_verified_in_half_precision_and_on_both_outputs() -> None:
    inputs = {n: v.detach().bfloat16().requires_grad_() if v.is_floating_point() else v for n, v in INPUTS.items()}
    module, outcome = check(shifted, inputs, RULES, count=1, terms=8 * CLASSES, verify=True)
    assert outcome.rewrites[0].error is not None and computed(module, inputs)["gradient of w"] is not None
