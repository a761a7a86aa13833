"""How weft's operators are registered with torch: a decorator over a typed function, as :func:`torch.library.custom_op`.

    @operator("weft::scale")
    def scale(x: Tensor, factor: float) -> Tensor: ...

    @scale.register_fake
    def _(x: Tensor, factor: float) -> Tensor: ...

    scale.register_autograd(backward, setup_context=setup_context)

``custom_op`` looks at every call whether an output aliases an input, shuts Dynamo out, and takes lists apart in Python four
times: 60 to 200 microseconds on the host, more than the kernel takes in decoding. Here a call costs what it must. What
``custom_op`` checks at every call, :data:`CHECKED` has the tests check.

Two ways lead to the function. The dispatcher's is taken wherever somebody watches: a compiler, a fake tensor, a mode, a
transform, a profiler. Where nobody does, a call goes to the function at once, or to the ``autograd.Function`` around it, both
below autograd as behind the dispatcher. A graph that is run, and names the operator, finds this way as the operator's attribute
``direct``; and what may write results over operands that it no longer needs, as ``overwriting``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from weft.errors import WeftError

from .dispatch import records

P = ParamSpec("P")
R = TypeVar("R")
Fake = TypeVar("Fake", bound=Callable[..., Any])

LIBRARY = torch.library.Library("weft", "FRAGMENT")
CHECKED = False
"""Whether every call makes sure that no output aliases an input or another output, which torch takes for granted."""

_PLAIN = (Tensor, torch.nn.Parameter)
_UNSEEN = getattr(Tensor, "__torch_dispatch__")  # noqa: B009 (no type checker can bind it)


class TwiceDifferentiatedError(WeftError, RuntimeError):
    """A gradient of a gradient was asked for, and the operators that compute gradients have none."""


def operator(name: str, adds: str | None = None) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Registers the decorated function as ``name``, ``weft::`` and a name of its own.

    The function changes none of its arguments, returns a tensor, a tuple or a list of tensors that share no memory with
    them, and has positional arguments alone, none with a default.

    Args:
        adds: the argument, a tensor or None, that is added to the first result. A graph that is run, and adds to that result
            itself, finds its position as the operator's attribute ``adds``.
    """

    def register(body: Callable[P, R]) -> Operator[P, R]:
        made = Operator(name, body)
        made.overload.adds = None if adds is None else [a.name for a in made.overload._schema.arguments].index(adds)
        return made

    return register


def most_at_once(bytes: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Says of the decorated function, whose first arguments are x and a weight, that it takes the product of both in parts: its
    attribute ``most_at_once`` is the most bytes of one, 0 where it takes none unless somebody reads it."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        setattr(function, "most_at_once", bytes)  # noqa: B010 (no type checker knows the attribute)
        return function

    return mark


class Operator(Generic[P, R]):
    """An operator. ``overload`` is what torch knows it as."""

    def __init__(self, name: str, body: Callable[P, R]) -> None:
        short = name.removeprefix("weft::")
        LIBRARY.define(short + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        self.name, self.body = name, body
        self.overload: Any = getattr(torch.ops.weft, short).default
        self.lists = [i for i, a in enumerate(self.overload._schema.arguments) if str(a.type) == "List[Tensor]"]
        self.returns_list = str(self.overload._schema.returns[0].type) == "List[Tensor]"
        self.backward: Callable[..., Any] | None = None
        self.setup_context: Callable[..., None] | None = None
        self.node = type(short, (_Node,), {})
        self.overload.direct = self._named(short)
        LIBRARY.impl(short, self._checked, "CompositeExplicitAutograd")
        LIBRARY.impl(short, self._below_dispatcher, "Autograd", with_keyset=True)
        self.__doc__ = body.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the operator."""
        if kwargs:
            raise TypeError(f"{self.name} takes positional arguments alone, not {', '.join(kwargs)}")
        if torch.compiler.is_compiling() or _watched():
            return self.overload(*args)
        bare = _bare(args)
        return self.overload(*args) if bare is None else self._run(self._checked, bare)

    def _named(self, name: str) -> Callable[..., Any]:
        """This as a function, which generated code can name."""

        def call(*args: Any) -> Any:
            return self(*args)  # pyright: ignore[reportCallIssue]

        call.__name__ = call.__qualname__ = name
        return call

    def register_fake(self, fake: Fake) -> Fake:
        """Registers what the operator returns for tensors without data."""
        torch.library.register_fake(self.name, fake, lib=LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Registers the gradients, as :func:`torch.library.register_autograd` does."""
        self.backward, self.setup_context = backward, setup_context

    def register_overwriting(self, *arguments: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Registers what computes the same, and may write its results where these arguments, tensors, lie.

        A graph that is run finds it as the operator's attribute ``overwriting``, and the arguments' positions as ``overwritten``.
        It calls it in a backward, of operands that nobody else has; where that backward may be run again, or is being recorded
        to be, the operator itself is called.
        """

        def register(body: Callable[..., R]) -> Callable[..., R]:
            def call(*args: Any) -> Any:
                bare = None if _runs_again() or _watched() else _bare(args)
                return self(*args) if bare is None else self._run(body, bare)  # pyright: ignore[reportCallIssue]

            names = [a.name for a in self.overload._schema.arguments]
            self.overload.overwritten = tuple(map(names.index, arguments))
            self.overload.overwriting = call
            call.__name__ = call.__qualname__ = self.name.removeprefix("weft::") + "_overwriting"
            return body

        return register

    def _below_dispatcher(self, keyset: Any, *args: Any) -> Any:
        """The kernel of the dispatch key Autograd."""
        return self._run(partial(self.overload.redispatch, keyset & torch._C._after_autograd_keyset), args)

    def _run(self, call: Callable[..., Any], args: Sequence[Any]) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(args):
            lengths = [len(args[i]) for i in self.lists]
            flat = args if not lengths else self.flatten(args)
            result: Any = self.node.apply(self, call, lengths, *flat)
            return list(result) if self.returns_list else result
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    def _checked(self, *args: Any) -> Any:
        result = self.body(*args)  # pyright: ignore[reportCallIssue]
        if CHECKED:
            outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
            if torch._C._any_output_is_alias_to_input_or_output(args, {}, outputs):
                raise RuntimeError(f"an output of {self.name} aliases an input or another output")
        return result

    def flatten(self, args: Sequence[Any]) -> list[Any]:
        """``args`` with the tensors of its lists in their place."""
        flat: list[Any] = []
        for i, argument in enumerate(args):
            flat += argument if i in self.lists else (argument,)
        return flat

    def group(self, flat: Sequence[Any], lengths: list[int]) -> tuple[Any, ...]:
        """Arguments, or what belongs to each of them, with those of a list of tensors in a list again."""
        if not lengths:
            return tuple(flat)
        args, at, before = [], 0, 0
        for i, length in zip(self.lists, lengths, strict=True):
            args += flat[at : at + i - before]
            at += i - before
            args.append(list(flat[at : at + length]))
            at, before = at + length, i + 1
        return *args, *flat[at:]


class _Node(torch.autograd.Function):
    """The node that operator ``me`` leaves for the backward; ``lengths`` are those of its lists of tensors."""

    @staticmethod
    def forward(ctx: Any, me: Operator[..., Any], call: Callable[..., Any], lengths: list[int], *flat: Any) -> Any:
        ctx.operator, ctx.lengths = me, lengths
        args = me.group(flat, lengths)
        ctx.needs_input_grad = me.group(ctx.needs_input_grad[3:], lengths)
        with torch._C._AutoDispatchBelowAutograd():
            result = call(*args)
            if me.setup_context is not None:
                me.setup_context(ctx, args, result)
        return tuple(result) if me.returns_list else result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        me = ctx.operator
        if me.backward is None:
            raise TwiceDifferentiatedError(
                f"{me.name} has no gradient, and a gradient that was taken with create_graph=True is being differentiated "
                "through it: call undo(model) before gradients of its gradients are taken"
            )
        found = me.backward(ctx, list(grads)) if me.returns_list else me.backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        return None, None, None, *(me.flatten(found) if ctx.lengths else found)


def _runs_again() -> bool:
    """Whether the backward that is running may run again on what was saved for it; also where none is running."""
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return records() or autograd._get_current_graph_task_keep_graph()


def _watched() -> bool:
    """Whether anybody expects to see operators pass through the dispatcher."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or profiler._is_profiler_enabled
    )


def _bare(args: Sequence[Any]) -> list[Any] | None:
    """``args`` with each tensor as a plain one; None if one means more than the numbers that it stores.

    A subclass that only overrides ``__torch_function__``, as a packed weight of bitsandbytes does, would send every
    question for a shape through Python.
    """
    bare: list[Any] = []
    for argument in args:
        kind = type(argument)
        if kind in _PLAIN:
            bare.append(argument)
        elif isinstance(argument, list | tuple):
            within = _bare(argument)
            if within is None:
                return None
            bare.append(within)
        elif not hasattr(kind, "__torch_function__"):
            bare.append(argument)
        elif getattr(kind, "__torch_dispatch__", None) is _UNSEEN:
            with torch._C.DisableTorchFunctionSubclass():
                bare.append(argument.as_subclass(Tensor))
        else:
            return None
    return bare


def _any_requires_grad(args: Sequence[Any]) -> bool:
    """Whether one of ``args``, or of the lists among them, requires a gradient."""
    return torch._C._any_requires_grad(*args)
