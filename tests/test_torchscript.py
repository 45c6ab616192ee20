"""TorchScript archives: the same bits as TorchScript reads, no code of theirs run, hostile ones refused in little memory.

Hostile archives are written opcode by opcode, and record by record, because no library writes them.
"""

from __future__ import annotations

import bz2
import enum
import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import clipcore.towers.torchscript
from clipcore.checkpoint import CheckpointError
from clipcore.towers.torchscript import TorchScriptError, is_torchscript, read_torchscript
from clipcore.towers.weights import load_state_dict_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # TorchScript is deprecated
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

# Of Python's own memory, while an archive of a few kilobytes is refused.
MOST_BYTES = 32 << 20

# ---------------------------------------------------------------------------------------------------------------------
# Honest archives
# ---------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


class Color(enum.Enum):
    RED = 1


class Everything(nn.Module):
    """Has parameters, buffers and attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.twin = self.blocks[1]
        self.batch_norm = nn.BatchNorm1d(8)
        self.scales = nn.ParameterList([torch.randn(2), torch.randn(3)])
        self.register_buffer("hidden", torch.arange(3.0), persistent=False)
        self.register_buffer("coarse", torch.randn(5).bfloat16())
        self.register_buffer("number", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", None)
        self.narrow = nn.Parameter(torch.randn(3, 4).half())
        self.special = nn.Parameter(torch.tensor([-0.0, torch.nan, torch.inf]))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        both = torch.randn(10)
        self.first = nn.Parameter(both[:6].view(2, 3))
        self.second = nn.Parameter(both[4:])
        self.absent = nn.Parameter(torch.zeros(1))
        self.absent = None

        self.loose = torch.randn(3)
        self.table = {"a": 1}
        self.devices = {torch.device("cpu"): 1}
        self.sizes = [1, 2]
        self.tensors = [torch.randn(2)]
        self.pair = (1, "b")
        self.color = Color.RED

    def forward(self, x: Tensor) -> Tensor:
        x = self.twin(self.blocks(x))
        if self.color == Color.RED:
            x = x + self.table["a"] + self.sizes[0] + self.pair[0] + self.tensors[0][0]
        return self.batch_norm(x[0]) + self.loose[0] + self.transposed[0, 0]


def bits(value: Tensor) -> bytes:
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("how", ["trace", "script"])
def test_all_tensors_are_read_as_torch_reads_them(tmp_path, how):
    module = Everything().eval()
    scripted = torch.jit.script(module) if how == "script" else None
    path = tmp_path / "model.pt"
    (scripted or torch.jit.trace(module, torch.randn(2, 3, 8))).save(path)
    expected = torch.jit.load(path).state_dict()
    tensors = read_torchscript(path).tensors

    assert list(tensors) == list(expected)
    assert {"twin.norm.weight", "blocks.1.norm.weight", "hidden", "scales.1"} < tensors.keys()
    assert not {"loose", "absent", "nothing", "blocks.0.mlp.0.bias"} & tensors.keys()
    for name, value in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (value.dtype, value.shape), name
        assert bits(tensors[name]) == bits(value), name
    assert list(load_state_dict_file(path)) == list(expected)


def test_every_tensor_owns_its_memory(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.trace(Everything().eval(), torch.randn(2, 3, 8)).save(path)
    tensors = {
        name: value for name, value in read_torchscript(path).tensors.items() if value.numel()
    }
    before = {name: bits(value) for name, value in tensors.items()}
    assert len({value.untyped_storage().data_ptr() for value in tensors.values()}) == len(tensors)
    for name, value in tensors.items():
        memory = value.untyped_storage()
        assert memory.nbytes() == value.nbytes
        memory[0] ^= 1
        assert [other for other in tensors if bits(tensors[other]) != before[other]] == [name]
        before[name] = bits(value)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a small traced archive."""
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.jit.trace(Small().eval(), torch.randn(2, 2)).save(path)
    return path.read_bytes()


def test_archives_are_told_from_other_files(tmp_path, small):
    path = tmp_path / "w.pt"
    assert not is_torchscript(path)
    torch.save({"a": torch.zeros(1)}, path)
    assert not is_torchscript(path)
    for content, expected in ((small, True), (small[:-9], False), (b"", False), (b"PK", False)):
        path.write_bytes(content)
        assert is_torchscript(path) is expected


# ---------------------------------------------------------------------------------------------------------------------
# Code of the archive
# ---------------------------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Keeps its weight in a format of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.w, self.training

    def forward(self, x: Tensor) -> Tensor:
        return x


class Overwrites(Stateful):
    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.w, self.training = state
        torch.save(self.w, "precious")


class Prints(Stateful):
    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.w, self.training = state
        print("it ran")


class Loops(Stateful):
    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.w, self.training = state
        while True:
            self.w = self.w + 1


class Doubled(nn.Module):
    """Keeps twice its weight, under the weight's name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> dict[str, Tensor]:
        return {"w": self.w * 2}

    @torch.jit.export
    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.w = state["w"] / 2
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with a file that code would overwrite."""
    monkeypatch.chdir(tmp_path)
    Path("precious").write_text("kept")
    return tmp_path


def test_torchscript_itself_runs_the_code(folder, capfd):
    torch.jit.script(Overwrites()).save("a.pt")
    torch.jit.script(Prints()).save("b.pt")
    assert Path("precious").read_text() == "kept" and "it ran" not in capfd.readouterr().out
    torch.jit.load("a.pt")
    torch.jit.load("b.pt")
    assert Path("precious").read_bytes() != b"kept" and "it ran" in capfd.readouterr().out


@pytest.mark.parametrize("kind", [Overwrites, Prints, Loops, Doubled])
@pytest.mark.parametrize("is_nested", [False, True])
def test_code_of_an_archive_never_runs(folder, capfd, kind, is_nested):
    module = nn.Sequential(nn.Linear(2, 2), kind()) if is_nested else kind()
    torch.jit.script(module).save("ViT-B-32.pt")
    with pytest.raises(TorchScriptError, match="format of its own"):
        read_torchscript(folder / "ViT-B-32.pt")
    assert_refused(folder / "ViT-B-32.pt")
    assert Path("precious").read_text() == "kept" and capfd.readouterr() == ("", "")


def without(content: bytes, name: str) -> bytes:
    """Return an archive that lacks the record of this name."""
    return rewritten(content, lambda each, data: None if each.endswith(name) else data)


def rewritten(content: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """Return an archive whose records are changed, or left out, by their name and content."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if (data := change(info.filename, old.read(info))) is not None:
                new.writestr(info.filename, data, info.compress_type)
    return target.getvalue()


DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "w": lambda content: content,
    "w.bin": lambda content: content,
    "w.safetensors": lambda content: content,
    "script.pt": lambda content: b"#!/bin/sh\n" + content,
    "plain.pt": lambda content: without(content, "/constants.pkl"),
    "tail.pt": lambda content: content + b"\n" * 40,
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguise_makes_no_code_run(folder, capfd, name):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Overwrites()), buffer)
    path = folder / name
    path.write_bytes(DISGUISES[name](buffer.getvalue()))
    with pytest.raises(CheckpointError) as caught:
        load_state_dict_file(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    assert Path("precious").read_text() == "kept" and capfd.readouterr() == ("", "")
    assert sorted(os.listdir()) == sorted(["precious", name])


def test_edited_code_beside_plain_weights_is_not_run(folder, capfd, small):
    evil = b'import os\nos.system("touch ran")\nprint("it ran")\ntorch.save([1], "precious")\n'

    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith(".py"):
            return data
        body = evil.replace(b"\n", b"\n    ")
        return evil + data.replace(b"Tensor:\n", b"Tensor:\n    " + body + b"\n") + evil

    (folder / "honest.pt").write_bytes(small)
    (folder / "edited.pt").write_bytes(rewritten(small, edit))
    honest, edited = (load_state_dict_file(folder / name) for name in ("honest.pt", "edited.pt"))
    assert list(honest) == list(edited) and len(honest) == 7
    assert all(bits(honest[name]) == bits(edited[name]) for name in honest)
    assert Path("precious").read_text() == "kept" and capfd.readouterr() == ("", "")
    assert sorted(os.listdir()) == ["edited.pt", "honest.pt", "precious"]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile trees
# ---------------------------------------------------------------------------------------------------------------------


def scalar(value: bool | int | float | str) -> bytes:
    """Return the opcodes that push a value."""
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    if -(1 << 31) <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    number = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(number)]) + number


def tuple_of(*values: bytes) -> bytes:
    return pickle.MARK + b"".join(values) + pickle.TUPLE


def named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + tuple_of(*arguments) + pickle.REDUCE


def storage(
    kind: str = "FloatStorage",
    key: bytes = scalar("0"),
    number: bool | int | float = 4,
    what: str = "storage",
) -> bytes:
    """Return the opcodes of a record's elements; ``archive`` has four float32 in data/0."""
    parts = scalar(what), named("torch", kind), key, scalar("cpu"), scalar(number)
    return tuple_of(*parts) + pickle.BINPERSID


def tensor(
    offset: bool | int | float = 0,
    shape: tuple[bool | int | float, ...] = (4,),
    strides: tuple[bool | int | float, ...] = (1,),
    stored: bytes = storage(),
    *more: bytes,
) -> bytes:
    numbers = scalar(offset), tuple_of(*map(scalar, shape)), tuple_of(*map(scalar, strides))
    hooks = call("collections", "OrderedDict")
    parts = stored, *numbers, scalar(False), hooks, *more
    return call("torch._utils", "_rebuild_tensor_v2", *parts)


def dict_of(content: Mapping[str, bytes]) -> bytes:
    items = b"".join(scalar(name) + value for name, value in content.items())
    return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS


def module(content: Mapping[str, bytes], noted: bytes = b"") -> bytes:
    """Return the opcodes of a module whose class declares the parameter w.

    Args:
        content: attributes by name.
        noted: opcodes right after the module was made, such as one that puts it in the memo.
    """
    made = named("__torch__", "M") + pickle.EMPTY_TUPLE + pickle.NEWOBJ + noted
    return made + dict_of(content) + pickle.BUILD


def put(index: int) -> bytes:
    return pickle.BINPUT + bytes([index])


def get(index: int) -> bytes:
    return pickle.BINGET + bytes([index])


def tower(levels: int, attributes: Mapping[str, bytes]) -> bytes:
    """Return the opcodes of a tree, each of whose modules refers to the next one twice."""
    tree = module(attributes)
    for index in range(levels):
        tree = module({**attributes, "a": tree + put(index), "b": get(index)})
    return tree


CODE = """class M(Module):
  __parameters__ = ["w", ]
  __buffers__ = []
  w : Tensor
"""
GOOD = module({"w": tensor()})


@dataclass(frozen=True)
class Entry:
    """A record of a zip file.

    Attributes:
        name: its full name.
        data: what is stored.
        method: how that was compressed.
        flags: a 1 for an encrypted one.
        num_bytes, crc: said of the record before it was compressed; those of data if None.
        stored_bytes: said of data; its own if None.
        offset: where the directory says that it is. Without it, the record is written, and found there.
        extra: further fields of the directory.
    """

    name: str
    data: bytes
    method: int = zipfile.ZIP_STORED
    flags: int = 0
    num_bytes: int | None = None
    crc: int | None = None
    stored_bytes: int | None = None
    offset: int | None = None
    extra: bytes = b""

    def header(self, signature: bytes, *more: int) -> bytes:
        num_bytes = len(self.data) if self.num_bytes is None else self.num_bytes
        stored_bytes = len(self.data) if self.stored_bytes is None else self.stored_bytes
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        packed = struct.pack(
            "<5H3I", 20, self.flags, self.method, 0, 33, crc, stored_bytes, num_bytes
        )
        return signature + packed + struct.pack("<2H", len(self.name.encode()), *more)

    def local(self) -> bytes:
        """Return the record as it is before the directory."""
        return self.header(b"PK\x03\x04", 0) + self.name.encode() + self.data

    def listed(self, offset: int) -> bytes:
        """Return the record's part of the directory."""
        offset = offset if self.offset is None else self.offset
        fields = self.header(b"PK\x01\x02\x14\x00", len(self.extra))
        return fields + struct.pack("<3H2I", 0, 0, 0, 0, offset) + self.name.encode() + self.extra


def deflated(name: str, data: bytes) -> Entry:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    stored = deflate.compress(data) + deflate.flush()
    return Entry(name, stored, zipfile.ZIP_DEFLATED, num_bytes=len(data), crc=zlib.crc32(data))


def bzipped(name: str, data: bytes) -> Entry:
    crc = zlib.crc32(data)
    return Entry(name, bz2.compress(data), zipfile.ZIP_BZIP2, num_bytes=len(data), crc=crc)


def pickled(tree: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + tree + pickle.STOP


def archive(
    tree: bytes = GOOD,
    *changed: Entry,
    code: str = CODE,
    also: Sequence[Entry] = (),
    without: str = "",
    start: bytes = b"",
) -> bytes:
    """Return an archive with four float32 in data/0.

    Args:
        tree: opcodes in data.pkl.
        changed: records, each in place of that of its name if there is one.
        code: of the modules.
        also: records after all others.
        without: the name of a record that is left out.
        start: what the file begins with.
    """
    records = [
        Entry("m/data.pkl", pickled(tree)),
        Entry("m/data/0", struct.pack("<4f", 1, 2, 3, 4)),
        deflated("m/code/__torch__.py", code.encode()),
        Entry("m/constants.pkl", pickled(pickle.EMPTY_TUPLE)),
        Entry("m/version", b"3\n"),
        Entry("m/byteorder", b"little"),
    ]
    by_name = {record.name: record for record in (*records, *changed)}
    by_name.pop(without, None)
    body, directory = start, b""
    for record in (*by_name.values(), *also):
        directory += record.listed(len(body))
        if record.offset is None:
            body += record.local()
    number = len(by_name) + len(also)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, number, number, len(directory), len(body), 0)
    return body + directory + end


def assert_refused(path: Path) -> None:
    """Check that a file is refused in one line that names it, with little memory and no file made."""
    before = sorted(os.listdir(path.parent))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            load_state_dict_file(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value.__cause__, TorchScriptError)
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 1000
    assert peak_bytes < MOST_BYTES
    assert sorted(os.listdir(path.parent)) == before


def assert_read(path: Path) -> None:
    """Check that the four elements of data/0 are read, with little memory and no file made."""
    before = sorted(os.listdir(path.parent))
    tracemalloc.start()
    try:
        tensors = load_state_dict_file(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(tensors) == ["w"] and tensors["w"].tolist() == [1, 2, 3, 4]
    assert peak_bytes < MOST_BYTES
    assert sorted(os.listdir(path.parent)) == before


def test_torch_reads_a_handwritten_archive_too(folder):
    path = folder / "m.pt"
    path.write_bytes(archive())
    assert torch.jit.load(path).state_dict()["w"].tolist() == [1, 2, 3, 4]
    assert_read(path)


TOUCH = scalar("touch ran")
OPEN = scalar("open('ran', 'w')")
ITSELF = pickle.EMPTY_LIST + put(0) + get(0) + pickle.APPEND
DEEP = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 10_000

HOSTILE_CALLS = {
    "os.system": call("os", "system", TOUCH),
    "exec": call("builtins", "exec", OPEN),
    "eval": call("builtins", "eval", OPEN),
    "torch.load": call("torch", "load", scalar("precious")),
    "exec as a class": named("builtins", "exec") + tuple_of(OPEN) + pickle.NEWOBJ,
    "build of a class": named("os", "system") + tuple_of() + pickle.NEWOBJ + TOUCH + pickle.BUILD,
}
HOSTILE_OPCODES = {
    "GLOBAL by stack": scalar("os") + scalar("system") + pickle.STACK_GLOBAL + tuple_of(TOUCH),
    "INST": pickle.MARK + TOUCH + pickle.INST + b"os\nsystem\n",
    "OBJ": pickle.MARK + named("os", "system") + TOUCH + pickle.OBJ,
    "EXT1": pickle.EXT1 + b"\x01",
    "EXT4": pickle.EXT4 + b"\xff\xff\xff\x7f",
    "NEWOBJ_EX": named("subprocess", "Popen")
    + tuple_of(TOUCH)
    + pickle.EMPTY_DICT
    + pickle.NEWOBJ_EX,
    "PERSID": pickle.PERSID + b"0\n",
    "NEXT_BUFFER": pickle.NEXT_BUFFER,
    "DUP": pickle.NONE + pickle.DUP,
    "INT": pickle.INT + b"9" * 100_000 + b"\n",
    "STRING": pickle.STRING + b"'a'\n",
    "long of 2 GiB": pickle.LONG4 + b"\xff\xff\xff\x7f",
    "bytes of 4 EiB": pickle.BINBYTES8 + struct.pack("<Q", 1 << 62) + b"abc",
    "bytearray of 4 EiB": pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 62) + b"abc",
    "text of 4 GiB": pickle.BINUNICODE + b"\xff\xff\xff\xff" + b"abc",
    "text of 4 EiB": pickle.BINUNICODE8 + struct.pack("<Q", 1 << 62) + b"abc",
    "frame of 16 EiB": pickle.FRAME + b"\xff" * 8,
    "text that is no UTF-8": pickle.BINUNICODE + b"\x01\0\0\0\xff",
    "no such opcode": b"\xff",
    "no argument": pickle.BININT + b"\x01",
    "no value": pickle.REDUCE,
    "no mark": pickle.TUPLE,
    "no memo": pickle.LONG_BINGET + b"\xff\xff\xff\xff",
    "no list": pickle.NONE + pickle.NONE + pickle.APPEND,
    "no dict": pickle.NONE + pickle.NONE + pickle.NONE + pickle.SETITEM,
    "no object": pickle.NONE + pickle.EMPTY_DICT + pickle.BUILD,
    "no function": pickle.NONE + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "key without a value": pickle.EMPTY_DICT + pickle.MARK + pickle.NONE + pickle.SETITEMS,
    "two values": pickle.NONE + pickle.NONE,
    "a mark for a value": pickle.MARK,
    "a storage in 4 parts": tuple_of(*[scalar("storage")] * 4) + pickle.BINPERSID,
    "no storage": tuple_of(*[scalar("module")] * 5) + pickle.BINPERSID,
    "a storage that is no tuple": pickle.NONE + pickle.BINPERSID,
    # To hash a tuple takes a level of C's stack for each of its own, and twice the time where it holds one twice.
    "a tuple as a key": pickle.EMPTY_DICT + tuple_of() + pickle.NONE + pickle.SETITEM,
    "tuples as keys": pickle.EMPTY_DICT + pickle.MARK + tuple_of() + pickle.NONE + pickle.SETITEMS,
    "a list as a key": pickle.EMPTY_DICT + pickle.EMPTY_LIST + pickle.NONE + pickle.SETITEM,
}
# Each in place of the parameter w.
HOSTILE_WEIGHTS = {
    "a number": scalar(3),
    "a list of itself": ITSELF,
    "deep tuples": DEEP,
    "a stride of 0": tensor(0, (1 << 40,), (0,)),
    "twice its storage": tensor(0, (8,), (0,)),
    "a terabyte": tensor(0, (1 << 40,), (1,)),
    "more than 64 bits": tensor(0, (1 << 32, 1 << 32), (0, 0)),
    "a number beyond 64 bits": tensor(0, (1,), (1 << 70,)),
    "nothing by a number beyond 64 bits": tensor(0, (0, 1 << 70), (1, 1)),
    "nothing at a number beyond 64 bits": tensor(1 << 80, (0,), (1,)),
    "nothing by too much": tensor(0, (0, 1 << 62, 1 << 62), (1, 1, 1)),
    "an offset beyond": tensor(1, (4,), (1,)),
    "a last element beyond": tensor(0, (2, 2), (3, 1)),
    "a negative offset": tensor(-1, (4,), (1,)),
    "a negative size": tensor(0, (-1,), (1,)),
    "two negative sizes": tensor(0, (-2, -2), (1, 1)),
    "a negative stride": tensor(3, (4,), (-1,)),
    "a truth value for an offset": tensor(True, (3,), (1,)),
    "a truth value for a size": tensor(0, (True,), (1,)),
    "a truth value for a stride": tensor(0, (4,), (True,)),
    "a fraction for a size": tensor(0, (4.0,), (1,)),
    "more sizes than strides": tensor(0, (2, 2), (1,)),
    "65 dimensions": tensor(0, (1,) * 65, (1,) * 65),
    "sizes in a tensor": call(
        "torch._utils", "_rebuild_tensor_v2", storage(), scalar(0), storage(), tuple_of()
    ),
    "sizes in a text": call(
        "torch._utils", "_rebuild_tensor_v2", storage(), scalar(0), scalar("4"), scalar("1")
    ),
    "no arguments": call("torch._utils", "_rebuild_tensor_v2"),
    "arguments in a tensor": named("torch._utils", "_rebuild_tensor_v2")
    + storage()
    + pickle.REDUCE,
    "no storage": tensor(stored=pickle.NONE),
    "what a call gives for a storage": tensor(stored=HOSTILE_CALLS["os.system"]),
    "more elements than its record": tensor(stored=storage(number=5)),
    "fewer elements than its record": tensor(0, (3,), stored=storage(number=3)),
    "a negative number of elements": tensor(stored=storage(number=-4)),
    "2**70 elements": tensor(stored=storage(number=1 << 70)),
    "a truth value for a number": tensor(0, (1,), stored=storage(number=True)),
    "a fraction for a number": tensor(stored=storage(number=4.0)),
    "wide elements": tensor(stored=storage("DoubleStorage")),
    "elements of no known type": tensor(stored=storage("ComplexFloatStorage", number=2)),
    "a function for a type": tensor(stored=storage("load")),
    "a module for a storage": tensor(stored=storage(what="module")),
    "a missing record": tensor(stored=storage(key=scalar("1"))),
    "a record elsewhere": tensor(stored=storage(key=scalar("../../precious"))),
    "a number for a key": tensor(stored=storage(key=scalar(0))),
    "a key of two lines": tensor(stored=storage(key=scalar("0\n1\x1b[2J"))),
    "a type of two lines": tensor(stored=storage("Float\rStorage")),
    "an endless key": tensor(stored=storage(key=scalar("0" * 100_000))),
    "a negated tensor": tensor(
        0, (4,), (1,), storage(), pickle.EMPTY_DICT + scalar("neg") + scalar(True) + pickle.SETITEM
    ),
}
HOSTILE_MODULES = {
    "no module": pickle.NONE,
    "a list of itself": ITSELF,
    "deep tuples": DEEP,
    "deep tuples as a key": module(
        {"w": tensor(), "x": pickle.EMPTY_DICT + DEEP + pickle.NONE + pickle.SETITEM}
    ),
    "a class without code": GOOD.replace(b"__torch__\nM", b"__torch__\nN"),
    "elements of two types": module({"a": tensor(), "w": tensor(stored=storage("IntStorage"))}),
    "without attributes": named("__torch__", "M") + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
    "in itself": module({"w": tensor(), "a": get(0)}, put(0)),
    "in its child": module({"w": tensor(), "a": module({"a": get(0)})}, put(0)),
    "twice in each other, 40 levels": tower(40, {}),
    "twice in each other, with weights": tower(16, {"w": tensor()}),
    "twice in each other, with attributes": tower(
        12, {"w": tensor(0, (0,)), **{f"x{index}": pickle.NONE for index in range(100)}}
    ),
    "a child of two lines": module({"a\nb\x1b[2J": module({"w": scalar(3)})}),
    "a child with an endless name": module({"a" * 100_000: GOOD}),
}
HOSTILE_NAMES = {
    "a class of endless name": call("torch.jit._pickle", f"build_{'a' * 3_000_000}", scalar(1)),
}
HOSTILE_TREES = {
    **{f"name: {name}": tree for name, tree in HOSTILE_NAMES.items()},
    **{f"{name}, as the root": tree for name, tree in HOSTILE_CALLS.items()},
    **{f"{name}, as a weight": module({"w": tree}) for name, tree in HOSTILE_CALLS.items()},
    **{f"opcodes: {name}": tree for name, tree in HOSTILE_OPCODES.items()},
    **{
        f"opcodes in an attribute: {name}": module({"w": tensor(), "x": tree})
        for name, tree in HOSTILE_OPCODES.items()
    },
    **{f"weight: {name}": module({"w": tree}) for name, tree in HOSTILE_WEIGHTS.items()},
    **{f"module: {name}": tree for name, tree in HOSTILE_MODULES.items()},
}
# Nothing that a weight is made of; no sense, and no harm.
ODD_ATTRIBUTES = {
    **HOSTILE_CALLS,
    "a list of itself": ITSELF,
    "deep tuples": DEEP,
    "a huge number in the memo": pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", HOSTILE_TREES)
def test_hostile_trees_are_refused(folder, name):
    (folder / "m.pt").write_bytes(archive(HOSTILE_TREES[name]))
    assert_refused(folder / "m.pt")


@pytest.mark.parametrize("name", ODD_ATTRIBUTES)
def test_odd_attributes_are_left_alone(folder, name):
    (folder / "m.pt").write_bytes(archive(module({"w": tensor(), "x": ODD_ATTRIBUTES[name]})))
    assert_read(folder / "m.pt")


@pytest.mark.parametrize(("limit", "value"), [("_MAX_TREE_BYTES", 64), ("_MAX_OPCODES", 16)])
def test_a_tree_is_of_limited_size(folder, monkeypatch, limit, value):
    (folder / "m.pt").write_bytes(archive())
    assert_read(folder / "m.pt")
    monkeypatch.setattr(clipcore.towers.torchscript, limit, value)
    assert_refused(folder / "m.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile zip files
# ---------------------------------------------------------------------------------------------------------------------


def bomb(name: str, num_bytes: int, says: int) -> Entry:
    """Return a deflated record of zeros.

    Args:
        name: of the record.
        num_bytes: that it has; whole MiB.
        says: how many the directory says that it has.
    """
    # A flush makes the next block independent of those before, so that it can be repeated.
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    stored = block * (num_bytes >> 20) + deflate.flush()
    crc = zlib.crc32(bytes(min(says, 1 << 20)))
    return Entry(name, stored, zipfile.ZIP_DEFLATED, num_bytes=says, crc=crc)


def overlapping(number: int) -> bytes:
    """Return an archive with records each of which holds all later ones."""
    content, records = bytes(4096), []
    for index in range(10, 10 + number):
        records.append(Entry(f"m/data/{index}", content))
        content = records[-1].local()
    header_bytes = len(content) - len(records[-1].data)
    placed = [
        replace(record, offset=depth * header_bytes)
        for depth, record in enumerate(reversed(records))
    ]
    return archive(start=content, also=placed)


def far_away(name: str, offset: int) -> bytes:
    """Return an archive whose directory puts a record at an offset of 64 bits."""
    extra = struct.pack("<HHQ", 1, 8, offset)
    return archive(GOOD, Entry(name, b"", offset=0xFFFFFFFF, extra=extra))


def many_names() -> bytes:
    """Return an archive with one tensor of 64 KiB as 2,000 parameters."""
    names = [f"w{index}" for index in range(2_000)]
    first = tensor(0, (1 << 14,), stored=storage(number=1 << 14)) + put(0)
    tree = module({name: first if name == "w0" else get(0) for name in names})
    declared = ", ".join(f'"{name}"' for name in names)
    code = CODE.replace('"w", ', declared)
    return archive(tree, Entry("m/data/0", bytes(1 << 16)), code=code)


# What LZMA's reader takes for the beginning of a record, and what it cannot read.
LZMA = b"\x09\x04\x05\x00\x5d\x00\x00\x80\x00" + b"\xff" * 100
FLOATS = struct.pack("<4f", 1, 2, 3, 4)
HOSTILE_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "no tree": lambda: archive(without="m/data.pkl"),
    "no weights": lambda: archive(without="m/data/0"),
    "no code": lambda: archive(without="m/code/__torch__.py"),
    "an empty tree": lambda: archive(GOOD, Entry("m/data.pkl", b"")),
    "a tree without an end": lambda: archive(GOOD, Entry("m/data.pkl", pickled(GOOD)[:-1])),
    "a bomb as the tree": lambda: archive(GOOD, bomb("m/data.pkl", 1 << 30, 1 << 30)),
    "a bomb as weights": lambda: archive(GOOD, bomb("m/data/0", 1 << 30, 1 << 30)),
    "a bomb as weights that says little": lambda: archive(GOOD, bomb("m/data/0", 1 << 28, 16)),
    "a bomb as the byte order": lambda: archive(GOOD, bomb("m/byteorder", 1 << 28, 6)),
    "a bomb as code": lambda: archive(GOOD, bomb("m/code/bomb.py", 1 << 30, 1 << 30)),
    "code by bzip2": lambda: archive(GOOD, bzipped("m/code/b.py", b"a")),
    "code by LZMA": lambda: archive(GOOD, Entry("m/code/b.py", LZMA, zipfile.ZIP_LZMA)),
    "code by an unknown method": lambda: archive(GOOD, Entry("m/code/b.py", b"a", 93)),
    "weights by an unknown method": lambda: archive(GOOD, Entry("m/data/0", FLOATS, 99)),
    "code that is not deflated": lambda: archive(GOOD, Entry("m/code/b.py", b"\xff" * 9, 8)),
    "code that ends too early": lambda: archive(
        GOOD, Entry("m/code/b.py", b"", 8, num_bytes=9, stored_bytes=1 << 20)
    ),
    "2 GiB stored in 16 bytes": lambda: archive(
        GOOD, Entry("m/data/0", FLOATS, stored_bytes=(1 << 31) - 10)
    ),
    "2 GiB in 16 bytes": lambda: archive(
        GOOD, Entry("m/data/0", FLOATS, num_bytes=(1 << 31) - 10, stored_bytes=(1 << 31) - 10)
    ),
    "a wrong checksum": lambda: archive(GOOD, Entry("m/data/0", FLOATS, crc=1)),
    "encrypted weights": lambda: archive(GOOD, Entry("m/data/0", FLOATS, flags=1)),
    "patched weights": lambda: archive(GOOD, Entry("m/data/0", FLOATS, flags=32)),
    "two trees": lambda: archive(also=[Entry("m/data.pkl", pickled(GOOD))]),
    "two records of weights": lambda: archive(also=[Entry("m/data/0", FLOATS)]),
    "two folders": lambda: archive(also=[Entry("n/data.pkl", pickled(GOOD))]),
    "two folders, one without records": lambda: archive(also=[Entry("n/code/a.py", b"")]),
    "a record outside": lambda: archive(also=[Entry("data.pkl", pickled(GOOD))]),
    "records in each other": lambda: overlapping(30),
    "big-endian": lambda: archive(GOOD, Entry("m/byteorder", b"big")),
    "an endless byte order": lambda: archive(GOOD, Entry("m/byteorder", b"little" * 1000)),
    "a tree at 4 EiB": lambda: far_away("m/data.pkl", 1 << 62),
    "a tree at 8 EiB": lambda: far_away("m/data.pkl", 1 << 63),
    "a tree at 16 EiB": lambda: far_away("m/data.pkl", (1 << 64) - 1),
    "weights at 16 EiB": lambda: far_away("m/data/0", (1 << 64) - 1),
    "a name of two lines": lambda: archive(also=[deflated("m/data/0\n\x1b[2J", b"a")]),
    "an endless name": lambda: archive(also=[deflated("m/data/" + "0" * 60_000, b"a")]),
    "one tensor under many names": many_names,
}


@pytest.mark.parametrize("name", HOSTILE_ARCHIVES)
def test_hostile_zip_files_are_refused(folder, name):
    (folder / "m.pt").write_bytes(HOSTILE_ARCHIVES[name]())
    assert_refused(folder / "m.pt")


def test_code_takes_little_memory(folder):
    path = folder / "m.pt"
    # It inflates to 256 MiB, and says that it has 10 bytes.
    path.write_bytes(archive(GOOD, bomb("m/code/bomb.py", 1 << 28, 10)))
    assert_read(path)
    path.write_bytes(archive(GOOD, deflated("m/code/lines.py", b"\n" * (1 << 22))))
    assert_read(path)


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def mutated(content: bytes, dice: random.Random) -> bytes:
    """Return bytes after a random change: bits flipped, an end cut off, blocks swapped, or some put in."""
    changed = bytearray(content)
    begin, other = (dice.randrange(len(content) - 64) for _ in range(2))
    size = dice.randrange(1, 64)
    match dice.randrange(4):
        case 0:
            for _ in range(dice.choice([1, 2, 8])):
                changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        case 1:
            del changed[dice.randrange(len(content)) :]
        case 2:
            block = changed[begin : begin + size]
            changed[begin : begin + size] = changed[other : other + size]
            changed[other : other + size] = block
        case 3:
            changed[begin:begin] = dice.randbytes(size)
    return bytes(changed)


@pytest.mark.parametrize("part", ["file", "data.pkl"])
def test_damage_is_refused_or_harmless(folder, small, part):
    path, dice = folder / "m.pt", random.Random(0)

    def damage(name: str, data: bytes) -> bytes:
        return mutated(data, dice) if name.endswith("/data.pkl") else data

    refused = 0
    for _ in range(300 if part == "file" else 100):
        path.write_bytes(mutated(small, dice) if part == "file" else rewritten(small, damage))
        try:
            tensors = load_state_dict_file(path)
        except CheckpointError as error:
            assert str(path) in str(error) and str(error).isprintable()
            refused += 1
        else:
            assert tensors and all(type(value) is Tensor for value in tensors.values())
    assert refused > 0
    assert sorted(os.listdir(folder)) == ["m.pt", "precious"]
