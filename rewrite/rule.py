"""A rewrite rule is an equation, a guard and a replacement."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import fx

from .errors import PatternError
from .graph import module_path, source
from .match import Match
from .pattern import Pattern, Variants, trace_patterns
from .report import Refusal


class RewriteRule:
    """Base of all rules. Subclass it with a name, a pattern, optionally a check, and a rewrite.

    Example:
        class FuseSquaredRelu(RewriteRule):
            \"\"\"relu(x)²  →  squared_relu(x)\"\"\"
            name = "squared_relu"

            def pattern(self, x):
                return torch.relu(x) ** 2

            def rewrite(self, m, x):
                return call(squared_relu, x)
    """

    name: ClassVar[str]
    variants: ClassVar[Variants] = {}
    """Spellings that no equation can unify, as data: pattern parameter → the values it takes."""
    absorb_cast: ClassVar[bool] = True
    """Whether a cast that alone reads the result belongs to it: the replacement then rounds once, to that dtype."""

    def pattern(self, *args: Any, **kwargs: Any) -> Any:
        """Ordinary torch code over wildcards. Casts need not be written: matching looks through them."""
        raise NotImplementedError

    def accepts(self, m: Match) -> bool:
        """What a pattern cannot say of its wildcards. False: this is no match at all, and nothing to report."""
        return True

    def check(self, m: Match) -> Refusal | None:
        """None where the rewrite is legal here, else the refusal that says why not. Must be pure."""
        return None

    def rewrite(self, m: Match, *args: Any, **kwargs: Any) -> Any:
        """The replacement, from proxies of what the wildcards matched; built with :func:`call`."""
        raise NotImplementedError

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """All variants, largest first. Rules that are made without arguments have those of their class, traced once."""
        if vars(self):
            return trace_patterns(self.pattern, self.variants)
        kind = type(self)
        if kind not in _TRACED:
            _TRACED[kind] = trace_patterns(self.pattern, self.variants)
        return _TRACED[kind]

    def refuse(self, m: Match, reason: str) -> Refusal:
        """The refusal of this rule at ``m``."""
        return Refusal(self.name, module_path(m.anchor), source(m.anchor), reason)


_TRACED: WeakKeyDictionary[type[RewriteRule], tuple[Pattern, ...]] = WeakKeyDictionary()


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Record ``function(*args, **kwargs)`` as one node of the graph that the arguments belong to."""
    proxy = next((a for a in _flat((*args, *kwargs.values())) if isinstance(a, fx.Proxy)), None)
    if proxy is None:
        raise PatternError(f"call({function.__name__}, ...) needs at least one graph value among its arguments")
    return proxy.tracer.create_proxy("call_function", function, args, kwargs)


def _flat(items: Any) -> list[Any]:
    return [x for i in items for x in (_flat(i) if isinstance(i, tuple | list) else (i,))]
