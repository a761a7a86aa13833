"""One model type: built, adapted with LoRA, run as it is and through ``weft.optimize``, and compared."""

from __future__ import annotations

import copy
import time
import traceback
from collections import Counter
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

from .coverage_compare import Excluded, Run, distance, finite, identical, is_rounding, run
from .coverage_models import tiny_model
from .coverage_sizes import NO_LINEARS

FRESH = Scale(batch=3, length=29, target_length=11, seed=7)
"""Other sizes and values than those that the graphs were captured with."""
OTHER = Scale(batch=3, length=27, target_length=10, seed=8)
"""And others again, for what may have happened at one number alone."""


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


Calls = list[dict[str, Any]]


def measure(kind: str, name: str, class_name: str) -> Row:
    """The row of one type.

    The slope of a ReLU jumps where its input is zero within rounding, and so does a routing where two experts tie. That
    happens at one draw of the inputs and not at the next; a wrong rewrite is wrong at both.
    """
    row = measure_at(FRESH, kind, name, class_name)
    if row.outcome != "wrong":
        return row
    again = measure_at(OTHER, kind, name, class_name)
    again.seconds = round(again.seconds + row.seconds, 1)
    if again.outcome == "equal":
        again.reason = f"a jump at one draw of the inputs, not at another: {row.reason}"
    return again


def measure_at(scale: Scale, kind: str, name: str, class_name: str) -> Row:
    """The row of one type, from inputs of one scale."""
    row = Row(kind, name, class_name)
    started = time.perf_counter()
    try:
        model, calls, plain = run_plain(name, class_name, scale)
        norms, adapters = _ground_truth(model, calls)
        row.outcome = "error"
        weft.optimize(model, mode="train")
        optimized = [run(model, c) for c in calls]
        _count(row, model, norms, adapters)
        weft.undo(model)
        row.outcome, row.reason = _verdict(row, model, calls, plain, optimized)
    except Excluded as error:
        row.reason = str(error)
    except WeftError as error:
        row.outcome, row.reason = "error" if isinstance(error, InternalError) else "refused", describe(error)
    except Exception as error:
        row.reason = describe(error)
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def describe(error: BaseException) -> str:
    """Type and first line of the innermost cause, and the frames that it came from."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    lines = str(error).strip().splitlines() or [""]
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {lines[0][:300]} [{' '.join(frames[-3:])}]"


# the model as it is -------------------------------------------------------------------------------------------------
def run_plain(name: str, class_name: str, scale: Scale = FRESH) -> tuple[nn.Module, Calls, list[Run]]:
    """The adapted model, the calls that it is compared on, and what it makes of them as it is."""
    torch.manual_seed(0)
    try:
        base = tiny_model(name, class_name)
        model = adapted(base)
        calls = make_examples(base, "train", scale)
        plain = [run(model, c) for c in calls]
        again = [run(model, c) for c in calls]
    except (Excluded, WeftError):
        raise
    except Exception as error:
        raise Excluded(describe(error)) from error
    if not all(finite(p) for p in plain):
        raise Excluded("NaN or infinity in the plain model's results")
    if not all(identical(a, b) for a, b in zip(plain, again, strict=True)):
        raise Excluded("the plain model does not repeat its own result under one seed")
    return model, calls, plain


def adapted(base: nn.Module) -> nn.Module:
    """``base`` with LoRA, its B random, on every linear but the head; norms are trained too."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linears = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and type(module).__name__ not in NO_LINEARS
    ]
    if not linears:
        raise Excluded("it has no linear layer to adapt")
    try:
        model = _with_lora(base, linears)
    except ValueError as error:
        if "incompatible with Mamba" not in str(error):
            raise
        model = _with_lora(base, [n for n in linears if not n.endswith("out_proj")])
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    return model.train()


def _with_lora(base: nn.Module, linears: list[str]) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=linears, init_lora_weights=False))


# comparison ---------------------------------------------------------------------------------------------------------
def _verdict(row: Row, model: nn.Module, calls: Calls, plain: list[Run], optimized: list[Run]) -> tuple[str, str]:
    """Outcome and reason; ``model`` is the plain one again."""
    if not all(identical(run(model, call), reference) for call, reference in zip(calls, plain, strict=True)):
        return "wrong", "undo() does not restore the model bit for bit"
    excused = ""
    for call, reference, got in zip(calls, plain, optimized, strict=True):
        odd = sorted(set(reference.gradients) ^ set(got.gradients))
        if odd:
            return "wrong", f"{len(odd)} gradients appear or vanish, {odd[0]} first"
        apart = distance(reference, got)
        row.logits, row.loss = max(row.logits or 0.0, apart.logits), max(row.loss or 0.0, apart.loss)
        if apart.gradient >= (row.gradient or 0.0):
            row.gradient, row.worst = apart.gradient, apart.worst
        if not apart.fits:
            excused = f"logits {apart.logits:.1e}, loss {apart.loss:.1e}, gradient {apart.gradient:.1e} ({apart.worst})"
            exact = _exact(model, call)
            if exact is None or not is_rounding(exact, reference, got):
                return "wrong", excused
    return "equal", f"rounding, by float64: {excused}" if excused else ""


def _exact(model: nn.Module, call: Mapping[str, Any]) -> Run | None:
    """The plain model in float64; None where its code insists on float32."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    try:
        return run(copy.deepcopy(model).double(), wide)
    except RuntimeError:
        return None


# coverage -----------------------------------------------------------------------------------------------------------
def _ground_truth(model: nn.Module, calls: Calls) -> tuple[set[str], set[str]]:
    """Paths of the norms and LoRA linears that run, from hooks on the model as it is.

    A module that is called a norm but returns less than it was given computes a scale, not a norm. PEFT's
    ``ParamWrapper`` (LoRA on the stacked weights of experts) is no linear; its gradients are compared, though.
    """
    norms = _ran(model, calls[0], lambda m: "Norm" in type(m).__name__ and not list(m.children()))
    return norms, _ran(model, calls[0], lambda m: isinstance(m, lora.Linear))


def _ran(model: nn.Module, inputs: Mapping[str, Any], wanted: Callable[[nn.Module], bool]) -> set[str]:
    ran: set[str] = set()

    def note(path: str, given: tuple[Any, ...], result: Any) -> None:
        smaller = given and isinstance(result, Tensor) and result.numel() < given[0].numel()
        if not smaller or "Norm" not in type(model.get_submodule(path)).__name__:
            ran.add(path)

    hooks = [
        module.register_forward_hook(lambda _, given, result, path=path: note(path, given, result))
        for path, module in model.named_modules()
        if wanted(module)
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return ran


def _count(row: Row, model: nn.Module, norms: set[str], adapters: set[str]) -> None:
    report = model.rewrite_report
    row.rewrites, row.refusals = (dict(Counter(r.rule for r in found)) for found in (report.rewrites, report.refusals))
    done = {r.module_path for r in report.rewrites if "norm" in r.rule}
    fused = {r.module_path for r in report.rewrites if r.rule == "lora_linear"}
    row.norms, row.adapters = (len(norms & done), len(norms)), (len(adapters & fused), len(adapters))
    left = sorted(norms - done) + sorted(adapters - fused)
    named = [f"{path} ({type(model.get_submodule(path)).__name__})" for path in left[:4]]
    row.missing = [f"{name}: {report.why_not(path)}"[:400] for name, path in zip(named, left, strict=False)]
    row.notes = list(dict.fromkeys(report.notes))[:4]
