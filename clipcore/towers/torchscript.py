"""Weights of a TorchScript archive, such as OpenAI's released CLIP files, read without TorchScript.

``torch.jit.load`` runs code of the archive: each module's ``__setstate__``, which may write files or never return. Here the
archive is only a zip file of records. ``data.pkl`` describes a tree of objects as a pickle, and only the opcodes that
TorchScript writes are accepted. An object becomes a ``_Record``, a named function is never looked up, and a tensor is built
from bytes of the archive after its shape was checked against them. ``code/`` is read only for the names of parameters and
buffers.

Source: torch/csrc/jit/serialization (export.cpp, pickler.cpp) and docs/serialization.md of PyTorch.
"""

from __future__ import annotations

import errno
import math
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Several times the values of the largest CLIP. They bound the cost of a hostile archive, besides its tensors, to about a
# second and 256 MB.
_MAX_TREE_BYTES = 8 << 20
_MAX_OPCODES = 500_000
_MAX_ATTRIBUTES = 100_000
_MAX_DEPTH = 64
_MAX_NAME_LENGTH = 1_024
# Axes of a tensor, as in most of torch's own kernels.
_MAX_DIMENSIONS = 64
# Total size of the tensors as a multiple of the archive's; several tensors may share a storage.
_MAX_COPIES = 4

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


# Lines of a class's code: its head, its members, and the function that restores it from data.pkl.
_DECLARATION = re.compile(
    r"^class (?P<class>\w+)\((?P<base>\w*)\)|^  __(?:parameters|buffers)__ = \[(?P<names>.*)\]"
    r"|^  def __setstate__\(",
    re.MULTILINE,
)


class TorchScriptError(ValueError):
    """The archive is damaged, or holds something that weights do not need; the message names it in one line.

    Args:
        message: may quote names from the archive, which are not trusted.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:300]))


@dataclass(eq=False, repr=False)
class _Record:
    """An object of a class in the archive, or the result of a function that it names; neither is ever created or called.

    Attributes:
        kind: the full name of the class or function.
        content: attributes by name, or the arguments of the function.
    """

    kind: str
    content: object = None


@dataclass(frozen=True)
class _Name:
    """A class or function that the archive names."""

    name: str


class _Mark:
    """The start of a group of values on the stack."""


@dataclass
class _Members:
    """The declarations in the code of a module's class.

    Attributes:
        tensors: names of its parameters and buffers.
        has_own_form: whether its attributes are stored in a format of its own code, not by name.
    """

    tensors: list[str] = field(default_factory=list)
    has_own_form: bool = False


def is_torchscript(path: Path) -> bool:
    """Return whether the file is a TorchScript archive; raise OSError if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, RuntimeError):
        return False
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EISDIR, errno.EINVAL):
            return False
        raise


@dataclass(frozen=True)
class TorchScriptWeights:
    """The weights and classes of an archive's modules.

    Attributes:
        tensors: parameters and buffers by name, on the CPU, as ``torch.jit.load(path).state_dict()`` names them.
        classes: the names of the modules' classes, without their packages.
    """

    tensors: dict[str, Tensor]
    classes: frozenset[str]


def read_torchscript(path: Path) -> TorchScriptWeights:
    """Return the weights of an archive.

    No code of the archive runs, and no object of its classes is created. Each tensor has its own memory.

    Raises:
        TorchScriptError: the archive is damaged, compressed, older than torch 1.4's, or holds no tensors by name.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            size = path.stat().st_size
            archive = _Archive(file, size)
            root = _read_tree(archive.read("data.pkl", _MAX_TREE_BYTES), archive.storage)
            kinds = set[str]()
            tensors = dict(_tensors(root, archive.classes(), _MAX_COPIES * size, kinds))
            if not tensors:
                raise TorchScriptError("it holds no weights")
            return TorchScriptWeights(tensors, frozenset(k.rpartition(".")[2] for k in kinds))
    except TorchScriptError:
        raise
    except OSError as error:
        # The zip directory names a position beyond any file.
        if error.errno == errno.EINVAL:
            raise TorchScriptError("its records lie outside of it") from error
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise TorchScriptError(str(error) or type(error).__name__) from error


class _Archive:
    """The records of an archive.

    Args:
        file: the open archive.
        size: bytes of the file; all records together are no larger.
    """

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self._file = file
        self._infos = {info.filename: info for info in file.infolist()}
        if len(self._infos) != len(file.infolist()):
            raise TorchScriptError("it has two records of one name")
        roots = {name.partition("/")[0] for name in self._infos}
        if len(roots) != 1:
            raise TorchScriptError("its records lie in several folders")
        (self._root,) = roots

        # TorchScript compresses only code. A compressed record of weights could be a thousand times as large as its file.
        stored_bytes = 0
        for name, info in zip(self._names(), self._infos.values(), strict=True):
            stored_bytes += info.compress_size
            is_code = name.startswith("code/") and info.compress_type == zipfile.ZIP_DEFLATED
            if info.compress_type != zipfile.ZIP_STORED and not is_code:
                raise TorchScriptError(f"its record {name} is compressed")
        if stored_bytes > size:
            raise TorchScriptError("its records overlap")
        if "byteorder" in self._names() and self.read("byteorder", 16) != b"little":
            raise TorchScriptError("it was written on a big-endian machine")

        self._storages: dict[str, Tensor] = {}

    def _names(self) -> Iterator[str]:
        """Yield the names of the records, inside their folder."""
        for name in self._infos:
            yield name.removeprefix(f"{self._root}/")

    def read(self, name: str, most_bytes: int | None = None) -> bytes:
        """Return a record; zipfile verifies its checksum."""
        info = self._infos.get(f"{self._root}/{name}")
        if info is None:
            raise TorchScriptError(f"it has no record {name}")
        if most_bytes is not None and info.file_size > most_bytes:
            raise TorchScriptError(f"its record {name} has {info.file_size:,} bytes")
        with self._file.open(info) as record:
            # Without a limit, all of it would be inflated, whatever size the directory states.
            return record.read(info.file_size)

    def storage(self, dtype: torch.dtype, key: str, num_elements: int) -> Tensor:
        """Return the elements [num_elements] that several tensors may share, read once."""
        if key not in self._storages:
            content = bytearray(self.read(f"data/{key}"))
            if len(content) != num_elements * dtype.itemsize:
                raise TorchScriptError(f"its record data/{key} has {len(content):,} bytes")
            self._storages[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        stored = self._storages[key]
        if (stored.dtype, stored.numel()) != (dtype, num_elements):
            raise TorchScriptError(f"its record data/{key} is of two types")
        return stored

    def classes(self) -> dict[str, _Members]:
        """Return the code's declarations of each class, by the class's full name."""
        classes: dict[str, _Members] = {}
        left_bytes = _MAX_TREE_BYTES
        for name in self._names():
            if not (name.startswith("code/") and name.endswith(".py")):
                continue
            module = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
            members = _Members()
            content = self.read(name, left_bytes)
            left_bytes -= len(content)
            for declared in _DECLARATION.finditer(content.decode("utf-8", "replace")):
                if declared["class"] is not None:
                    members = _Members()
                    if declared["base"] == "Module":
                        members = classes.setdefault(f"{module}.{declared['class']}", members)
                elif declared["names"] is not None:
                    members.tensors += re.findall(r'"([^"]+)"', declared["names"])
                else:
                    members.has_own_form = True
        return classes


def _read_tree(pickled: bytes, storage: Callable[[torch.dtype, str, int], Tensor]) -> object:
    """Return the object that a pickle describes, in dicts, lists, tuples, ``_Record``s and tensors.

    Args:
        pickled: the output of TorchScript's pickler. Any opcode that it does not write is refused.
        storage: maps (dtype, key, number of elements) to the elements.
    """
    stack: list[Any] = []
    memo: dict[int, object] = {}

    def pop_group() -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        group: list[Any] = []
        while not isinstance(value := stack.pop(), _Mark):
            group.append(value)
        return group[::-1]

    def pop(number: int) -> list[Any]:
        """Pop a number of values."""
        if len(stack) < number:
            raise IndexError
        values = stack[len(stack) - number :]
        del stack[len(stack) - number :]
        return values

    try:
        argument: Any
        for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            if number >= _MAX_OPCODES:
                raise TorchScriptError("its data.pkl makes too many objects")
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    (root,) = stack
                    return root
                case "MARK":
                    stack.append(_Mark())
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(pop(int(opcode.name[-1]))))
                case "TUPLE":
                    stack.append(tuple(pop_group()))
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    (value,) = pop(1)
                    _of_type(list, stack[-1]).append(value)
                case "APPENDS":
                    values = pop_group()
                    _of_type(list, stack[-1]).extend(values)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    key, value = pop(2)
                    _of_type(dict, stack[-1])[_key(key)] = value
                case "SETITEMS":
                    values = pop_group()
                    pairs = zip(map(_key, values[::2]), values[1::2], strict=True)
                    _of_type(dict, stack[-1]).update(pairs)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    if len(argument) > _MAX_NAME_LENGTH:
                        raise TorchScriptError("its data.pkl names a class of endless name")
                    stack.append(_Name(argument.replace(" ", ".")))
                case "NEWOBJ":
                    kind, _ = pop(2)
                    stack.append(_Record(_of_type(_Name, kind).name))
                case "BUILD":
                    (content,) = pop(1)
                    _of_type(_Record, stack[-1]).content = content
                case "REDUCE":
                    function, arguments = pop(2)
                    stack.append(_result(_of_type(_Name, function).name, arguments))
                case "BINPERSID":
                    (described,) = pop(1)
                    kind, dtype_name, key, _, num_elements = described
                    dtype = _DTYPES.get(_of_type(_Name, dtype_name).name)
                    if kind != "storage" or dtype is None:
                        raise TorchScriptError(f"it stores elements as {dtype_name.name}")
                    key, num_elements = _of_type(str, key), _of_type(int, num_elements)
                    stack.append(storage(dtype, key, num_elements))
                case other:
                    raise TorchScriptError(f"its data.pkl has a {other}, which no weights need")
    except TorchScriptError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise TorchScriptError("its data.pkl is damaged") from error
    raise TorchScriptError("its data.pkl is cut short")


def _of_type(kind: type[Any], value: object) -> Any:
    """Return the value if it has the given type; raise otherwise."""
    if type(value) is not kind:
        raise TypeError(type(value).__name__)
    return value


def _key(value: object) -> object:
    """Return the value if TorchScript can use it as a key; to hash nested tuples could take forever."""
    if not isinstance(value, str | int | float | Tensor | _Record):
        raise TypeError(type(value).__name__)
    return value


def _result(function: str, arguments: tuple[Any, ...]) -> object:
    """Return the object that a function named by TorchScript's pickler would make."""
    if function == "torch._utils._rebuild_tensor_v2":
        if any(_of_type(tuple, arguments)[6:]):
            raise TorchScriptError("a tensor of it is to be negated or conjugated")
        return _tensor(*arguments[:4])
    if function == "collections.OrderedDict" and not arguments:
        return {}
    # Typed lists, and values whose type a pickle cannot express, are wrapped in a named function.
    name = function.removeprefix("torch.jit._pickle.")
    if name != function and (name.startswith("build_") or name == "restore_type_tag"):
        return arguments[0]
    return _Record(function, arguments)


def _tensor(
    stored: object, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
    """Return a tensor over a part of a storage, after checking that the storage is large enough.

    Args:
        stored: elements [n].
        offset: index of the tensor's first element.
        shape, strides: the tensor's shape, and its strides in elements.
    """
    if (
        not isinstance(stored, Tensor)
        or len(_of_type(tuple, shape)) != len(_of_type(tuple, strides))
        or len(shape) > _MAX_DIMENSIONS
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *shape, *strides))
    ):
        raise TypeError("not a tensor")

    num_elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # A stride of 0 would expand one element to terabytes.
    if num_elements > stored.numel() or (num_elements and last >= stored.numel()):
        raise TorchScriptError("a tensor of it is larger than its storage")
    return stored.as_strided(shape, strides, offset) if num_elements else stored.new_empty(shape)


def _tensors(
    root: object, classes: Mapping[str, _Members], most_bytes: int, kinds: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a tree of modules with their names, a module's own before its children's.

    Args:
        root: the outermost module.
        classes: the code's declarations, by the full name of the class.
        most_bytes: limit for all tensors together.
        kinds: receives the full name of each module's class.
    """
    number, num_bytes, num_letters = 0, 0, 0
    handed_over = set[int]()
    pending: list[tuple[str, object, int]] = [("", root, 0)]
    while pending:
        prefix, module, depth = pending.pop()
        # An attribute may be an object of the archive but not a module, such as a member of an enumeration.
        if not isinstance(module, _Record) or (members := classes.get(module.kind)) is None:
            continue
        kinds.add(module.kind)
        if not isinstance(module.content, dict) or members.has_own_form:
            raise TorchScriptError(
                f"its module {prefix.rstrip('.') or module.kind} stores its weights in a format of its own, which only "
                "its own code could read"
            )

        # A tree that refers to one part twice at every level would grow exponentially.
        number += 1 + len(members.tensors) + len(module.content)
        if number > _MAX_ATTRIBUTES or depth > _MAX_DEPTH or len(prefix) > _MAX_NAME_LENGTH:
            raise TorchScriptError("its modules contain each other")
        for name in members.tensors:
            value = module.content.get(name)
            if value is None:  # such as the bias of a layer without one
                continue
            if not isinstance(value, Tensor):
                raise TorchScriptError(f"its {prefix}{name} is not a dense tensor")
            num_bytes += value.nbytes
            num_letters += len(prefix) + len(name)
            if num_bytes > most_bytes or num_letters > _MAX_TREE_BYTES:
                raise TorchScriptError("its tensors are larger than its records")
            # A storage of one tensor becomes that tensor's memory; tensors that share a storage get copies.
            storage = value.untyped_storage()
            is_alone = storage.nbytes() == value.nbytes and storage.data_ptr() not in handed_over
            handed_over.add(storage.data_ptr())
            yield f"{prefix}{name}", value if is_alone else value.clone()

        children = [(n, value) for n, value in module.content.items() if isinstance(value, _Record)]
        for name, child in reversed(children):
            pending.append((f"{prefix}{name}.", child, depth + 1))
