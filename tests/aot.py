"""Compile every launch of a test module for GPUs that are not here, and say what came out.

A test module defines `aot_launches()`, which calls Triton launchers with meta tensors. `compiled("test_x")` asks
a process that runs this file (Triton's compiler and its interpreter exclude each other), which lets each call launch with
compilation for sm_80, sm_90 and sm_100 in place of the launch, and returns one Kernel for each. What is compiled is
therefore what the launcher asks for: its dtypes, its constants, its alignment, its row of the launch table.

One process compiles for all modules that a session asks for: it imports torch once, and what several of them launch is
compiled once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sass import main_loop

ARCHITECTURES = (80, 90, 100)
# Largest shared memory of one block. Row 80 also serves sm_86, sm_89 and sm_120, which have the least.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What sm_90 shares among the programs on a processor; a program's memory comes with 1 KiB of the system's.
REGISTERS, PROCESSOR_BYTES, SYSTEM_BYTES = 65536, 228 * 1024, 1024
# The matrix instructions of the chip's own generation, in PTX: HMMA, HGMMA and UTCHMMA of the machine code.
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Kernel:
    """One compiled launch."""

    name: str
    architecture: int
    constants: dict[str, Any]
    operand: str  # type of the first pointer: fp16, fp32, ...
    num_warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    spills: int  # loads from and stores to local memory in the machine code
    matrix_instructions: int
    divisible: tuple[str, ...]  # the arguments that the compiler knew to be multiples of 16
    # Instructions of one turn of the main loop, where a module asks for turns; and of one by a branch that divides.
    turn: tuple[str, ...]
    dividing_turn: tuple[str, ...]

    @property
    def programs_on_a_processor(self) -> int:
        """How many run at once by their registers, which a warp gets in units of 256, and their shared memory; sm_90."""
        of_a_warp = -(-32 * self.registers // 256) * 256
        by_registers = REGISTERS // (of_a_warp * self.num_warps)
        return min(by_registers, PROCESSOR_BYTES // (self.shared_bytes + SYSTEM_BYTES))

    def __str__(self) -> str:
        return f"{self.name} sm_{self.architecture} {self.operand} {self.constants}"


class _Compiler:
    """A process that compiles for one module after another."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        root = Path(__file__).resolve().parent.parent
        # What the caller put first stays: another Triton may be among it.
        given = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([*given, str(root), str(root / "tests")])

        # It ends with this process, whose end closes its input.
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def kernels(self, test_module: str) -> list[dict[str, Any]]:
        """Return what a test module launches, as JSON has it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(test_module + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the compiler's process ended with {self._process.wait()}"
        told = json.loads(answer)
        assert "error" not in told, told["error"]
        return told["kernels"]


_compiler = functools.cache(_Compiler)


@functools.cache
def compiled(test_module: str) -> tuple[Kernel, ...]:
    """Every kernel that `aot_launches()` of a test module launches, for every architecture."""
    return tuple(
        Kernel(**row | {name: tuple(row[name]) for name in ("divisible", "turn", "dividing_turn")})
        for row in _compiler().kernels(test_module)
    )


def assert_compiled_well(kernels: tuple[Kernel, ...]) -> None:
    """No spills, and shared memory that the chip has."""
    assert kernels
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel}: {kernel.spills} spills, {kernel.registers} registers"
        limit = SHARED_BYTES[kernel.architecture]
        assert kernel.shared_bytes <= limit, f"{kernel}: {kernel.shared_bytes} B of {limit}"


def look_into(cubin: bytes, *options: str) -> str:
    """Return cuobjdump's output for a cubin; the tool comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> str:
    """Return resource usage and machine code."""
    return look_into(cubin, "-res-usage", "-sass")


def count_spills(cubin: bytes, usage: str) -> int:
    """Count loads from and stores to local memory in the machine code, given the resource usage.

    Without a stack or local memory there are none, and a kernel need not be disassembled, which takes 0.24 s.
    """
    sizes = [int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]
    assert len(sizes) >= 2, usage
    if not any(sizes):
        return 0
    opcodes = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", disassemble(cubin), re.MULTILINE
    )
    assert opcodes, "no machine code found: has the disassembler changed its format?"
    return sum(opcode in ("LDL", "STL") for opcode in opcodes)


def _describe(kernel: Any, architecture: int, arguments: dict[str, Any], has_turns: bool) -> Kernel:
    cubin = kernel.asm["cubin"]
    usage = look_into(cubin, "-res-usage")
    sass = disassemble(cubin) if has_turns else ""
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Kernel(
        name=kernel.metadata.name,
        architecture=architecture,
        constants={name: value for name, value in arguments.items() if name.isupper()},
        operand=next(iter(kernel.src.signature.values())).lstrip("*"),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        shared_bytes=kernel.metadata.shared,
        registers=int(registers.group(1)),
        spills=count_spills(cubin, usage),
        matrix_instructions=kernel.asm["ptx"].count(MATRIX_INSTRUCTION[architecture]),
        divisible=_divisible(kernel),
        turn=main_loop(sass) if sass else (),
        dividing_turn=main_loop(sass, through="MUFU.RCP") if sass else (),
    )


def _divisible(kernel: Any) -> tuple[str, ...]:
    """Return the arguments that a kernel was compiled for as multiples of 16."""
    names = list(kernel.src.signature)
    return tuple(
        names[place[0]]
        for place, marks in kernel.src.attrs.items()
        if ["tt.divisibility", 16] in marks
    )


class _AbsentGPU:
    """What Triton asks of a driver before a launch. Its device number is the architecture: one cache for each."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def _compiling_for(architecture: int, names: str, has_turns: bool) -> Iterator[dict[str, Kernel]]:
    """Compile launches for the architecture into the dictionary; nothing runs.

    Args:
        names: a regular expression of the kernels that are compiled.
        has_turns: look for the turns of their main loops, for which each is disassembled.
    """
    from triton.runtime import JITFunction, driver

    from clipcore.kernels import launch

    kernels: dict[
        str, Kernel
    ] = {}  # by the hash of what was compiled: a launch twice is one kernel
    run, table_row = JITFunction.run, launch.architecture

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not re.search(names, self.__name__):
            return
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in kernels:
            kernels[kernel.hash] = _describe(kernel, architecture, kwargs, has_turns)

    driver.set_active(_AbsentGPU(architecture))
    JITFunction.run, launch.architecture = compile_only, lambda device: architecture
    try:
        yield kernels
    finally:
        JITFunction.run, launch.architecture = run, table_row


def compile_module(test_module: str) -> list[dict[str, Any]]:
    """Compile what a test module launches, for all architectures; return the kernels as JSON takes them."""
    found: list[Kernel] = []
    module = importlib.import_module(test_module)
    names, has_turns = getattr(module, "AOT_NAMES", ""), getattr(module, "AOT_TURNS", False)
    for architecture in getattr(module, "AOT_ARCHITECTURES", ARCHITECTURES):
        with _compiling_for(architecture, names, has_turns) as kernels:
            module.aot_launches()
        found += kernels.values()
    return [asdict(kernel) for kernel in found]


def main() -> None:
    """Print a line of JSON for each line of input, a test module's name."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints
    for line in sys.stdin:
        told: dict[str, Any]
        try:
            told = {"kernels": compile_module(line.strip())}
        except Exception:
            told = {"error": traceback.format_exc()}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
