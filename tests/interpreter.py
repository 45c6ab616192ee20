"""Speed up Triton's interpreter, which searches its whole language at every launch and every call of a device function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


class _Lasting:
    """A patch that stays."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """Let the language be patched for the interpreter once, and stay so for the life of this process.

    The interpreter patches and restores it at every launch, and patches it again at every call of a device function. No
    process of the tests both interprets and compiles. NumPy's type of a type of the language is looked up once.
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
    look_up = functools.cache(interpreter._get_np_dtype)

    def numpy_type(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, language.block_type) else kind
        if isinstance(element, language.pointer_type):  # which has no hash
            return np.dtype(np.uint64)
        return look_up(element)

    interpreter._get_np_dtype = numpy_type
