"""Plans as JSON: one line a layer, a version, and a checksum, so that a damaged file is not taken for a plan.

Whoever edits a plan by hand takes the checksum out; everything else is still checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .budget import PrecisionBudget
from .errors import PlanError
from .layers import Layer, LayerOption
from .surrogate import Measured

if TYPE_CHECKING:
    from .plan import PrecisionPlan

VERSION = 1
_KEY = "weft_precision_plan"
_DIGITS = string.digits + string.ascii_lowercase
_T = TypeVar("_T")


def to_dict(plan: PrecisionPlan) -> dict[str, Any]:
    """Plain data, lossless, for JSON."""
    data: dict[str, Any] = {
        _KEY: VERSION,
        "total_bytes": plan.total_bytes,
        "fixed_bytes": plan.fixed_bytes,
        "kl": plan.kl if plan.kl is None else _finite(plan.kl),
        "budget": asdict(plan.budget) | {"formats": [*plan.budget.formats]} if plan.budget else None,
        "notes": [*plan.notes],
        "measured": [[_encode(plan, m), _finite(m.kl)] for m in plan.measured],
        "layers": [_layer_dict(layer, f) for layer, f in zip(plan.layers, plan.formats, strict=True)],
    }
    return data | {"checksum": _checksum(data)}


def _layer_dict(layer: Layer, format: str) -> dict[str, Any]:
    data = asdict(layer) | {"paths": [*layer.paths], "shape": [*layer.shape]}
    return {"format": format} | data | {"options": [*data["options"]]}


def _finite(kl: float) -> float | str:
    return float(kl) if math.isfinite(kl) else "infinite"


def _encode(plan: PrecisionPlan, measured: Measured) -> str:
    """A character a layer: the number of its option."""
    pairs = zip(plan.layers, measured.formats, strict=True)
    return "".join(_DIGITS[[o.format for o in layer.options].index(f)] for layer, f in pairs)


def _checksum(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_text(plan: PrecisionPlan) -> str:
    """The plan as JSON that a person can read: layers and measurements one a line."""
    parts = []
    for key, entry in to_dict(plan).items():
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        if key in ("layers", "measured") and entry:
            text = "[\n  " + ",\n  ".join(json.dumps(e, ensure_ascii=False, allow_nan=False) for e in entry) + "\n ]"
        parts.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read(source: str | Path) -> tuple[str, str]:
    """JSON text and what to call it: ``source`` itself if it begins like an object, else the file that it names.

    Raises:
        PlanError: the file cannot be read, or is no text.
    """
    if isinstance(source, str) and source.lstrip()[:1] == "{":
        return source, "the plan"
    try:
        return Path(source).read_text(encoding="utf-8"), str(source)
    except (OSError, ValueError) as error:
        raise PlanError(f"{source}: cannot be read as a plan: {error}") from error


def parse(text: str, source: str) -> Any:
    """JSON as data.

    Raises:
        PlanError: it is none; it names ``source`` and the place.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{source}: no JSON, or cut off: {error}") from error


def from_dict(make: Callable[..., _T], data: Any, source: str) -> _T:
    """Inverse of :func:`to_dict`, by way of ``make``, the plan's class.

    Raises:
        PlanError: it names ``source`` and what is wrong.
    """
    try:
        return make(**_fields(data))
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error


def _fields(data: Any) -> dict[str, Any]:
    """The arguments of a plan, every one of the right type."""
    if not isinstance(data, dict) or _KEY not in data:
        raise PlanError("not a precision plan of weft's")
    if data[_KEY] != VERSION:
        raise PlanError(f"a plan of version {data[_KEY]!r}: this weft reads version {VERSION}")
    keys = (_KEY, "total_bytes", "fixed_bytes", "kl", "budget", "notes", "measured", "layers")
    _check_keys(data, keys, ("checksum",), "the plan")
    if "checksum" in data and data["checksum"] != _sum_of(data):
        raise PlanError("the checksum does not fit: the file was damaged, or edited (then take the checksum out)")
    records = _list(data, "layers", dict, "the plan")
    layers = tuple(_layer(r, f"layer {i}") for i, r in enumerate(records))
    return {
        "layers": layers,
        "formats": tuple(_take(r, "format", str, layer.path) for r, layer in zip(records, layers, strict=True)),
        "fixed_bytes": _take(data, "fixed_bytes", int, "the plan"),
        "kl": None if data["kl"] is None else _kl(data["kl"]),
        "measured": tuple(_measured(m, layers) for m in _list(data, "measured", list, "the plan")),
        "notes": tuple(_list(data, "notes", str, "the plan")),
        "budget": _budget(data["budget"]),
    }


def _sum_of(data: Mapping[str, Any]) -> str:
    try:
        return _checksum({k: v for k, v in data.items() if k != "checksum"})
    except ValueError as error:  # NaN or infinity, which no plan holds
        raise PlanError(f"numbers that no plan holds: {error}") from error


def _check_keys(record: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    missing = [k for k in needed if k not in record]
    unknown = [k for k in record if k not in needed + optional]
    if missing or unknown:
        raise PlanError(f"{where} lacks {missing[0]!r}" if missing else f"{where} has an unknown entry {unknown[0]!r}")


def _take(record: Mapping[str, Any], key: str, kind: type[_T], where: str) -> _T:
    entry = record[key]
    if isinstance(entry, kind) and not isinstance(entry, bool):
        return entry
    if kind is not float or not isinstance(entry, int) or isinstance(entry, bool) or abs(entry) > 2**53:
        raise PlanError(f"{where}: {key} must be of type {kind.__name__}, not {entry!r:.80}")
    return kind(entry)


def _list(record: Mapping[str, Any], key: str, kind: type[_T], where: str) -> list[_T]:
    return [_take({key: entry}, key, kind, where) for entry in _take(record, key, list, where)]


def _layer(record: dict[str, Any], where: str) -> Layer:
    keys = ("format", "paths", "shape", "dtype", "options", "outliers", "pinned")
    _check_keys(record, keys, (), where)
    paths = tuple(_list(record, "paths", str, where))
    if not paths:
        raise PlanError(f"{where} has no paths")
    where = paths[0]
    return Layer(
        paths,
        tuple(_list(record, "shape", int, where)),
        _take(record, "dtype", str, where),
        tuple(_option(o, where) for o in _list(record, "options", dict, where)),
        _take(record, "outliers", int, where),
        _take(record, "pinned", str, where),
    )


def _option(record: dict[str, Any], where: str) -> LayerOption:
    _check_keys(record, ("format", "bytes", "sensitivity", "error", "weight_error"), (), where)
    errors = [None if record[k] is None else _take(record, k, float, where) for k in ("error", "weight_error")]
    size, sensitivity = _take(record, "bytes", int, where), _take(record, "sensitivity", float, where)
    return LayerOption(_take(record, "format", str, where), size, sensitivity, *errors)


def _kl(entry: Any) -> float:
    return math.inf if entry == "infinite" else _take({"kl": entry}, "kl", float, "a measurement")


def _measured(entry: list[Any], layers: tuple[Layer, ...]) -> Measured:
    if len(entry) != 2 or not isinstance(entry[0], str) or len(entry[0]) != len(layers):
        raise PlanError(
            f"a measurement needs a character for each of {len(layers)} layers and a divergence: {entry!r:.80}"
        )
    numbers = [_DIGITS.find(c) for c in entry[0]]
    if not all(0 <= n < len(layer.options) for n, layer in zip(numbers, layers, strict=True)):
        raise PlanError(f"a measurement is of options that are not there: {entry[0]:.80}")
    return Measured(tuple(la.options[n].format for n, la in zip(numbers, layers, strict=True)), _kl(entry[1]))


def _budget(record: Any) -> PrecisionBudget | None:
    if record is None:
        return None
    entry = _take({"budget": record}, "budget", dict, "the plan")
    _check_keys(entry, ("memory", "max_kl", "formats"), (), "the budget")
    formats = tuple(_list(entry, "formats", str, "the budget"))
    return PrecisionBudget(entry["memory"], entry["max_kl"], formats)
