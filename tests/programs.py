"""Random straight-line programs with views and writes in place: what no pass and no rule may change the meaning of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .graphs import normal, record

SIZE = 4
"""Every value is a matrix of this size, so that any operation fits any value."""

FRESH: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: torch.sub(a, b),
    "mul": lambda a, b: a * b,
    "scaled": lambda a, b: a * 0.5,
    "relu": lambda a, b: torch.relu(a),
    "copy": lambda a, b: a.clone(),
    "mean": lambda a, b: a.mean(-1, keepdim=True) + b,
}
VIEWS: dict[str, Callable[[Any, Any], Any]] = {
    "transpose": lambda a, b: a.transpose(0, 1),
    "T": lambda a, b: a.T,
    "reshape": lambda a, b: a.reshape(SIZE, SIZE),
    "contiguous": lambda a, b: a.contiguous(),
    "double": lambda a, b: a.to(torch.float64),
    "slice": lambda a, b: a[:],
    "whole": lambda a, b: a[..., :SIZE],
    "idle": lambda a, b: torch.nn.functional.dropout(a, 0.0, True),
    "halves": lambda a, b: torch.cat((a[:, : SIZE // 2], a[:, SIZE // 2 :]), -1),
    "padded": lambda a, b: torch.cat((a, b[:, SIZE:]), -1),
    "parts": lambda a, b: torch.cat(b.transpose(0, 1).split(SIZE // 2, -1), 0).view(-1, SIZE),
    "chunk": lambda a, b: a.unsqueeze(0)[0],
}
WRITES: dict[str, Callable[[Any, Any], Any]] = {  # of something fresh: eager refuses operands that overlap
    "add_": lambda a, b: a.add_(b * 0.5),
    "mul_": lambda a, b: a.mul_(0.5),
    "relu_": lambda a, b: a.relu_(),
    "+=": lambda a, b: record(operator.iadd, a, b * 0.5),
    "-=": lambda a, b: record(operator.isub, a, b + 0.5),
    "setitem": lambda a, b: (record(operator.setitem, a, 0, 1.5), a)[1],
    "out": lambda a, b: torch.add(b * 0.5, 1.0, out=a),
    "copy_": lambda a, b: a.copy_(b * 0.5),
    "relu, inplace": lambda a, b: torch.nn.functional.relu(a, inplace=True),
}

Step = tuple[str, str, int, int]


def _steps() -> st.SearchStrategy[Step]:
    kinds = st.sampled_from(
        [("fresh", n) for n in FRESH] * 2
        + [("view", n) for n in VIEWS]
        + [("write", n) for n in WRITES]
        + [("again", "")] * 4
    )
    return st.tuples(kinds, st.integers(0, 7), st.integers(0, 7)).map(lambda s: (*s[0], s[1], s[2]))


programs = st.fixed_dictionaries(
    {
        "steps": st.lists(_steps(), min_size=3, max_size=9),
        "returned": st.lists(st.integers(0, 9), min_size=1, max_size=3),
    }
)


def function_of(program: dict[str, Any], pattern: Callable[[Any, Any, Any], Any] | None = None) -> Callable[..., Any]:
    """The function that runs ``program`` on three matrices; every third fresh value is that of ``pattern``."""
    tables = {"fresh": FRESH, "view": VIEWS, "write": WRITES}

    def run(x: Any, y: Any, z: Any) -> Any:
        values, done = [x, y, z], list[tuple[str, str, Any, Any]]()
        for count, (kind, name, i, j) in enumerate(program["steps"]):
            a, b = values[i % len(values)], values[j % len(values)]
            if kind == "again":
                kind, name, a, b = done[i % len(done)] if done else ("fresh", "add", a, b)
            done += [(kind, name, a, b)] * (kind != "write")
            if pattern is not None and kind == "fresh" and count % 3:
                values.append(pattern(a, b, values[-1]))
            else:
                values.append(tables[kind][name](a, b))
        return tuple(values[i % len(values)] for i in program["returned"])

    return run


def inputs() -> dict[str, Tensor]:
    """Three matrices that take no gradient, for programs overwrite them."""
    return {name: normal(i, SIZE, SIZE, dtype=torch.float64) for i, name in enumerate("xyz")}
