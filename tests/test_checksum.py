"""The checksum of a sample's bytes: zlib's, whoever computes it."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable

import pytest
from runs import PROGRAMS, ROOT

from clipcore import native
from clipcore.data import checksum

pytestmark = pytest.mark.fast


@pytest.fixture(params=["compiled here", "as installed"])
def crc32(request, tmp_path) -> Callable[[bytes], int]:
    """Return the source as it is now, and what clipcore uses here: the extension's function or zlib's."""
    if request.param == "as installed":
        return checksum.crc32
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [str(PROGRAMS / "export_checksum.cpp"), str(ROOT / "csrc/checksum.cpp")]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    library = str(tmp_path / "checksum.so")
    subprocess.run([compiler, *flags, *sources, "-o", library], check=True)
    function = ctypes.CDLL(library).checksum
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_size_t], ctypes.c_uint32
    return lambda content: function(content, len(content))


def test_every_length_and_offset_gives_zlibs_checksum(crc32):
    rng = random.Random(0)
    content = rng.randbytes(1 << 16)
    for size in [*range(400), 1000, 4095, 4096, 4097, 65_500]:
        for start in (0, 1, 13):
            part = content[start : start + size]
            assert crc32(part) == zlib.crc32(part), (size, start)
    for part in (bytes(5000), b"\xff" * 5000):
        assert crc32(part) == zlib.crc32(part)


def test_an_extension_without_the_function_or_for_another_torch_is_replaced_by_zlib(monkeypatch):
    def wrong() -> None:
        raise native.WrongBuildError

    class Extension:
        crc32 = staticmethod(lambda content: 7)

    for loaded, expected in ((lambda: None, 0xCBF43926), (wrong, 0xCBF43926), (Extension, 7)):
        monkeypatch.setattr(native, "load", loaded)
        checksum.fastest.cache_clear()
        assert checksum.crc32(b"123456789") == expected
    checksum.fastest.cache_clear()
