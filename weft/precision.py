"""``plan_precision``: which weights of a model to store in 4, 8 or 16 bits, measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from weft.applying import refuse_unusable
from weft.calibration import check_batches, own_batches
from weft.passes.candidates import find_candidates, model_bytes, store_candidates
from weft.passes.prefix import Prefix
from weft.passes.sensitivity import Candidate, Sensitivity
from weft.passes.survey import Survey
from weft.quant.budget import DEFAULT_FORMATS, PrecisionBudget, check_formats
from weft.quant.errors import PlanError, QuantizationError
from weft.quant.formats import FORMATS, Stored, stored_bytes
from weft.quant.layers import Layer, LayerOption
from weft.quant.plan import PrecisionPlan
from weft.quant.planner import make_plan
from weft.rewrite.check import check_model
from weft.rewrite.errors import CalibrationError, ExampleInputsError, OptionError, PrecisionError, WeftError
from weft.rewrite.regions import find_blocks
from weft.rewrite.state import evaluating
from weft.wrappers import innermost, plan_for

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """What may be chosen, and how much may be measured: see :func:`plan_precision`.

    Raises:
        OptionError: ``formats`` names none.
    """

    budget: PrecisionBudget | None = None
    formats: Sequence[str] = DEFAULT_FORMATS
    head: bool = False
    measurements: int = 24

    def __post_init__(self) -> None:
        try:
            check_formats(self.formats)
        except PlanError as error:
            raise OptionError(str(error)) from error

    @property
    def allowed(self) -> tuple[str, ...]:
        """Names of formats; leaving a weight as it is is always one."""
        return tuple(dict.fromkeys((*(self.budget.formats if self.budget else self.formats), "16-bit")))


def plan_precision(
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    budget: PrecisionBudget | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    head: bool = False,
    tokenizer: Any = None,
    measurements: int = 24,
) -> PrecisionPlan:
    """Measure what every format does to every linear of ``model``, and choose. The model is left as it is.

    Args:
        model: in 16 or 32 bits; transformers model, PEFT model, or any ``nn.Module``.
        calibration: forward keyword arguments, one mapping a batch; None: weft makes its own, and says so in the plan.
        budget: what to choose for; None: the smallest choice, and ``plan.at(...)`` chooses for any budget.
        formats: that may be chosen, where ``budget`` does not say.
        head: whether the head and the embeddings may be chosen for, too.
        tokenizer: reads the text that weft takes where no calibration is given.
        measurements: how many whole choices are measured at most, to improve on the sum of single ones.

    Raises:
        PrecisionError: a weight cannot be stored (it names the tensor), or no choice meets the budget (it names the
            smallest that does).
        CalibrationError: the batches are empty, do not fit the model, or make it predict NaN.
        OptionError: there is no such format.
        WeftError: the model cannot be captured.
    """
    return measure(model, calibration, Options(budget, formats, head, measurements), tokenizer)[0]


def measure(
    model: nn.Module, calibration: Batches | None, options: Options, tokenizer: Any = None, examples: Batches = ()
) -> tuple[PrecisionPlan, dict[str, Stored]]:
    """As :func:`plan_precision`, with the weights of the choice, quantized, by name of the parameter.

    Args:
        examples: what to measure on where no calibration is given and weft can make none.
    """
    check_model(model)
    refuse_unusable(model)
    root = innermost(model)
    batches, note = _batches(root, calibration, tokenizer, list(examples))
    with _measuring(model):
        found, blocks = _candidates(model, root, batches, options.allowed, options.head)
        sensitivity = Sensitivity(model, blocks, batches)
        plan = _plan(model, found, sensitivity, options, note)
    chosen = zip(found, plan.formats, strict=True)
    return plan, {c.name: c.stored[name] for c, name in chosen if name in c.stored}


def store_as_planned(model: nn.Module, plan: PrecisionPlan, calibration: Batches | None) -> dict[str, Stored]:
    """The weights of ``model`` as a plan made before stores them, quantized with the statistics of calibration data.

    Without calibration there are no statistics: nothing is quantized here.

    Raises:
        CalibrationError: as :func:`plan_precision` does.
        PrecisionError: a weight holds NaN or infinity.
    """
    if calibration is None:
        return {}
    refuse_unusable(model)
    plan, root = plan_for(model, plan), innermost(model)
    wanted = {p: f for layer, f in zip(plan.layers, plan.formats, strict=True) for p in layer.paths}
    batches = check_batches(root, calibration)
    with _measuring(model):
        found, _ = _candidates(model, root, batches, tuple(FORMATS), True, wanted)
    return {c.name: stored for c in found for stored in c.stored.values()}


def _batches(
    root: nn.Module, calibration: Batches | None, tokenizer: Any, examples: list[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """What to measure on, and where it comes from."""
    if calibration is not None:
        batches = check_batches(root, calibration)
        return batches, f"{len(batches)} calibration batches were given"
    try:
        return own_batches(root, tokenizer)
    except ExampleInputsError as error:
        if not examples:
            raise CalibrationError(
                f"weft can make no calibration data for {type(root).__name__}: give calibration=[{{...}}], "
                "forward keyword arguments, one mapping a batch"
            ) from error
    return check_batches(root, examples), "measured on the example inputs: give calibration data"


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in evaluation mode, without a trace; errors are weft's, and say whose fault they are."""
    try:
        with evaluating(model):
            yield
    except (QuantizationError, PlanError) as error:
        raise PrecisionError(str(error)) from error
    except WeftError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CalibrationError(f"the model's forward fails on a calibration batch: {what}") from error


def _candidates(
    model: nn.Module, root: nn.Module, batches: list[dict[str, Any]], formats: tuple[str, ...], head: bool,
    wanted: Mapping[str, str] | None = None,
) -> tuple[list[Candidate], list[nn.Module]]:  # fmt: skip
    """Every weight that a product reads, quantized in each format that it may take, and the model's blocks.

    Args:
        wanted: by path, the one format that a weight is to be quantized in; None: in all.
    """
    blocks = list(find_blocks(root).values())
    prefixes = [Prefix(model, blocks, inputs) for inputs in batches]
    survey = Survey(model, root)
    survey.install(lambda: _record_all(prefixes[:1]))
    try:
        survey.watch(lambda: _record_all(prefixes))
        found = find_candidates(model, root, survey.uses, blocks, formats, head)
        for candidate in found if wanted is not None else ():
            one = (wanted or {}).get(candidate.name.removesuffix(".weight"), "16-bit")
            candidate.formats = tuple(f for f in candidate.formats if f == one)
        free = [c for c in found if not c.pinned]
        if not free:
            raise QuantizationError("there is no linear whose weight could be stored in another format")
        with tqdm(total=len(free), desc="quantizing", leave=False, disable=None) as bar:
            store_candidates(free, survey, prefixes, bar.update)
    finally:
        survey.remove()
    return found, blocks


def _record_all(prefixes: Sequence[Prefix]) -> None:
    for prefix in prefixes:
        prefix.record(results=False)


def _plan(
    model: nn.Module, found: list[Candidate], sensitivity: Sensitivity, options: Options, note: str
) -> PrecisionPlan:
    """Measure every weight alone, then the most promising choices whole."""
    free = [c for c in found if not c.pinned]
    some, batches = sensitivity.sample(free), sensitivity.batches
    with tqdm(total=len(free) * len(some), desc="measuring", leave=False, disable=None) as bar:
        alone = sensitivity.alone(free, bar.update, some)
    for candidate in free:  # what makes the model predict NaN is nothing to choose
        candidate.stored = {f: s for f, s in candidate.stored.items() if math.isfinite(alone[candidate.name][f])}
    layers = tuple(_layer(model, c, alone.get(c.name, {})) for c in found)
    fixed = model_bytes(model) - sum(layer.option("16-bit").bytes for layer in layers)
    by_path = {layer.path: c for layer, c in zip(layers, found, strict=True) if not c.pinned}
    with sensitivity.together(free) as joint:

        def measured(choice: Mapping[str, str]) -> float:
            return joint({c.name: choice[path] for path, c in by_path.items()})

        plan = make_plan(layers, fixed, options.budget, measured, options.measurements, [note])
    work = f"{len(free)} weights measured alone and {len(plan.measured)} whole choices: {sensitivity.forwards:.0f}"
    notes = [f"{work} forwards"]
    if len(some) < len(batches):
        notes.append(f"alone on {len(some)} of the {len(batches)} batches only: all of them would take too long")
    if most := max(sensitivity.noise.values(), default=0.0):
        notes.append(
            f"rounding anew moves the predictions by KL {most:.2g} at most: taken off what each weight does alone"
        )
    return replace(plan, notes=(*plan.notes, *notes))


def _layer(model: nn.Module, candidate: Candidate, alone: Mapping[str, float]) -> Layer:
    parameter = candidate.use.parameter
    paths = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    shape = candidate.matrix().shape
    options = [LayerOption("16-bit", stored_bytes(FORMATS["16-bit"], shape, parameter.dtype), 0.0, 0.0, 0.0)]
    for name, stored in candidate.stored.items():
        output, weight = candidate.errors[name]
        options.append(LayerOption(name, stored.nbytes, alone[name], output, weight))
    return Layer(
        tuple(p.removesuffix(".weight") for p in paths), tuple(shape), str(parameter.dtype).removeprefix("torch."),
        tuple(options), len(candidate.use.statistics.outliers()), candidate.pinned,
    )  # fmt: skip
