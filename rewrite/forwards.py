"""Replaced forwards, as attributes of the modules that they serve.

Pickled or copied, one turns into the class's own forward bound to the copy, so that ``copy.deepcopy`` and ``torch.save`` yield a
model that works, unoptimized, with or without weft installed.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import deepcopy_to_fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from .errors import CaptureError
from .kinds import LIKE, OTHER, Kind, fits, form_of, kind_of, made_like, tensors_of


class InstalledForward:
    """A replaced forward. Its signature is the original's, which Trainer and ``generate`` inspect."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], original: Callable[..., Any]) -> None:
        self.module = module
        self.run = run
        self.original = original
        self.previous = vars(module).get("forward")
        self.captures = True
        update_wrapper(self, original, updated=())
        self.__signature__ = inspect.signature(original)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @property
    def shown(self) -> Any:
        """What stands in the module."""
        return self

    def remove(self) -> None:
        """Give the module its former forward back; a forward that was put around this one later stays, and finds it there."""
        self.run = self.original
        held = vars(self.module)
        if held.get("forward") is self.shown and self.previous is not None:
            held["forward"] = self.previous
        elif held.get("forward") is self.shown:
            del held["forward"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduced(self.module, self.previous)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copied(self, self.module, self.previous, memo)


def _reduced(module: nn.Module, previous: Any) -> tuple[Any, ...]:
    # the module that is being unpickled has no attributes yet: this finds the forward of its class
    return (getattr, (module, "forward")) if previous is None else (_same, (previous,))


def _copied(forward: Any, module: nn.Module, previous: Any, memo: dict[int, Any]) -> Any:
    copied = memo.get(id(module))
    if copied is None:
        return forward
    return copied.forward if previous is None else copy.deepcopy(previous, memo)


def _same(forward: Any) -> Any:
    return forward


class InlineCall:
    """What stands in a module for its :class:`InlineForward`, and in the graphs that call it.

    Dynamo keeps a graph in the globals of the forward that it captured for as long as the code of that forward is there. A graph
    that held a block, and by it the model and that code, would keep all three for good: this holds neither.
    """

    def __init__(self, forward: InlineForward) -> None:
        update_wrapper(self, forward.original, updated=())
        vars(self).pop("__wrapped__")  # holds the module
        self.__signature__ = forward.__signature__
        # The code of a graph looks up by name what says that it comes from torch, as the forward of nn.Sequential does.
        self.__module__ = __name__
        self.forward, self.module, self.previous = weakref.ref(forward), weakref.ref(forward.module), forward.previous
        torch._dynamo.allow_in_graph(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward()
        return (self._plain() if forward is None else forward.call)(*args, **kwargs)

    def _plain(self) -> Callable[..., Any]:
        """The former forward: of a block that somebody keeps of a model that is gone, or of one that was put around this."""
        return self.previous or types.MethodType(type(self._module()).forward, self._module())

    def _module(self) -> nn.Module:
        module = self.module()
        if module is None:
            raise ReferenceError("the module whose forward this is, is gone")
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduced(self._module(), self.previous)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copied(self, self._module(), self.previous, memo)


class InlineForward(InstalledForward):
    """A replaced forward that is one call in any graph that Dynamo captures around it.

    For Dynamo the result is what such a call returned before: a tensor like the first tensor argument, or a tuple of such, of
    single numbers and of arguments. Every call checks that it was.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], original: Callable[..., Any]) -> None:
        super().__init__(module, run, original)
        self.kinds: dict[Any, Kind] = {}
        self._shown = InlineCall(self)

    @property
    def shown(self) -> InlineCall:
        """What stands in the module, and does not hold it."""
        return self._shown

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs, or says what it would return where a graph around it is being captured."""
        tensors = tensors_of(args, kwargs)
        call = (self.module.training, torch.is_grad_enabled(), form_of((args, kwargs)))
        if tensors and isinstance(tensors[0], FakeTensor):
            return made_like(self._expected(call) or self._foreseen(call, tensors[0], args, kwargs), tensors)
        result = self.run(*args, **kwargs)
        if self.run is self.original:
            return result
        kind = self._expected(call)
        if kind in (None, OTHER):
            kind = kind_of(result, tensors)
        elif not fits(kind, result, tensors):
            raise CaptureError(
                f"{type(self.module).__name__} returned {'a tensor' if isinstance(result, Tensor) else 'something'} unlike its "
                "input, which it did not when it was captured: call undo() and pass optimize() an example of this call"
            )
        self.kinds[call] = kind
        return result

    def keeps_type(self) -> bool:
        """Whether it ran, and returned what Dynamo can be told of each time."""
        return bool(self.kinds) and OTHER not in self.kinds.values()

    def _expected(self, call: Any) -> Kind | None:
        """What such a call returned; a block that returns plain tensors is taken to do so always."""
        return self.kinds.get(call) or (LIKE if set(self.kinds.values()) == {LIKE} else None)

    def _foreseen(self, call: Any, given: FakeTensor, args: Any, kwargs: Any) -> Kind:
        """What a call of a new form will return, such as the first one for evaluation: found with fake parameters."""
        with unset_fake_temporarily():  # the copy reads real parameters
            module = deepcopy_to_fake_tensor(self.module, given.fake_mode)
        kind = kind_of(type(module).forward(module, *args, **kwargs), tensors_of(args, kwargs))
        if kind == OTHER:
            raise NotImplementedError(f"{type(self.module).__name__} returns what no graph around it can hold")
        self.kinds[call] = kind
        return kind
