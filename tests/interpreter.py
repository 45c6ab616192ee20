"""Speed up Triton's interpreter, which spends nearly all of its time on the types of its values, not on their numbers."""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np


class _Lasting:
    """A patch that stays."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """Change the interpreter for the life of this process, none of which both interprets and compiles; no number changes."""
    _patch_the_language_once()
    _look_up_numpy_types_once()
    _check_no_overflow()
    _remember_blocks()
    _unwrap_quickly()


def _patch_the_language_once() -> None:
    """Let the language be patched once.

    The interpreter patches and restores it at every launch, and patches it again at every call of a device function.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    modules = (language, language.core)
    patched = set[frozenset[str]]()
    known = set[Callable[..., Any]]()
    lasting = _Lasting()

    def patch_first(function: Callable[..., Any]) -> _Lasting:
        if function not in known:
            known.add(function)
            values = list(function.__globals__.values())
            seen = frozenset(m.__name__ for m in modules if any(value is m for value in values))
            if seen not in patched:
                patched.add(seen)
                patch(function)
        return lasting

    interpreter._patch_lang = patch_first


def _look_up_numpy_types_once() -> None:
    """Remember NumPy's type of each type of the language."""
    from triton import language
    from triton.runtime import interpreter

    look_up = functools.cache(interpreter._get_np_dtype)

    def numpy_type(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, language.block_type) else kind
        if isinstance(element, language.pointer_type):  # which has no hash
            return np.dtype(np.uint64)
        return look_up(element)

    interpreter._get_np_dtype = numpy_type


def _check_no_overflow() -> None:
    """Leave out the second sum or product in 64 bits of each integer one: without ``debug`` its check asserts nothing."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    assert not options.debug
    interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _remember_blocks() -> None:
    """Make what types and tensors hold of a shape once, and share it: every operation makes several of each."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    equal, broadcast = core.tuple.__eq__, TritonSemantic.broadcast_impl_value
    # One object for each, whatever the elements.
    shapes: dict[tuple[int, ...], Any] = {}
    # By element type and shape. What is kept holds the element type, so that no other gets its place.
    of_types: dict[tuple[int, ...], dict[str, Any]] = {}
    # By the place of a type's shape, which is held too.
    of_tensors: dict[int, tuple[object, dict[str, Any]]] = {}

    def remembered_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *[s.value if isinstance(s, core.constexpr) else s for s in shape])
        if key not in of_types:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)
            of_types[key] = dict(vars(self))
        vars(self).update(of_types[key])

    def remembered_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = vars(type).get("shape")
        if id(shape) not in of_tensors:
            make_tensor(self, handle, type)
            own = {
                name: vars(self)[name] for name in vars(self).keys() - {"handle", "type", "dtype"}
            }
            of_tensors[id(shape)] = (shape, own)
        vars(self).update(of_tensors[id(shape)][1], handle=handle, type=type, dtype=type.scalar)

    def are_equal(self: Any, other: Any) -> Any:
        return core.constexpr(True) if other is self else equal(self, other)

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        is_like = lhs.shape is rhs.shape and lhs.type.is_block()
        return (lhs, rhs) if is_like else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = remembered_type, remembered_tensor
    core.tuple.__eq__, TritonSemantic.broadcast_impl_value = are_equal, broadcast_others


def _unwrap_quickly() -> None:
    """Ask once for each class whether its values can be or hold a constant of compilation."""
    from triton.language import core

    unwrap = core._unwrap_if_constexpr
    holders = (builtins.list, builtins.tuple, core.tuple, core.constexpr)

    @functools.cache
    def is_holder(kind: type) -> bool:
        return issubclass(kind, holders)

    core._unwrap_if_constexpr = lambda value: unwrap(value) if is_holder(type(value)) else value
