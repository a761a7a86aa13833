"""The last linear and the cross-entropy behind it become one operator that never holds the logits.

The loss may be spelt by hand: −log_softmax(z), or log Σ exp z − z, at each label. What is not taken for it: the logarithm
of a softmax, which is −∞ where that has underflowed, and ``take_along_dim``, which does not check labels (torch 2.13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels.deferred_logits import deferred_logits, dropped_logits
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..rewrite.errors import DroppedOutputError
from ..rewrite.graph import dtype_of, sizes
from ..rewrite.match import Match
from ..rewrite.pattern import columns, picked, rows
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call
from ..rewrite.vocabulary import operation
from .storage import product_dtype

Logits = Literal["defer", "keep", "drop"]
NONE_IGNORED = -(2**62)
"""``gather`` ignores no label: one that is out of range is an error there, and here."""


@dataclass(frozen=True)
class FuseLinearCrossEntropy(RewriteRule):
    """cross_entropy(x Wᵀ + b, t)  →  linear_cross_entropy(x, W, b, t), and of x W likewise

    ``logits`` says what becomes of logits that the model returns beside the loss: computed when they are read
    (``"defer"``), kept, which leaves the loss as it was (``"keep"``), or replaced by an explanation (``"drop"``).
    """

    logits: Logits = "defer"

    name = "linear_cross_entropy"
    variants = {
        "by": ("rows", "columns"),
        "tempered": ("", "times", "over"),
        "scaled": (False, True),
        "capped": (False, True),
        "behind": (False, True),
        "loss": ("cross_entropy", "nll", "picked", "lost"),
    }

    def pattern(
        self, x: Any, w: Any, b: Any, t: Any, temperature: Any, scale: Any, cap: Any, steps: Any,
        class_weight: Any, ignore_index: Any, reduction: Any, smoothing: Any, how: Any,
        *, by: str, tempered: str, scaled: bool, capped: bool, behind: bool, loss: str,
    ) -> Any:  # fmt: skip
        """Logits, and rows of them, however chosen; either are scaled and capped, or not."""
        if behind and not (tempered or scaled or capped):
            return None

        def adjusted(z: Any) -> Any:
            z = z / temperature if tempered == "over" else z * temperature if tempered else z
            z = z * scale if scaled else z
            return torch.tanh(z) * cap if capped else z

        z = F.linear(x, w, b) if by == "rows" else columns(x, w, b)
        z = z if behind else adjusted(z)
        read = adjusted(rows(z, steps)) if behind else rows(z, steps)
        if loss in ("picked", "lost"):
            chosen = picked(F.log_softmax(read, -1), t, how, smoothing)
            return chosen if loss == "picked" else -chosen, z
        if loss == "nll":
            return F.nll_loss(F.log_softmax(read, -1), t, class_weight, None, ignore_index, None, reduction), z
        return F.cross_entropy(read, t, class_weight, None, ignore_index, None, reduction, smoothing), z

    def accepts(self, m: Match) -> bool:
        """A temperature is a value of the graph, such as a parameter; any other scale a constant."""
        return bool(m.tempered) == isinstance(m.temperature, fx.Node) and not isinstance(m.scale, fx.Node)

    def check(self, m: Match) -> Refusal | None:
        """Class indices as labels, constant options, and nobody who reads the logits but the caller."""
        labels = m.t.meta.get("val") if isinstance(m.t, fx.Node) else None
        if labels is None or labels.is_floating_point() or m.class_weight is not None:
            return self.refuse(m, "the labels are probabilities, or classes are weighted")
        constants = (m.cap, m.ignore_index, m.smoothing)
        reduced = m.loss in ("picked", "lost") or m.reduction in ("mean", "sum", "none")
        if any(isinstance(c, fx.Node) for c in constants) or not reduced:
            return self.refuse(m, "an option of the loss is computed by the graph, not a constant")
        if m.tempered and (set(sizes(m.temperature)) - {1} or len(sizes(m.temperature)) > len(sizes(m.x))):
            return self.refuse(m, "the logits are scaled by more than one number")
        if 0 in (m.scale, m.cap):
            return self.refuse(m, "the logits are multiplied by 0")
        if unknown := [step for step in m.steps if step[0] == "other"]:
            return self.refuse(m, f"the logits are indexed with {unknown[0][1]}")
        readers = _other_readers(m)
        if any(n.op != "output" for n in readers):
            return self.refuse(m, f"the logits are also read by {next(n.name for n in readers if n.op != 'output')}")
        if readers and self.logits == "keep":
            return self.refuse(m, 'the model returns the logits, and default_passes(logits="keep") keeps them')
        return None

    def rewrite(
        self, m: Match, x: Any, w: Any, b: Any, t: Any, temperature: Any, steps: Any, ignore_index: Any,
        reduction: Any, smoothing: Any, **_: Any,
    ) -> Any:  # fmt: skip
        """The fused loss, and logits that are computed when they are read, adjusted or not as the model's are."""
        w = w if m.by == "rows" else w.t()
        untouched = x, w, b
        if m.tempered:  # the temperature may be learned: autograd takes its gradient from that of x
            x, b = _tempered(x, m.x, temperature, m), None if b is None else _tempered(b, m.b, temperature, m)
        scale, cap = _scale_and_cap(m)
        read = _chosen(x, steps)
        labels = t if len(sizes(m.t)) == 1 else t.reshape(-1)
        by_hand = m.loss in ("picked", "lost")
        if by_hand:
            ignore_index, reduction = NONE_IGNORED, "none"
        if m.how == "counted":
            labels = labels + (labels < 0) * _classes(m)
        loss = call(
            linear_cross_entropy, read.reshape(-1, sizes(m.x)[-1]), w, b, labels, ignore_index=ignore_index,
            label_smoothing=float(smoothing or 0.0), softcap=cap, logit_scale=scale, reduction=reduction,
        )  # fmt: skip
        if by_hand:
            loss = (-loss if m.loss == "picked" else loss).view_as(t)
            loss = loss.squeeze(-1) if m.how == "squeezed" else loss
        elif reduction == "none" and len(sizes(m.t)) != 1:
            loss = loss.view_as(t)
        if dtype_of(m.root) != (torch.float64 if product_dtype(m.x) == torch.float64 else torch.float32):
            loss = loss.to(dtype_of(m.root))
        kind = dtype_of(m.outputs[1])
        if self.logits == "drop":
            return loss, call(_dropped, x, w, kind)
        if m.behind:
            logits = call(deferred_logits, *untouched)
        else:
            logits = call(deferred_logits, x, w, b, logit_scale=scale, softcap=cap)
        return loss, logits if kind == product_dtype(m.x) else logits.to(kind)


def _scale_and_cap(m: Match) -> tuple[float, float]:
    """s and c of c · tanh(s z / c), c = 0 without it: what is in front of tanh need not be 1/c, and is a scale then."""
    scale = 1.0 if m.scale is None else float(m.scale)
    if not m.capped:
        return scale, 0.0
    cap = float(m.cap)
    return 1.0 if math.isclose(scale * cap, 1.0, rel_tol=1e-7) else scale * cap, cap


def _tempered(x: Any, of: fx.Node, temperature: Any, m: Match) -> Any:
    """``x``, a proxy of ``of``, times or over the temperature, in the dtype of ``of``."""
    found, kind = x / temperature if m.tempered == "over" else x * temperature, dtype_of(of)
    return found if dtype_of(m.temperature) == kind else found.to(kind)


def _dropped(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """In a graph: what stands for logits that the user does not want."""
    return dropped_logits(x, w, DroppedOutputError).to(dtype)


_dropped.is_never_read = True  # type: ignore[attr-defined]


def _chosen(x: Any, steps: tuple[Any, ...]) -> Any:
    """Of ``x``, a proxy, what ``steps`` choose."""
    for name, *arguments in steps:
        x = x[arguments[0]] if name == "getitem" else getattr(x, name)(*arguments)
    return x


def _other_readers(m: Match) -> list[fx.Node]:
    """Whoever reads the logits on any step of their way to the loss, the casts for the caller looked through."""
    inside = set(m.nodes) | set(m.outputs)
    pending = [u for n in m.nodes if n is not m.root and _is_logits(n, m) for u in n.users if u not in inside]
    readers = []
    while pending:
        user = pending.pop()
        if user.op in ("call_function", "call_method") and operation(user) == "cast":
            pending.extend(user.users)
        else:
            readers.append(user)
    return readers


def _classes(m: Match) -> Any:
    return sizes(m.w)[0 if m.by == "rows" else 1]


def _is_logits(node: fx.Node, m: Match) -> bool:
    """Whether ``node`` holds a value for every class."""
    classes = _classes(m)  # a symbolic size is none of classes, and to compare it would be a guard
    held = isinstance(classes, int) and classes in [s for s in sizes(node) if isinstance(s, int)]
    return held and bool((dtype_of(node) or torch.int).is_floating_point) and node not in m.inputs()
