"""Triton's interpreter without what it does again and again: it works on a kernel's operations one by one, in Python, and most
of its time goes into finding out what it found out before. What an operation computes is left alone.

Imported where kernels are interpreted, and after that is chosen: Triton's own functions are defined when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

core: Any = tl.core


def quicken(patched: pytest.MonkeyPatch) -> None:
    """Replaces the slow parts."""
    builder: Any = interpreter.interpreter_builder
    # no device looks for integers that overflow, and none of so few elements can: a sixth of the kernels' tests
    patched.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    patched.setattr(interpreter, "_patch_lang", once_a_launch(interpreter._patch_lang))
    patched.setattr(interpreter, "_patch_attr", _replace_builtin)
    patched.setattr(interpreter, "_get_np_dtype", by_name(interpreter._get_np_dtype))
    patched.setattr(core.block_type, "__init__", shared(core.block_type.__init__))
    patched.setattr(core.tensor, "__init__", described(core.tensor.__init__))
    patched.setattr(core.block_type, "to_ir", lambda self, _: self)  # which made another of the same kind
    equal = core.dtype.__eq__
    patched.setattr(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    patched.setattr(TritonSemantic, "binary_op_type_checking_impl", unless_alike(check))
    patched.setattr(TritonSemantic, "broadcast_impl_value", remembered(broadcast))
    patched.setattr(interpreter, "_convert_float", shifted(interpreter._convert_float))
    patched.setattr(type(builder), "create_splat", of_plain_shape(type(builder).create_splat))


def once_a_launch(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What ``triton.language`` holds is replaced at a launch, and again whenever a kernel calls a function of its own: looking
    for it took a quarter of the kernels' tests. Here it is looked for once, and every launch puts in place what was found."""
    languages_of, changes_of = dict[Any, frozenset[int]](), dict[Any, list[Any]]()
    inside, scopes = set[int](), list[Any]()

    def languages(function: Any) -> frozenset[int]:
        if function not in languages_of:
            found = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is core)
            languages_of[function] = found
        return languages_of[function]

    def replaced(function: Any, wanted: frozenset[int]) -> Any:
        key = frozenset(inside), wanted
        if key not in changes_of:
            scope = look(function)
            changes_of[key] = [(*change, getattr(*change[:2])) for change in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for holder, name, before, new in changes_of[key]:
            scope._changes.append((holder, name, before))
            setattr(holder, name, new)
        return scope

    def put_back() -> None:
        inside.clear()
        while scopes:
            scopes.pop().restore()

    def once(function: Any) -> Any:
        wanted = languages(function)
        if not wanted <= inside:
            scopes.append(replaced(function, wanted))
            inside.update(wanted)
        return SimpleNamespace(restore=put_back)  # of which nothing is asked inside a kernel

    return once


def _replace_builtin(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """The interpreter's own goes through the arguments of every call to take one out that it puts in again."""
    semantic = interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    scope.set_attr(holder, name, call)


def by_name(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``make``, a function of a type, whose name says all of it: the table that it looks into was made at every call."""
    made: dict[str, Any] = {}

    def look(kind: Any) -> Any:
        if kind.name not in made:
            made[kind.name] = make(kind)
        return made[kind.name]

    return look


def shared(init: Callable[..., None]) -> Callable[..., None]:
    """Types of blocks of one shape and element, several of which every operation makes, hold the same attributes."""
    made: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[size.value if isinstance(size, core.constexpr) else size for size in shape])
        if key not in made:
            init(self, element_ty, shape)
            made[key] = self.__dict__
        self.__dict__ = made[key]

    return block_type


def described(init: Callable[..., None]) -> Callable[..., None]:
    """What a tensor says of its type is kept with the type."""

    def tensor(self: Any, handle: Any, type: Any) -> None:
        facts = type.__dict__.get("facts")
        if facts is None:
            init(self, handle, type)
            type.facts = {name: getattr(self, name) for name in ("shape", "numel", "dtype")}
        else:
            self.__dict__.update(facts)
            self.handle, self.type = handle, type

    return tensor


def unless_alike(check: Callable[..., Any]) -> Callable[..., Any]:
    """Operands of one type that is no pointer's need no common type, and a number that fits it takes on the other's; quotients,
    which have a type of their own in 16 bits, are left to Triton."""

    def binary_op_type_checking_impl(
        self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        if arithmetic_check and not div_or_mod:
            if not isinstance(lhs, core.tensor):
                if isinstance(rhs, core.tensor) and _fits(lhs, rhs.dtype):
                    return self.broadcast_impl_value(self.scalar_constant(lhs, rhs.dtype), rhs)
            elif not isinstance(rhs, core.tensor):
                if _fits(rhs, lhs.dtype):
                    return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, lhs.dtype))
            elif lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr():
                return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return binary_op_type_checking_impl


def _fits(number: Any, dtype: Any) -> bool:
    """Whether ``number`` is one that is a ``dtype`` beside a tensor of it; some that do not seem to may be."""
    kind = type(number)
    if dtype.is_standard_floating():
        return kind is float or (kind is int and 0 <= number < 2**31)
    if kind is not int or not dtype.is_int() or dtype.is_bool():
        return False
    return 0 <= number <= min(dtype.get_int_max_value(), 2**31 - 1)


def remembered(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Of which types operands of two types are, once they have one shape, is found out once."""
    known: dict[tuple[str, str], tuple[Any, Any]] = {}

    def laid(semantic: Any, x: Any, kind: Any) -> Any:
        if x.type.name == kind.name:
            return x
        builder = semantic.builder
        if x.type.is_block():
            return semantic.tensor(builder.create_broadcast(x.handle, kind.shape.values), kind)
        return semantic.tensor(builder.create_splat(kind, x.handle), kind)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        names = lhs.type.name, rhs.type.name
        kinds = known.get(names)
        if kinds is None:
            both = broadcast(self, lhs, rhs)
            known[names] = both[0].type, both[1].type
            return both
        return laid(self, lhs, kinds[0]), laid(self, rhs, kinds[1])

    return broadcast_impl_value


def of_plain_shape(splat: Callable[..., Any]) -> Callable[..., Any]:
    """A list tells NumPy a shape at once; Triton's tuple makes an object of every index it is asked for."""

    def create_splat(self: Any, kind: Any, x: Any) -> Any:
        return splat(self, SimpleNamespace(shape=kind.shape.values), x)

    return create_splat


def shifted(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Between bfloat16 and float32 the bits are shifted, by the interpreter with thirty operations that also serve other types.

    It still does where there are subnormal numbers, whose bits it changes.
    """

    def convert_float(x: Any, kind: Any, wanted: Any, rounding: Any) -> Any:
        if rounding is None and (kind.name, wanted.name) == ("bf16", "fp32"):
            bits = x.view(np.uint16)
            if not ((bits & 0x7FFF) - 1 < 0x7F).any():
                return bits.astype(np.uint32) << 16
        elif rounding is None and (kind.name, wanted.name) == ("fp32", "bf16"):
            bits = x.view(np.uint32)
            if not ((bits & 0x7FFFFFFF) - 1 < 0x7FFFFF).any():
                return (bits >> 16).astype(np.uint16)
        return convert(x, kind, wanted, rounding)

    return convert_float
