"""What tests/aot.py reads of compiled kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import aot
import pytest
import triton

VALUES = 64


def copying_kernel() -> str:
    """PTX that holds many values at a time: all are read before the first is written."""
    reads = "\n".join(f"ld.volatile.global.f32 %f{i}, [%rd1+{4 * i}];" for i in range(VALUES))
    writes = "\n".join(f"st.volatile.global.f32 [%rd1+{4 * i}], %f{i};" for i in range(VALUES))
    return f"""
        .version 8.0
        .target sm_80
        .address_size 64
        .visible .entry copying(.param .u64 pointer) {{
            .reg .f32 %f<{VALUES}>;
            .reg .b64 %rd<2>;
            ld.param.u64 %rd1, [pointer];
            {reads}
            {writes}
            ret;
        }}
    """


@pytest.mark.parametrize("max_registers", [32, 255])
def test_spills_are_counted_where_registers_do_not_do(max_registers: int, tmp_path: Path) -> None:
    source, cubin = tmp_path / "copying.ptx", tmp_path / "copying.cubin"
    source.write_text(copying_kernel())
    compiler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    options = ["--gpu-name=sm_80", f"--maxrregcount={max_registers}"]
    subprocess.run([compiler, *options, source, "-o", cubin], check=True)

    found = aot.count_spills(cubin.read_bytes(), aot.look_into(cubin.read_bytes(), "-res-usage"))
    assert (found > 0) == (max_registers < VALUES)
