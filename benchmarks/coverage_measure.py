"""One model type: built, adapted with LoRA, run as it is and through ``weft.optimize``, and compared."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.rewrite.errors import InternalError, WeftError
from weft.rewrite.examples import Scale, make_examples

from .coverage_models import tiny_model

FORWARD_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3
FLOOR = 1e-5
"""Gradients are measured against their own largest entry, or this share of the model's largest, where that is larger:
what should be zero (a key bias under softmax, say) is only rounding, and has no relative error."""
FRESH = Scale(batch=3, length=29, target_length=11, seed=7)
"""Other sizes and values than those that the graphs were captured with."""


@dataclass
class Row:
    """What is known of one type. ``outcome``: equal, wrong, refused, error (in weft), or excluded (fails by itself)."""

    kind: str
    type: str
    model: str
    outcome: str = "excluded"
    reason: str = ""
    logits: float | None = None
    loss: float | None = None
    gradient: float | None = None
    worst: str = ""
    rewrites: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    norms: tuple[int, int] = (0, 0)
    adapters: tuple[int, int] = (0, 0)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class Run:
    """One call: its logits and loss, and the gradients of all that is trained."""

    logits: Tensor | None
    loss: Tensor | None
    gradients: dict[str, Tensor]


class Excluded(Exception):
    """The type does not run, with or without weft."""


def measure(kind: str, name: str, class_name: str) -> Row:
    """The row of one type."""
    row = Row(kind, name, class_name)
    started = time.perf_counter()
    try:
        model, calls, plain = _plain(name, class_name)
        norms, adapters = _ground_truth(model, calls)
        _compare_optimized(row, model, calls, plain)
        _count(row, model, norms, adapters)
        _check_undo(row, model, calls, plain)
    except Excluded as error:
        row.reason = str(error)
    except WeftError as error:
        row.outcome, row.reason = "error" if isinstance(error, InternalError) else "refused", describe(error)
    except Exception as error:
        row.outcome, row.reason = "error", describe(error)
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def describe(error: BaseException) -> str:
    """Type and first line of the innermost cause, and the frames that it came from."""
    while True:
        inner = getattr(error, "inner_exception", None) or error.__cause__
        if inner is None or isinstance(error, Excluded):
            break
        error = inner
    lines = str(error).strip().splitlines() or [""]
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {lines[0][:300]} [{' '.join(frames[-3:])}]"


# the model as it is -------------------------------------------------------------------------------------------------
def _plain(name: str, class_name: str) -> tuple[nn.Module, list[dict[str, Any]], list[Run]]:
    torch.manual_seed(0)
    try:
        base = tiny_model(name, class_name)
        model = _adapted(base)
        calls = make_examples(base, "train", FRESH)
        plain = [_run(model, c) for c in calls]
        again = [_run(model, c) for c in calls]
    except (Excluded, WeftError):
        raise
    except Exception as error:
        raise Excluded(describe(error)) from error
    if not all(_finite(p) for p in plain):
        raise Excluded("NaN or infinity in the plain model's results")
    if any(_distance(a, b)[0] > 0 for a, b in zip(plain, again, strict=True)):
        raise Excluded("the plain model does not repeat its own result under one seed")
    return model, calls, plain


def _adapted(base: nn.Module) -> nn.Module:
    """LoRA with a random B on every linear but the head; norms are trained too."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    if not linears:
        raise Excluded("it has no linear layer to adapt")
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "lora_dropout": 0.0}
    try:
        model = get_peft_model(base, LoraConfig(target_modules=linears, **options))
    except ValueError as error:
        if "incompatible with Mamba" not in str(error):
            raise
        linears = [n for n in linears if not n.endswith("out_proj")]
        model = get_peft_model(base, LoraConfig(target_modules=linears, **options))
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    return model.train()


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Run:
    torch.manual_seed(11)
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    logits = getattr(outputs, "logits", None)
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(logits, Tensor):
        loss = logits.float().pow(2).mean()
    if loss is None:
        raise Excluded("its outputs hold neither loss nor logits")
    if not loss.requires_grad:
        raise Excluded("its loss depends on nothing that is trained")
    loss.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(logits.detach().clone() if isinstance(logits, Tensor) else None, loss.detach().clone(), gradients)


def _finite(run: Run) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in (run.loss, run.logits, *run.gradients.values()) if t is not None)


# comparison ---------------------------------------------------------------------------------------------------------
def _compare_optimized(row: Row, model: nn.Module, calls: list[dict[str, Any]], plain: list[Run]) -> None:
    try:
        weft.optimize(model, mode="train")
        optimized = [_run(model, c) for c in calls]
    except Exception:
        row.outcome = "error"
        raise
    row.outcome = "equal"
    for reference, got in zip(plain, optimized, strict=True):
        _note_errors(row, reference, got)


def _note_errors(row: Row, reference: Run, got: Run) -> None:
    if set(reference.gradients) != set(got.gradients):
        odd = sorted(set(reference.gradients) ^ set(got.gradients))
        row.outcome, row.reason = "wrong", f"{len(odd)} gradients appear or vanish, {odd[0]} first"
        return
    largest, worst = _distance(reference, got)
    row.logits = max(row.logits or 0.0, _error(reference.logits, got.logits))
    row.loss = max(row.loss or 0.0, _error(reference.loss, got.loss))
    if largest >= (row.gradient or 0.0):
        row.gradient, row.worst = largest, worst
    fits = row.logits <= FORWARD_LIMIT and row.loss <= FORWARD_LIMIT and row.gradient <= GRADIENT_LIMIT
    if not fits:
        row.outcome = "wrong"
        row.reason = f"logits {row.logits:.1e}, loss {row.loss:.1e}, gradient {row.gradient:.1e} ({row.worst})"


def _distance(reference: Run, got: Run) -> tuple[float, str]:
    """The largest gradient error and whose it is."""
    top = max((float(g.abs().max()) for g in reference.gradients.values() if g.numel()), default=0.0)
    errors = {n: _error(g, got.gradients[n], FLOOR * top) for n, g in reference.gradients.items()}
    worst = max(errors, key=lambda n: errors[n], default="")
    return errors.get(worst, 0.0), worst


def _error(reference: Tensor | None, got: Tensor | None, floor: float = 0.0) -> float:
    """Largest difference over the reference's largest entry; infinite where the two do not correspond."""
    if reference is None or got is None:
        return 0.0 if reference is got else float("inf")
    if reference.shape != got.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    if not reference.numel():
        return 0.0
    size = max(float(reference.abs().max()), floor, torch.finfo(torch.float32).tiny)
    return float((reference.double() - got.double()).abs().max()) / size


def _check_undo(row: Row, model: nn.Module, calls: list[dict[str, Any]], plain: list[Run]) -> None:
    weft.undo(model)
    for call, reference in zip(calls, plain, strict=True):
        back = _run(model, call)
        same = back.logits is reference.logits or torch.equal(back.logits, reference.logits)
        if not same or any(not torch.equal(g, back.gradients[n]) for n, g in reference.gradients.items()):
            row.outcome, row.reason = "wrong", "undo() does not restore the model bit for bit"


# coverage -----------------------------------------------------------------------------------------------------------
def _ground_truth(model: nn.Module, calls: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Paths of the norms and LoRA linears that run, from hooks on the model as it is.

    PEFT's ``ParamWrapper`` (LoRA on the stacked weights of experts) is no linear; its gradients are compared all the same.
    """
    norms = _ran(model, calls[0], lambda m: "Norm" in type(m).__name__ and not list(m.children()))
    return norms, _ran(model, calls[0], lambda m: isinstance(m, lora.Linear))


def _ran(model: nn.Module, inputs: Mapping[str, Any], wanted: Callable[[nn.Module], bool]) -> set[str]:
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path, module in model.named_modules()
        if wanted(module)
    ]
    _run(model, inputs)
    for hook in hooks:
        hook.remove()
    return ran


def _count(row: Row, model: nn.Module, norms: set[str], adapters: set[str]) -> None:
    report = model.rewrite_report
    for name, records in (("rewrites", report.rewrites), ("refusals", report.refusals)):
        counts: dict[str, int] = {}
        for record in records:
            counts[record.rule] = counts.get(record.rule, 0) + 1
        setattr(row, name, counts)
    done = {r.module_path for r in report.rewrites if "norm" in r.rule}
    fused = {r.module_path for r in report.rewrites if r.rule == "lora_linear"}
    row.norms, row.adapters = (len(norms & done), len(norms)), (len(adapters & fused), len(adapters))
    left = sorted(norms - done) + sorted(adapters - fused)
    row.missing = [f"{path} ({type(model.get_submodule(path)).__name__}): {report.why_not(path)}"[:400] for path in left[:4]]
    row.notes = list(dict.fromkeys(report.notes))[:4]
