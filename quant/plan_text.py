"""Plans as a person reads them: a table of layers, the reason of each choice, the curve of memory and divergence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from weft.text import fold, table, unnumbered

from .budget import format_bytes
from .layers import BitChoice, Layer

if TYPE_CHECKING:
    from .plan import PrecisionPlan

_POINTS, _WIDTH = 10, 30
_table = partial(table, ruled=False)


def bit_choices(plan: PrecisionPlan) -> Iterator[BitChoice]:
    """One record a linear; those that share a weight count it at the first."""
    total = math.fsum(layer.smallest.sensitivity for layer in plan.layers)
    for layer, format in zip(plan.layers, plan.formats, strict=True):
        chosen = layer.option(format)
        numbers = {"error": chosen.error, "weight_error": chosen.weight_error, "outliers": layer.outliers}
        bits = 8 * chosen.bytes / math.prod(layer.shape)
        for i, path in enumerate(layer.paths):
            why = f"shares the weight of {layer.path}" if i else reason([layer], format, total)
            size = 0 if i else chosen.bytes
            yield BitChoice(path, format, bits, bytes=size, reason=why, sensitivity=chosen.sensitivity, **numbers)


def reason(layers: Sequence[Layer], format: str, total: float) -> str:
    """Why ``layers``, all of one kind, are stored in ``format``: what the smallest does, and what more costs.

    Args:
        total: the sum of the sensitivities of all layers in their smallest format.
    """
    if len(layers[0].options) == 1:
        return layers[0].pinned or f"no format but {format} was to choose from"
    smallest = [layer.smallest for layer in layers]
    alone = [o.sensitivity for o in smallest]
    share = math.fsum(alone) / total if total else 0.0
    harm = f"KL +{max(alone):.2g} alone" if len(layers) == 1 else f"KL +{max(alone):.2g} alone at most"
    more = sum(layer.option(format).bytes - o.bytes for layer, o in zip(layers, smallest, strict=True))
    text = f"{harm}, {100 * share:.2g} % of the total"
    if more > 0:
        return f"{text}; {format} costs {format_bytes(more)}"
    larger = [layer.next_larger for layer in layers]
    if None in larger:
        return text
    more = sum(o.bytes - layer.option(format).bytes for layer, o in zip(layers, larger, strict=True) if o)
    names = "/".join(dict.fromkeys(o.format for o in larger if o))
    return f"{text}; {names} would cost {format_bytes(more)}"


def to_text(plan: PrecisionPlan) -> str:
    """The whole plan for a terminal."""
    kl = f"KL {plan.kl:.3g} measured" if plan.kl is not None else f"KL {plan.predicted:.3g} predicted, not measured"
    head = f"precision plan: {format_bytes(plan.total_bytes)}, {kl}"
    if plan.budget:
        head += f" (asked: {plan.budget})"
    counts = ", ".join(f"{plan.formats.count(f)} in {f}" for f in dict.fromkeys(plan.formats))
    lines = [head, f"{len(plan.layers)} weights: {counts or 'none'}; the rest takes {format_bytes(plan.fixed_bytes)}"]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.layers:
        lines += ["", _table(["layers", "format", "bits", "bytes", "error", "KL alone", "why"], layer_rows(plan))]
        lines += ["", *curve_lines(plan)]
    return "\n".join(lines)


def layer_rows(plan: PrecisionPlan) -> list[list[str]]:
    """One row for the layers whose paths differ in numbers only and whose format is the same."""
    total = math.fsum(layer.smallest.sensitivity for layer in plan.layers)
    folded: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    for layer, format in zip(plan.layers, plan.formats, strict=True):
        folded[unnumbered(layer.path), format].append(layer)
    return [_row(layers, format, total) for (_, format), layers in folded.items()]


def _row(layers: Sequence[Layer], format: str, total: float) -> list[str]:
    chosen = [layer.option(format) for layer in layers]
    size, errors = sum(o.bytes for o in chosen), [o.error for o in chosen if o.error is not None]
    return [
        fold(p for layer in layers for p in layer.paths),
        format,
        f"{8 * size / sum(math.prod(layer.shape) for layer in layers):.2f}",
        format_bytes(size),
        f"{max(errors):.2g}" if errors else "–",
        f"{max(o.sensitivity for o in chosen):.2g}",
        reason(layers, format, total),
    ]


def curve_lines(plan: PrecisionPlan) -> list[str]:
    """The curve at evenly spaced numbers of bytes, the nearest point to the plan marked."""
    points = plan.curve
    first, last = points[0].bytes, points[-1].bytes
    wanted = {round(first + (last - first) * i / (_POINTS - 1)) for i in range(_POINTS)} | {plan.total_bytes}
    shown = sorted({max((p for p in points if p.bytes <= b), key=lambda p: p.bytes, default=points[0]) for b in wanted},
                   key=lambda p: p.bytes)  # fmt: skip
    here = min(shown, key=lambda p: abs(p.bytes - plan.total_bytes))
    most = max(p.kl for p in shown) or 1.0
    rows = [
        [
            format_bytes(p.bytes),
            f"{p.kl:.3g}",
            "█" * math.ceil(_WIDTH * p.kl / most) + (" ← this plan" if p is here else ""),
        ]
        for p in shown
    ]
    return [_table(["memory", "KL expected", ""], rows)]
