"""Bicubic resizing: the compiled kernel gives Pillow's bits, or is not used."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from runs import PROGRAMS, ROOT

from clipcore.data import resample
from clipcore.data.resample import (
    Kernel,
    agrees_with_pillow,
    by_shape,
    compiled_kernel,
    resize_bicubic,
    rows_first,
)
from clipcore.data.transforms import ImageTransform


@pytest.fixture(scope="module", params=["compiled here", "clipcore._C"])
def kernel(request, tmp_path_factory) -> Kernel:
    """Return the source as it is now, and as the installed extension has it."""
    if request.param == "clipcore._C":
        if (installed := compiled_kernel()) is None:
            pytest.skip("clipcore._C is not built: pip install -e .")
        return installed
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("resample")
    sources = [str(PROGRAMS / "export_resample.cpp"), str(ROOT / "csrc/resample.cpp")]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / "resample.so")], check=True)
    function = ctypes.CDLL(str(folder / "resample.so")).resample
    pointer, number = ctypes.c_void_p, ctypes.c_int
    sizes = [number, number]
    function.argtypes = [pointer, ctypes.c_int64, *sizes, pointer, *sizes, ctypes.c_bool]

    def call(pixels: np.ndarray, width: int, height: int, columns_first: bool) -> np.ndarray:
        planes = np.empty((3, height, width), np.uint8)
        rows, columns, _ = pixels.shape
        source, result = pixels.ctypes.data, planes.ctypes.data
        stride = pixels.strides[0]
        function(source, stride, columns, rows, result, width, height, columns_first)
        return planes

    return call


@pytest.fixture
def resize(monkeypatch, kernel) -> list[tuple[np.ndarray, int, int]]:
    """Use the kernel, in the order of this Pillow; return the list of its calls."""
    exact = next(r for r in (by_shape(kernel), rows_first(kernel)) if agrees_with_pillow(r))
    calls = []
    monkeypatch.setattr(
        resample, "exact_resize", lambda: lambda *rest: (calls.append(rest), exact(*rest))[1]
    )
    return calls


def pillows(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


SIZES = [  # from width, height, to width, height
    (500, 375, 224, 224),
    (341, 256, 224, 224),
    (224, 224, 224, 224),
    (224, 300, 224, 200),
    (300, 224, 200, 224),
    (20, 30, 224, 224),
    (1, 1, 33, 17),
    (1, 50, 7, 50),
    (900, 1, 31, 1),
    (1000, 700, 3, 2),
    (33, 65, 32, 64),
    (333, 500, 224, 224),  # in Pillow 13 the columns first, as in the next two
    (5, 500, 3, 224),
    (70, 200, 90, 33),
    (2000, 40, 64, 64),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_pictures_are_pillows_to_the_bit(resize, sizes):
    width, height, *size = sizes
    rng = np.random.default_rng(width)
    # Black and white noise overshoots at both ends of the range.
    for pixels in (
        rng.integers(0, 256, (height, width, 3), np.uint8),
        rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255),
    ):
        for picture in (pixels, Image.fromarray(pixels)):
            assert np.array_equal(resize_bicubic(picture, *size), pillows(pixels, *size))
    assert len(resize) == 4


def test_random_sizes_and_parts_of_larger_pictures(resize):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (400, 400, 3), np.uint8)
    whole.flags.writeable = False
    for _ in range(150):
        top, left, height, width, *size = rng.integers(1, [100, 100, 300, 300, 260, 260]).tolist()
        part = whole[top : top + height, left : left + width]
        assert np.array_equal(resize_bicubic(part, *size), pillows(part, *size))
    assert len(resize) == 150


def test_crops_are_the_same_with_and_without_the_kernel(monkeypatch, resize):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)

    def crops() -> list[np.ndarray]:
        return [
            ImageTransform(48, **{"is_train": True, **settings}).crop(
                picture, np.random.default_rng(1)
            )
            for settings in ({}, {"resize": 64}, {"is_train": False})
            for picture in (pixels, Image.fromarray(pixels))
        ]

    fast = crops()
    assert len(resize) == 6
    monkeypatch.setattr(resample, "exact_resize", lambda: None)
    assert all(np.array_equal(one, other) for one, other in zip(fast, crops(), strict=True))
    assert len(resize) == 6


def test_grey_pictures_are_pillows(monkeypatch):
    monkeypatch.setattr(resample, "exact_resize", lambda: lambda *_: pytest.fail("called"))
    grey = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)
    for picture in (grey, Image.fromarray(grey)):
        assert np.array_equal(np.asarray(resize_bicubic(picture, 30, 20)), pillows(grey, 30, 20))


def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch, kernel):
    def off_by_one(*rest: object) -> np.ndarray:
        planes = kernel(*rest).copy()
        planes[1, 5, 5] ^= 1
        return planes

    for function, expected in ((kernel, True), (off_by_one, False)):
        monkeypatch.setattr(resample, "compiled_kernel", lambda function=function: function)
        resample.exact_resize.cache_clear()
        assert (resample.exact_resize() is not None) == expected
    monkeypatch.undo()
    resample.exact_resize.cache_clear()


def test_the_extension_refuses_what_it_cannot_read():
    if (installed := compiled_kernel()) is None:
        pytest.skip("clipcore._C is not built: pip install -e .")
    pixels = np.zeros((4, 6, 3), np.uint8)
    for wrong in (pixels[..., 0], pixels.astype(np.float32), pixels[:, ::2], pixels[:0]):
        with pytest.raises(ValueError, match="resample_bicubic takes"):
            installed(wrong, 2, 2, False)
    with pytest.raises(ValueError, match="positive sides"):
        installed(pixels, 0, 2, False)
