"""``optimize`` and ``undo``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.kernels.dispatch import why_reference
from weft.passes.defaults import default_passes
from weft.rewrite.check import check_gradients, check_model
from weft.rewrite.errors import ExampleInputsError, InternalError, OptionError, UndoError, WeftError
from weft.rewrite.examples import check_examples, make_examples
from weft.rewrite.install import Installation
from weft.rewrite.pipeline import Pass
from weft.rewrite.state import preserved
from weft.rewrite.whole import capture_model

_installed: WeakKeyDictionary[nn.Module, Installation] = WeakKeyDictionary()


def optimize(
    model: nn.Module,
    mode: str | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    precision: Any = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    memory: str | None = None,
    passes: Sequence[Pass] | None = None,
    verify: bool = True,
    keep_weights: bool = False,
) -> nn.Module:
    """Rewrite ``model`` in place and return it; ``model.rewrite_report`` says what was done and what was refused.

    Args:
        model: a transformers ``PreTrainedModel``, a ``PeftModel``, or any ``nn.Module``.
        mode: ``"train"`` or ``"inference"``; None takes ``model.training``.
        example_inputs: keyword arguments of one forward call (or a list of several calls) from which the graphs are
            captured; None makes them from ``model.config``. Other shapes and arguments are captured when they come.
        passes: what to run, in order; None takes ``default_passes(mode)``.
        verify: replay every rewrite, forward and gradients, against what it replaces, and revert what is less exact.

    Raises:
        WeftError: the model or an argument cannot be handled; the model is then as it was.
    """
    check_model(model)
    mode = _mode(model, mode)
    _check_options(precision, calibration, memory, keep_weights)
    root = innermost(model)
    if root in _installed:
        return model
    if mode == "train":
        check_gradients(model)
    examples = check_examples(example_inputs) if example_inputs is not None else make_examples(root, mode)
    chosen = _passes(passes, mode)
    started = time.perf_counter()
    try:
        run = lambda: _run_examples(model, examples, mode)  # noqa: E731
        installation = capture_model(model, root, chosen, run, mode, verify)
    except Exception as error:
        raise (error if isinstance(error, WeftError) else _explain(error, model, examples, mode)) from error
    report = installation.session.report
    report.notes += [note for device in {p.device for p in model.parameters()} if (note := why_reference(device))]
    rewriting = report.total_seconds
    report.total_seconds = time.perf_counter() - started
    report.capture_seconds = report.total_seconds - rewriting
    installation.drop_unused()
    _installed[root] = installation
    for holder in {id(m): m for m in (model, root)}.values():
        holder.__dict__["rewrite_report"] = report
    return model


def undo(model: nn.Module) -> nn.Module:
    """Take every rewrite off ``model``: its forwards, weights and attributes are bit for bit what they were.

    Raises:
        UndoError: ``model`` was not optimized.
    """
    if not isinstance(model, nn.Module) or innermost(model) not in _installed:
        raise UndoError(f"undo() takes a model that optimize() returned; this {type(model).__name__} was not optimized")
    root = innermost(model)
    _installed.pop(root).remove_all()
    for module in (model, root):
        module.__dict__.pop("rewrite_report", None)
    return model


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers such as PEFT's, whose ``generate`` calls it; else ``model`` itself."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _mode(model: nn.Module, mode: str | None) -> str:
    if mode not in ("train", "inference", None):
        raise OptionError(f'mode must be "train", "inference" or None, not {mode!r}')
    return mode or ("train" if model.training else "inference")


def _passes(passes: Sequence[Pass] | None, mode: str) -> list[Pass]:
    if passes is None:
        return list(default_passes(mode))
    wrong = passes if not isinstance(passes, Sequence) else [p for p in passes if not isinstance(p, Pass)]
    if wrong != []:
        raise OptionError(
            f"passes takes a sequence of passes, not {wrong!r}: a rule becomes one by Rules(name, (rule,))"
        )
    return list(passes)


def _check_options(precision: Any, calibration: Any, memory: Any, keep_weights: Any) -> None:
    given = {"precision": precision, "calibration": calibration, "memory": memory, "keep_weights": keep_weights or None}
    unknown = [name for name, setting in given.items() if setting is not None]
    if unknown:
        raise OptionError(f"this version of weft does not plan precision or memory yet: leave out {', '.join(unknown)}")


def _run_examples(model: nn.Module, examples: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Capture by running: random state, mode, buffers, and how weights are stored stay as they were."""
    with preserved(model), _own_random_state(), torch.set_grad_enabled(mode == "train"):
        model.train(mode == "train")
        for inputs in examples:
            model(**inputs)


def _explain(error: Exception, model: nn.Module, examples: Sequence[Mapping[str, Any]], mode: str) -> WeftError:
    """Whose fault ``error`` was: the example inputs', if the model alone (as it is again by now) fails on them too."""
    try:
        _run_examples(model, examples, mode)
    except Exception as own:
        names = ", ".join(dict.fromkeys(name for inputs in examples for name in inputs))
        return ExampleInputsError(
            f"the model's forward fails on the example inputs ({names}): {type(own).__name__}: {own}; "
            "pass optimize(model, example_inputs={...}) that it takes"
        )
    return InternalError(
        f"capturing {type(model).__name__} failed, though it runs by itself: {type(error).__name__}: {error}"
    )


@contextmanager
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
