"""Files that are whole on the disk or as they were: the order of system calls, links, refusals."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import open_descriptors

from clipcore.files import (
    NotRegularError,
    make_directory,
    open_own,
    open_regular,
    read_regular,
    write_durably,
    written_aside,
)

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
    temporary = calls[0][1]
    assert re.fullmatch(r"\.config\.json\.[0-9a-f]{8}\.tmp", temporary)
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", "b")]
    assert os.listdir(folder) == ["config.json"]
    assert (folder / "config.json").read_bytes() == b"new"


def test_links_are_replaced_and_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "config.json").symlink_to(victim)
    write_durably(tmp_path / "config.json", b"new")
    assert victim.read_text() == "kept" and not (tmp_path / "config.json").is_symlink()
    assert (tmp_path / "config.json").read_bytes() == b"new"

    # Nor one of the name that is used meanwhile, which nobody can know.
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".config.json.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "config.json", b"newer")
    assert victim.read_text() == "kept" and (tmp_path / "config.json").read_bytes() == b"new"


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


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert (
        read_regular(tmp_path / "link") == b"content"
        and read_regular(tmp_path / "file", 3) == b"con"
    )
    num_open = open_descriptors()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, reason in (
            (tmp_path / "pipe", "Not a regular file; write what it holds to one"),
            (Path("/dev/zero"), "Not a regular file; write what it holds to one"),
            (tmp_path, "Is a directory"),
        ):
            with pytest.raises(NotRegularError) as caught:
                open_regular(path)
            assert (caught.value.strerror, caught.value.filename) == (reason, str(path))
        with pytest.raises(OSError):
            open_regular(tmp_path / "socket")
    assert open_descriptors() <= num_open


def test_a_runs_own_file_is_no_link(tmp_path):
    target = tmp_path / "of the user"
    target.write_text("kept")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="is a symbolic link, which is not followed") as caught:
        open_own(tmp_path / "link", os.O_WRONLY | os.O_TRUNC)
    assert caught.value.filename == str(tmp_path / "link") and target.read_text() == "kept"
    os.close(open_own(tmp_path / "new", os.O_WRONLY))
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_an_error_of_writing_names_the_file_itself(call, tmp_path, monkeypatch):
    """Not the name aside, and not nothing, as the system's own errors of writing do."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise full

    path = tmp_path / "config.json"
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if call == "open":
        path = tmp_path / "none" / "config.json"
    with pytest.raises(OSError, match=r"No (space left|such file)") as caught:
        if call == "write":
            with written_aside(path):
                fail()
        else:
            write_durably(path, b"x")
    assert caught.value.filename == str(path)


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, written_aside(tmp_path / "out"):
        (tmp_path / "in").read_bytes()
    assert caught.value.filename == str(tmp_path / "in")
