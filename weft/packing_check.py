"""Whether a model keeps packed documents apart: by the operators in its graphs, and by what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from weft.passes.sequence_mixing import FindSequenceMixing
from weft.rewrite.errors import PackingError
from weft.rewrite.report import Refusal
from weft.rewrite.state import evaluating
from weft.rewrite.whole import capture_model
from weft.wrappers import innermost

LENGTHS = (29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
"""Rows to try a model on: primes, of which one is not among its sizes."""
ALLOWED = {torch.float32: 16, torch.float64: 16}
"""Units in the last place of the largest logit by which other documents may change one; 4 in narrower dtypes.

A model that keeps documents apart changes none, but for the order of sums where tokens are sorted by expert.
"""
_NAMED = 6


def check_packing(model: nn.Module) -> None:
    """Make certain that in ``model`` no token sees a document but its own where rows are packed.

    First the model's graphs are searched for operators that mix along the sequence and take no mask: convolutions, scans,
    recurrences, linear attention, softmax over all places. Then the model itself runs on two documents in one row, twice,
    with other tokens in the first: what it says of the second may not change, and must be what it says of it alone.

    A model that weft has optimized is not searched again; it is run like any other.

    Raises:
        PackingError: names the operators, or the module in which the second document first changed.
    """
    root = innermost(model)
    trial = _Trial(root, _row_length(root))
    with evaluating(model):
        if not hasattr(root, "rewrite_report"):
            _search(model, root, trial)
        if not accepts(root, "position_ids"):
            raise PackingError(
                f"{type(root).__name__}.forward takes no position_ids, so that nothing can tell it where a document starts: "
                "train it on padded batches"
            )
        _probe(root, trial)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward takes ``argument``, by name or in ``**kwargs``."""
    parameters = inspect.signature(innermost(model).forward).parameters
    return argument in parameters or (
        argument != "position_ids" and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    )


def one_row_only(model: nn.Module) -> bool:
    """Whether the model's attention finds documents in a batch of one row alone: flash attention does, of no mask."""
    chosen = getattr(getattr(innermost(model), "config", None), "_attn_implementation", None)
    return isinstance(chosen, str) and "flash" in chosen


@dataclass(frozen=True)
class _Trial:
    """Rows of two documents."""

    model: nn.Module
    length: int

    @property
    def first(self) -> int:
        """Tokens of the first document."""
        return self.length // 2 - 1

    def tokens(self, seed: int, count: int) -> Tensor:
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        known = (
            getattr(embedding, "num_embeddings", None) or getattr(getattr(embedding, "weight", None), "shape", [2])[0]
        )
        device = next(self.model.parameters()).device
        return torch.randint(0, known, (1, count), generator=torch.Generator().manual_seed(seed)).to(device)

    def run(self, *documents: Tensor) -> Tensor:
        """Logits of the last of ``documents`` in one row."""
        places = torch.cat([torch.arange(d.shape[1], device=d.device) for d in documents])[None]
        given = {"position_ids": places, "use_cache": False}
        extra = {name: value for name, value in given.items() if accepts(self.model, name)}
        output = self.model(input_ids=torch.cat(documents, 1), **extra)
        found = getattr(output, "logits", None)
        found = next(t for t in tree_leaves(output) if isinstance(t, Tensor)) if found is None else found
        return found[:, -documents[-1].shape[1] :]


def _row_length(model: nn.Module) -> int:
    sizes = {n for p in (*model.parameters(), *model.buffers()) for n in p.shape}
    return next((n for n in LENGTHS if n not in sizes), LENGTHS[0])


def _search(model: nn.Module, root: nn.Module, trial: _Trial) -> None:
    first, second = trial.tokens(0, trial.first), trial.tokens(1, trial.length - trial.first)
    search = FindSequenceMixing(trial.length)
    installed = capture_model(model, root, [search], lambda: _call(trial.run, first, second), "inference", verify=False)
    found = [r for r in installed.session.report.refusals if r.rule == "packing"]
    installed.remove_all()
    if found:
        raise PackingError(
            f"{type(root).__name__} cannot keep packed documents apart: {_named(found)}. Train it on padded batches"
        )


def _call(run: Callable[..., Any], *documents: Tensor) -> None:
    with torch.no_grad():
        run(*documents)


def _named(found: list[Refusal]) -> str:
    """Each operator with where it is, once for all layers in which it is the same."""
    places: dict[tuple[str, str], list[str]] = {}
    for each in found:
        places.setdefault((each.reason, each.source), []).append(each.module_path or "(top)")
    lines = [
        f"{where[0]}{f' and {len(where) - 1} more like it' if len(where) > 1 else ''}: {reason} ({source})"
        for (reason, source), where in places.items()
    ]
    return "; ".join(lines[:_NAMED]) + (f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else "")


def _probe(root: nn.Module, trial: _Trial) -> None:
    second = trial.tokens(1, trial.length - trial.first)
    one, other = trial.tokens(2, trial.first), trial.tokens(3, trial.first)
    seen, changed = (_watched(root, trial, document, second) for document in (one, other))
    if not _apart(seen.logits, changed.logits):
        place = next(
            (p for p, x in seen.states.items() if p in changed.states and not _apart(x, changed.states[p])), ""
        )
        raise PackingError(
            f"{type(root).__name__} lets a packed document see its neighbour: other tokens in the first changed the logits of "
            f"the second by {_difference(seen.logits, changed.logits):.3g}"
            + (f", from module {place!r} on" if place else "")
            + ". Train it on padded batches, or choose another attn_implementation"
        )
    alone = trial.run(second)
    # a row of another length may take other kernels, those of 4-bit weights among them, which round to 16 bits inside
    wide = all(t.dtype in ALLOWED for t in (seen.logits, *root.parameters()))
    rounding = 1e-3 if wide else 0.1
    if _difference(alone, seen.logits) > rounding * float(alone.abs().max()):
        raise PackingError(
            f"{type(root).__name__} computes other logits for a packed document than for the document alone, by "
            f"{_difference(alone, seen.logits):.3g}: it counts positions from the start of the row. Train it on padded batches"
        )


@dataclass
class _Watched:
    logits: Tensor
    states: dict[str, Tensor]


def _watched(root: nn.Module, trial: _Trial, first: Tensor, second: Tensor) -> _Watched:
    """The logits of the second document, and its part of what each module returned, in the order in which they did."""
    states: dict[str, Tensor] = {}
    kept = second.shape[1]

    def note(path: str, output: Any) -> None:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 3]
        if path not in states and tensors and tensors[0].shape[1] == trial.length:
            states[path] = tensors[0][:, -kept:].clone()

    with ExitStack() as stack:
        for path, module in root.named_modules():
            handle = module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
            stack.callback(handle.remove)
        return _Watched(trial.run(first, second), states)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same up to rounding."""
    unit = torch.finfo(a.dtype).eps * max(float(a.abs().max()), torch.finfo(a.dtype).tiny)
    return _difference(a, b) <= ALLOWED.get(a.dtype, 4) * unit
