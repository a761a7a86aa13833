"""Patterns: ordinary code, traced once into canonical expressions whose parameters are wildcards."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from .errors import PatternError
from .expr import Expr, View

Variants = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Pattern:
    """One variant of a rule's pattern.

    ``outputs[0]`` is matched; the other outputs are expressions inside it whose values the replacement computes too.
    """

    variant: Mapping[str, Any]
    outputs: tuple[Expr, ...]
    wildcards: tuple[str, ...]
    size: int = field(default=0)

    @property
    def root(self) -> Expr:
        """The expression to find."""
        return self.outputs[0]


def trace_patterns(function: Callable[..., Any], variants: Variants) -> tuple[Pattern, ...]:
    """Every variant of ``function``, largest first, so that the widest match is found first.

    Raises:
        PatternError: a variant returns something other than expressions, or names a keyword the function lacks, or the
            pattern draws random numbers.
    """
    names = list(inspect.signature(function).parameters)
    unknown = set(variants) - set(names)
    if unknown:
        raise PatternError(f"{function.__qualname__}: variants name no parameter of the pattern: {sorted(unknown)}")
    wildcards = tuple(n for n in names if n not in variants)
    traced = [_trace(function, wildcards, chosen) for chosen in _choices(variants)]
    return tuple(sorted((p for p in traced if p is not None), key=lambda p: -p.size))


def _choices(variants: Variants) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*variants.values()):
        yield dict(zip(variants, values, strict=True))


def _trace(function: Callable[..., Any], wildcards: tuple[str, ...], variant: dict[str, Any]) -> Pattern | None:
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    proxies = {name: fx.Proxy(graph.placeholder(name), tracer) for name in wildcards}
    result = function(**proxies, **variant)
    if result is None:
        return None
    results = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(r, fx.Proxy) for r in results):
        raise PatternError(f"{function.__qualname__} with {variant} must return what it computes from its arguments")
    view = View(pattern=True)
    outputs = tuple(view.of(r.node) for r in results)
    strange = {e.args[0] for o in outputs for e in o.walk() if e.op == "?"} - set(wildcards)
    if strange:
        raise PatternError(
            f"{function.__qualname__}: {', '.join(sorted(strange))} cannot be part of a pattern (no value is told by what a "
            "random operation drew): make it a parameter"
        )
    return Pattern(variant, outputs, wildcards, sum(e.op != "?" for e in outputs[0].walk()))


def _record(name: str, *args: Any) -> Any:
    proxy = next(a for a in args if isinstance(a, fx.Proxy))
    return proxy.tracer.create_proxy("call_method", name, args, {})


def part(x: Any, start: Any, stop: Any, step: Any = 1) -> Any:
    """In a pattern: the elements start, start + step, … of the last dimension, however a model takes them."""
    return _record("part", x, start, stop, step)


def interleave(a: Any, b: Any) -> Any:
    """In a pattern: a[0], b[0], a[1], b[1], … along the last dimension, however a model joins them."""
    return _record("interleave", a, b)


def as_complex(x: Any) -> Any:
    """In a pattern: neighbours of the last dimension seen as complex numbers."""
    return _record("as_complex", x)


def from_complex(z: Any) -> Any:
    """In a pattern: complex numbers seen as neighbours of the last dimension."""
    return _record("from_complex", z)


def columns(x: Any, w: Any, bias: Any) -> Any:
    """In a pattern: x·W + b of a weight stored as (in_features, out_features)."""
    return _record("linear_columns", x, w, bias)


def gemm_4bit(x: Any, *storage: Any) -> Any:
    """In a pattern: a bitsandbytes 4-bit product, with the arguments of ``bitsandbytes::gemm_4bit``."""
    return _record("gemm_4bit", x, *storage)


def gemv_4bit(x: Any, *storage: Any) -> Any:
    """In a pattern: a bitsandbytes 4-bit product of a repacked weight, with the arguments of ``bitsandbytes::gemv_4bit``."""
    return _record("gemv_4bit", x, *storage)


def rows(x: Any, steps: Any) -> Any:
    """In a pattern: rows of x, whose leading dimensions were flattened into one, or not. ``steps`` says what chose and moved
    them before: each step is the name of a method and its arguments, and leaves the last dimension whole unless it is "other"."""
    return _record("rows", x, steps)


def picked(x: Any, labels: Any, how: Any, smoothing: Any) -> Any:
    """In a pattern: of each row of x the number at a label. ``how`` is "as given", "squeezed" or "counted":
    in the shape of the labels, or that without its last dimension, or, too, labels below 0 count from the end.
    ``smoothing`` is the share of the row's mean in it."""
    return _record("picked", x, labels, how, smoothing)


def repeated(x: Any, times: Any, dim: int) -> Any:
    """In a pattern: every entry along a dimension, counted from the front, repeated in place, however a model does it."""
    return _record("repeated", x, times, dim)


def attention(q: Any, k: Any, v: Any, *options: Any) -> Any:
    """In a pattern: ``scaled_dot_product_attention``, with the arguments of it in order."""
    return _record("scaled_dot_product_attention", q, k, v, *options)
