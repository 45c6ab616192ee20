"""Files that are whole on the disk or as they were: the order of system calls, links, refusals."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipcore.files import make_directory, write_durably

pytestmark = pytest.mark.fast


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Note the calls that decide what a crash leaves, with the name of what they act on."""
    calls: list[tuple[str, str]] = []

    def note(name: str, real: Callable[..., Any], named: Callable[[Any], str]) -> None:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append((name, named(arguments[0])))
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    note("fsync", os.fsync, lambda number: Path(os.readlink(f"/proc/self/fd/{number}")).name)
    note("replace", os.replace, lambda path: Path(path).name)
    return calls


def test_the_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    folder = tmp_path / "a" / "b"
    make_directory(folder)
    assert calls == [("fsync", "a"), ("fsync", tmp_path.name)]
    calls.clear()
    write_durably(folder / "config.json", b"new")
    temporary = f".config.json.{os.getpid()}.tmp"
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", "b")]
    assert os.listdir(folder) == ["config.json"]
    assert (folder / "config.json").read_bytes() == b"new"


def test_links_are_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for name in ("config.json", f".config.json.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_durably(tmp_path / "config.json", b"new")
    assert victim.read_text() == "kept" and not (tmp_path / "config.json").is_symlink()
    assert (tmp_path / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("refused", ["fsync", "replace"])
def test_what_is_refused_leaves_the_old_content_alone(tmp_path, monkeypatch, refused):
    path = tmp_path / "config.json"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, refused, refuse)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]
