"""Strategies that are made once. Hypothesis looks a new one through before it draws from it, which takes longer than to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Concatenate, ParamSpec, TypeVar

from hypothesis import strategies as st

P, R, T = ParamSpec("P"), TypeVar("R"), TypeVar("T")

_choices: dict[str, st.SearchStrategy[Any]] = {}


def drawn(definition: Callable[Concatenate[st.DrawFn, P], R]) -> Callable[P, st.SearchStrategy[R]]:
    """``st.composite``, whose result for the same arguments is the same strategy."""
    kept: Any = lru_cache(maxsize=None, typed=True)
    return kept(st.composite(definition))


def among(values: Sequence[T]) -> st.SearchStrategy[T]:
    """``st.sampled_from``; what is written alike is the same strategy (1, 1.0 and True are equal, but not written alike)."""
    written = repr(values)
    if written not in _choices:
        _choices[written] = st.sampled_from(values)
    return _choices[written]


@cache
def maybe(strategy: st.SearchStrategy[T]) -> st.SearchStrategy[T | None]:
    """What ``strategy`` draws, or None."""
    return st.one_of(st.none(), strategy)
