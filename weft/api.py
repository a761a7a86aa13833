"""``optimize`` and ``undo``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.applying import apply_plan
from weft.checkpointing import obeying, release
from weft.kernels import fp8_kept
from weft.kernels.dispatch import why_reference
from weft.passes.defaults import default_passes
from weft.precision import Options, measure, store_as_planned
from weft.quant.budget import parse_memory
from weft.quant.formats import FORMATS
from weft.quant.modules import Replaced, give_back
from weft.quant.plan import PrecisionBudget, PrecisionPlan
from weft.rewrite.check import check_gradients, check_model
from weft.rewrite.errors import ExampleInputsError, InternalError, OptionError, UndoError, WeftError
from weft.rewrite.examples import check_examples, make_examples
from weft.rewrite.install import Installation
from weft.rewrite.pipeline import Pass
from weft.rewrite.report import RewriteReport
from weft.rewrite.state import preserved
from weft.rewrite.step_memory import Limit
from weft.rewrite.whole import capture_model, on_gpu
from weft.saving import describe
from weft.wrappers import innermost


@dataclass(frozen=True)
class Optimized:
    """What was done to a model: replaced forwards, and stored weights with how to give the former ones back.

    An attribute of the model, so that it goes when the model goes. Copied or pickled with it, it turns into None: a copy is not
    optimized.
    """

    installation: Installation
    plan: PrecisionPlan | None
    replaced: list[Replaced]

    def __deepcopy__(self, memo: dict[int, Any]) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


ATTRIBUTE = "_rewritten"


def _optimized(root: Any) -> Optimized | None:
    return root.__dict__.get(ATTRIBUTE)


def optimize(
    model: nn.Module,
    mode: str | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    precision: PrecisionBudget | PrecisionPlan | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    memory: str | int | None = None,
    passes: Sequence[Pass] | None = None,
    verify: bool = True,
    keep_weights: bool = False,
    cuda_graphs: bool = True,
) -> nn.Module:
    """Rewrite ``model`` in place and return it; ``model.rewrite_report`` says what was done and what was refused.

    A model that is optimized already stays as it is, whatever the other arguments say (``precision`` is refused): ``undo`` it
    first to have it otherwise.

    Args:
        model: a transformers ``PreTrainedModel``, a ``PeftModel``, or any ``nn.Module``.
        mode: ``"train"`` or ``"inference"``; None takes ``model.training``.
        example_inputs: keyword arguments of one forward call (or a list of several calls) from which the graphs are
            captured; None makes them from ``model.config``. Other shapes and arguments are captured when they come.
        precision: None leaves weights as they are; a ``PrecisionBudget`` has every linear measured and stored in the format
            that the budget allows; a ``PrecisionPlan`` made before is put into force.
        calibration: forward keyword arguments, one mapping a batch, on which precision is measured; None: weft makes some,
            or takes ``example_inputs`` where it cannot.
        memory: what a training step may take at its peak on the model's device: bytes, text such as ``"24GB"``, or ``"min"``
            for as little as possible; None on a GPU: what is free there. Each block then saves, computes again, or sends to
            the host's memory what takes the least time within it.
        passes: what to run, in order; None takes ``default_passes(mode)``.
        verify: replay every rewrite, forward and gradients, against what it replaces, and revert what is less exact.
        keep_weights: keep the former weights in the host's memory, so that ``undo`` can give them back.
        cuda_graphs: on a GPU, record the blocks of training steps so small that the host is slower than the device.

    Raises:
        WeftError: the model or an argument cannot be handled; the model is then as it was.
    """
    check_model(model)
    mode = _mode(model, mode)
    _check_options(precision, calibration, verify=verify, keep_weights=keep_weights, cuda_graphs=cuda_graphs)
    limit = _limit(model, mode, memory)
    root = innermost(model)
    if _optimized(root) is not None:
        return _as_it_is(model, precision)
    if mode == "train":
        check_gradients(model)
    examples = check_examples(example_inputs) if example_inputs is not None else make_examples(root, mode)
    chosen = _passes(passes, mode)
    started = time.perf_counter()
    plan, replaced = _store(model, precision, calibration, examples if example_inputs is not None else ())
    try:
        run = lambda: _run_examples(model, examples, mode)  # noqa: E731
        installation = capture_model(model, root, chosen, run, mode, verify, limit, cuda_graphs)
    except BaseException as error:
        give_back(replaced)
        if not isinstance(error, Exception):
            raise
        raise (error if isinstance(error, WeftError) else _explain(error, model, examples, mode)) from error
    report = _completed(installation, model, plan, time.perf_counter() - started)
    _obey_checkpointing(installation)
    installation.drop_unused()
    root.__dict__[ATTRIBUTE] = Optimized(installation, plan, replaced if keep_weights else [])
    model.__dict__["rewrite_report"] = root.__dict__["rewrite_report"] = report
    return model


def _completed(
    installation: Installation, model: nn.Module, plan: PrecisionPlan | None, seconds: float
) -> RewriteReport:
    """The report of a capture that took ``seconds``, rewriting included."""
    report = installation.session.report
    report.notes += [note for device in {p.device for p in model.parameters()} if (note := why_reference(device))]
    report.capture_seconds, report.total_seconds = seconds - report.total_seconds, seconds
    report.precision, report.steps = plan, installation.session.memory
    return report


def undo(model: nn.Module) -> nn.Module:
    """Take every rewrite off ``model``: its forwards, weights and attributes are bit for bit what they were.

    Raises:
        UndoError: ``model`` was not optimized, or its weights were stored in fewer bits and the former ones not kept.
    """
    root = innermost(model) if isinstance(model, nn.Module) else None
    done = None if root is None else _optimized(root)
    if root is None or done is None:
        raise UndoError(f"undo() takes a model that optimize() returned; this {type(model).__name__} was not optimized")
    if done.plan is not None and not done.replaced and any(FORMATS[f].kind != "dense" for f in done.plan.formats):
        raise UndoError(
            "the weights were stored in fewer bits and the former ones are gone: optimize(..., keep_weights=True) keeps them"
        )
    del root.__dict__[ATTRIBUTE]
    done.installation.remove_all()
    release(root)
    fp8_kept.forget(root.parameters())
    give_back(done.replaced)
    for module in (model, root):
        module.__dict__.pop("rewrite_report", None)
    return model


def _obey_checkpointing(installation: Installation) -> None:
    memory = installation.session.memory
    if memory is not None:
        blocks = [f.module for path, f in installation.replaced.items() if path in memory.paths]
        installation.session.before.append(obeying(blocks, memory))


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


def _limit(model: nn.Module, mode: str, memory: str | int | None) -> Limit | None:
    """Within what the steps of ``model`` are planned; None: they are not."""
    if memory is None:
        return "free" if mode == "train" and on_gpu(model) else None
    if mode != "train":
        raise OptionError(f"memory limits a training step, and mode is {mode!r}: leave it out")
    if memory == "min":
        return "min"
    try:
        return parse_memory(memory)
    except WeftError as error:
        raise OptionError(f'memory takes bytes, text such as "24GB", or "min": {error}') from error


def _check_options(precision: Any, calibration: Any, **switches: Any) -> None:
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise OptionError(f"{name} is True or False, not {switch!r}")
    if precision is not None and not isinstance(precision, PrecisionBudget | PrecisionPlan):
        raise OptionError(f"precision takes a PrecisionBudget or a PrecisionPlan, not a {type(precision).__name__}")
    if precision is None and (calibration is not None or switches["keep_weights"]):
        raise OptionError("calibration and keep_weights belong to precision: give a PrecisionBudget or a PrecisionPlan")


def _as_it_is(model: nn.Module, precision: Any) -> nn.Module:
    if precision is not None:
        raise OptionError("the model is optimized already: undo(model) before its precision is planned")
    return model


def _store(
    model: nn.Module, precision: PrecisionBudget | PrecisionPlan | None, calibration: Any, examples: Iterable[Any]
) -> tuple[PrecisionPlan | None, list[Replaced]]:
    """Store the weights as ``precision`` asks for."""
    if precision is None:
        return None, []
    if isinstance(precision, PrecisionPlan):
        plan, stored = precision, store_as_planned(model, precision, calibration)
    else:
        plan, stored = measure(model, calibration, Options(precision), examples=examples)
    replaced = apply_plan(model, plan, stored)
    description = describe(innermost(model))
    return plan, [*replaced, *([description] if description else [])]


def _run_examples(model: nn.Module, examples: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Capture by running: random state, mode, buffers, and how weights are stored stay as they were.

    That no cache is wanted is said by the configs, where whoever trains says it: to Dynamo a call with an argument more is
    another call.
    """
    with preserved(model), _own_random_state(), torch.set_grad_enabled(mode == "train"):
        model.train(mode == "train")
        for inputs in examples:
            configs = _cached(model) if inputs.get("use_cache") is False else []
            plain = {name: value for name, value in inputs.items() if name != "use_cache" or not configs}
            with _without_cache(configs):
                model(**plain)


def _cached(model: nn.Module) -> list[Any]:
    """The configs in ``model`` that say whether a cache is wanted."""
    configs = [
        c for m in model.modules() if isinstance(getattr(c := getattr(m, "config", None), "use_cache", None), bool)
    ]
    return list({id(c): c for c in configs}.values())


@contextmanager
def _without_cache(configs: Sequence[Any]) -> Iterator[None]:
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, wanted in zip(configs, before, strict=True):
            config.use_cache = wanted


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
