"""Packages that are installed, and folders that only have their names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from clipcore.packages import package_folder

pytestmark = pytest.mark.fast


def test_a_folder_of_a_packages_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("no_such_package") is not None
    assert package_folder("no_such_package") is None and package_folder("not_even_a_folder") is None


def test_a_package_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package/__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("some_package") == tmp_path / "some_package"
    assert "some_package" not in sys.modules
