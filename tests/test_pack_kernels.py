"""csrc/pack_kernels.cu without a GPU: compiled for three architectures, and run by the host's compiler.

The machine code is checked for spills and for its 16-byte accesses. What the kernels compute is checked by a C++
compiler that takes the same source, with each launch turned into loops over blocks and threads.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import ARCHITECTURES, disassemble
from runs import PROGRAMS, ROOT
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from clipcore.loss.exchange import ExchangeRef
from clipcore.loss.wire import Layout

SOURCE = ROOT / "csrc/pack_kernels.cu"
TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")


@needs_nvcc
def test_compiles_without_spills_and_in_wide_accesses(tmp_path: Path) -> None:
    def compile_for(architecture: int) -> str:
        cubin = tmp_path / f"{architecture}.cubin"
        command = [NVCC, "-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++17", "-Werror"]
        command += ["all-warnings", *COMMON_NVCC_FLAGS, SOURCE, "-o", cubin]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return disassemble(cubin.read_bytes())

    with ThreadPoolExecutor(2) as pool:
        for listing in pool.map(compile_for, ARCHITECTURES):
            kernels = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]
            assert len(kernels) == 2 * len(TYPES) ** 2
            for kernel in kernels:
                name = kernel.partition("\n")[0]
                assert not re.search(r"\b(LDL|STL)\b", kernel), name
                for access in ("LDG", "STG"):
                    assert re.search(rf"\b{access}(\.\w+)*\.128\b", kernel), f"{name}: {access}"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the kernels' source as a library of the host."""
    if NVCC is None:
        pytest.skip("no nvcc on the PATH")
    dry_run = subprocess.run([NVCC, "-dryrun", "x.cu"], capture_output=True, text=True)
    include = re.search(r'INCLUDES="?-I([^"\s]+)', dry_run.stderr)
    assert include is not None, dry_run.stderr
    launch = re.compile(r"(\w+<Wire, Row>)<<<(\w+), (\w+), 0, stream>>>\(")
    source, num_launches = launch.subn(r"on_host(\1, \2, \3, ", SOURCE.read_text())
    assert num_launches == 2
    folder = tmp_path_factory.mktemp("host")
    (folder / "pack_kernels_on_host.inc").write_text(source)
    command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{SOURCE.parent}"]
    # The program defines functions of the CUDA runtime, which a CUDA build of torch has loaded by the same names.
    command += ["-Wl,-Bsymbolic"]
    command += [f"-I{include.group(1)}", f"-I{folder}"]
    command += [str(PROGRAMS / "run_pack_kernels_on_host.cpp"), "-o", str(folder / "host.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "host.so"))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(function: Callable[..., int], *arguments: Any) -> int:
    return function(*(ctypes.c_int64(a) if type(a) is int else a for a in arguments))


def reference(monkeypatch: pytest.MonkeyPatch, x_BE: torch.Tensor, *arguments: Any) -> ExchangeRef:
    """Run the reference with its part packed, and the collective left out."""
    sent = []
    monkeypatch.setattr(
        "clipcore.loss.exchange.all_gather_single", lambda received, part, **_: sent.append(part)
    )
    exchange = ExchangeRef(x_BE, *arguments, None)
    (exchange.parts,) = sent
    return exchange


def rows(num_rows: int, columns: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Numbers that casts round, flush and overflow, `offset` elements behind an aligned address."""
    numbers = torch.randn(num_rows * columns + offset, dtype=torch.float64)
    numbers[::5] *= 1e5
    numbers[::7] *= 1e-7
    numbers[::11] = torch.inf
    # Halfway between two float16 but for what float32 drops: two roundings differ from one.
    numbers[::13] = 1 + 2**-11 + 2**-40
    return numbers.to(dtype)[offset:].view(num_rows, columns)


@pytest.mark.parametrize("wire_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_bytes_are_those_of_the_reference(
    kernels: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
) -> None:
    types = ctypes.c_int(TYPES[dtype]), ctypes.c_int(TYPES[wire_dtype])
    header = torch.arange(1, 9)
    for sizes, columns, offset, has_ids in (
        ([40, 40], 64, 0, True),
        ([3, 0, 5], 7, 0, False),
        ([3, 0, 5], 7, 1, True),
        ([1] * 70 + [0] + [3] * 70, 3, 0, True),
        ([0, 0], 4, 0, True),
        ([2, 3], 0, 0, True),
        ([700], 512, 0, False),
    ):
        layout = Layout.of(max(sizes), columns, wire_dtype, has_ids)
        shard_sizes, parts, exchange = torch.tensor(sizes), [], None
        for size in sizes:
            x_BE = rows(size, columns, dtype, offset)
            ids_B = torch.randint(2**62, (size,)) if has_ids else None
            exchange = reference(
                monkeypatch, x_BE, ids_B, header.tolist(), tuple(sizes), layout, wire_dtype
            )
            part = torch.zeros(layout.part_bytes, dtype=torch.uint8)
            assert (
                call(
                    kernels.pack,
                    *(pointer(header), pointer(ids_B), pointer(x_BE), size, columns, types[0]),
                    *(pointer(part), layout.ids_at, layout.rows_at, types[1]),
                )
                == 0
            )
            expected = torch.where(
                used_bytes(layout, size, columns, wire_dtype, has_ids), exchange.parts, 0
            )
            assert torch.equal(part, expected)
            parts.append(part)
        assert exchange is not None
        exchange.parts = torch.cat(parts)
        received, (expected_GE, expected_G) = exchange.parts, exchange.unpack()
        rows_GE = torch.zeros_like(expected_GE)
        ids_G = None if expected_G is None else torch.zeros_like(expected_G)
        assert (
            call(
                kernels.unpack,
                *(pointer(received), layout.part_bytes, layout.ids_at, layout.rows_at),
                *(pointer(shard_sizes), len(sizes), columns, types[1]),
                *(pointer(ids_G), pointer(rows_GE), types[0]),
            )
            == 0
        )
        assert torch.equal(rows_GE, expected_GE)
        assert ids_G is None or torch.equal(ids_G, expected_G)


def used_bytes(
    layout: Layout, size: int, columns: int, wire_dtype: torch.dtype, has_ids: bool
) -> torch.Tensor:
    """Where a part holds something; the rest is padding."""
    used = torch.zeros(layout.part_bytes, dtype=torch.bool)
    used[:64] = True
    used[layout.ids_at : layout.ids_at + 8 * size * has_ids] = True
    used[layout.rows_at : layout.rows_at + size * columns * wire_dtype.itemsize] = True
    return used


def test_an_unknown_type_is_an_error(kernels: ctypes.CDLL) -> None:
    x_BE, part = torch.ones(1, 4), torch.zeros(96, dtype=torch.uint8)
    header, sizes = torch.arange(8), torch.tensor([1])
    unknown, known = ctypes.c_int(4), ctypes.c_int(6)
    for types in ((unknown, known), (known, unknown)):
        assert (
            call(
                *(kernels.pack, pointer(header), None, pointer(x_BE), 1, 4, types[0]),
                *(pointer(part), 64, 64, types[1]),
            )
            != 0
        )
        assert (
            call(
                *(kernels.unpack, pointer(part), 96, 64, 64, pointer(sizes), 1, 4, types[1]),
                *(None, pointer(x_BE), types[0]),
            )
            != 0
        )
    assert not part.any() and torch.equal(x_BE, torch.ones(1, 4))
