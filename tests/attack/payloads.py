"""Files that want to run code, or never end, in every place that a command reads: nothing runs, and it ends in one line."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from runs import NANO
from shards import picture, write_csv, write_parquet, write_tar
from torch import Tensor, nn

from attack.harness import Attack, called, limit_memory, one_line
from clipcore import train
from clipcore.classify.__main__ import main as classify
from clipcore.data import prepare
from clipcore.run.profile import PROFILE_FOLDER, TABLE
from clipcore.tokenizer import main as tokenizer_main
from clipcore.towers.factory import create_model_from_pretrained

# The name of a file, in the folder in which a case runs, that code of a payload would make.
CANARY = "canary"
# Beside what the process has: what a device without an end may take before it is stopped.
_MOST_BYTES = 4 << 30
_STEP = "checkpoints/step_00000002"

# ---------------------------------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------------------------------


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


# Each makes the canary.
CALLS: dict[str, Calls] = {
    "os.system": Calls(os.system, f"touch {CANARY}"),
    "exec": Calls(exec, f"open({CANARY!r}, 'w')"),
    "open": Calls(open, CANARY, "w"),
    "subprocess": Calls(subprocess.check_call, ["touch", CANARY]),
    "os.mkdir": Calls(os.mkdir, CANARY),
    "torch.save": Calls(torch.save, 0, CANARY),
    "numpy": Calls(np.save, f"./{CANARY}", 0),
    "partial": Calls(partial(open, CANARY), "w"),
}


class Overwrites(nn.Module):
    """A module whose own code, in a TorchScript archive, makes the canary."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.w, self.training = state
        torch.save(self.w, "canary")

    def forward(self, x: Tensor) -> Tensor:
        return x


class Loops(Overwrites):
    """A module whose own code never ends."""

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.w, self.training = state
        while True:
            self.w = self.w + 1


def archive_of(module: nn.Module) -> bytes:
    """Return the TorchScript archive of a module."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(module), stream)
    return stream.getvalue()


def saved(content: object, **settings: Any) -> bytes:
    """Return what torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream, **settings)
    return stream.getvalue()


def numpy_file(content: object) -> bytes:
    """Return a file of NumPy with an array of objects."""
    stream = io.BytesIO()
    np.save(stream, np.array([content], dtype=object), allow_pickle=True)
    return stream.getvalue()


def numpy_archive(content: object) -> bytes:
    """Return an archive of NumPy with an array of objects."""
    stream = io.BytesIO()
    np.savez(stream, weights=np.array([content], dtype=object))
    return stream.getvalue()


def pickles() -> dict[str, bytes]:
    """Return files that call a function when they are unpickled, by the way in which they hold it."""
    call = CALLS["os.system"]
    named = {f"calls {name}": saved({"logit_scale": one}) for name, one in CALLS.items()}
    named |= {f"protocol {n}": pickle.dumps(call, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = saved({"logit_scale": call}, _use_new_zipfile_serialization=False)
    named |= {
        "old format": old,
        "beside weights": saved({"state_dict": {"logit_scale": torch.ones(())}, "epoch": call}),
        "as a name": saved({call: torch.ones(())}),
        "behind weights": saved(torch.ones(2)) + pickle.dumps(call),
        "NumPy": numpy_file(call),
        "NumPy archive": numpy_archive(call),
        "compressed": gzip.compress(pickle.dumps(call)),
    }
    return named


# What a reader of tags would take for code.
_TAGGED = {
    "py/object": "os.system",
    "py/reduce": [{"py/function": "os.system"}, [f"touch {CANARY}"]],
}
TAGS: dict[str, bytes] = {
    "JSON tags": json.dumps(_TAGGED).encode(),
    "YAML tags": f"!!python/object/apply:os.system ['touch {CANARY}']\n".encode(),
    "Python": f"__import__('os').system('touch {CANARY}')\n".encode(),
    "shell": f"#!/bin/sh\ntouch {CANARY}\n".encode(),
}

# ---------------------------------------------------------------------------------------------------------------------
# What is no file
# ---------------------------------------------------------------------------------------------------------------------


def _socket(path: Path) -> None:
    # A name of a socket has at most some hundred bytes.
    before = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(before)


def _linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


SPECIALS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "link to a pipe": _linked_pipe,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("absent"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------

# Puts a payload at a path.
_Put = Callable[[Path], object]


def _write(content: bytes) -> _Put:
    return lambda path: path.write_bytes(content)


# The name that a payload gets, and the arguments of the command, in a folder with pairs.csv, picture.jpg, run and classes.
CLASSIFY: dict[str, tuple[str, list[str]]] = {
    "weights": ("w.pt", ["picture.jpg", "--labels", "a,b", "--pretrained", "w.pt"]),
    "weights of a model": (
        "w.bin",
        ["picture.jpg", "--labels", "a,b", "--model", "ViT-B-32", "--pretrained", "w.bin"],
    ),
    "safetensors": (
        "w.safetensors",
        ["picture.jpg", "--labels", "a,b", "--pretrained", "w.safetensors"],
    ),
    "folder of weights": (
        "weights/open_clip_pytorch_model.bin",
        ["picture.jpg", "--labels", "a,b", "--pretrained", "weights"],
    ),
    "description": (
        "weights/open_clip_config.json",
        ["picture.jpg", "--labels", "a,b", "--pretrained", "weights"],
    ),
    "index of weights": (
        "weights/model.safetensors.index.json",
        ["picture.jpg", "--labels", "a,b", "--pretrained", "weights"],
    ),
    "picture": ("x.jpg", ["x.jpg", "--labels", "a,b", "--checkpoint", "run"]),
    "labels": ("labels.txt", ["picture.jpg", "--labels", "labels.txt", "--checkpoint", "run"]),
    "vocabulary": (
        "v.txt.gz",
        [
            "picture.jpg",
            "--labels",
            "a,b",
            "--pretrained",
            f"run/{_STEP}/model.safetensors",
            "--bpe-path",
            "v.txt.gz",
        ],
    ),
    "run": ("other", ["picture.jpg", "--labels", "a,b", "--checkpoint", "other"]),
}
# Of a run's folder, files that its readers open.
RUN_FILES = (
    "vocabulary.txt.gz",
    f"{_STEP}/manifest.json",
    f"{_STEP}/state.json",
    f"{_STEP}/model.safetensors",
)
CLASSIFY |= {
    f"a run's {Path(name).name}": (
        f"run/{name}",
        ["picture.jpg", "--labels", "a,b", "--checkpoint", "run"],
    )
    for name in RUN_FILES
}
_DATA = ["--train-data", "pairs.csv"]
TRAIN: dict[str, tuple[str, list[str]]] = {
    "weights": ("w.pt", [*_DATA, "--pretrained", "w.pt"]),
    "tokenizer": ("v.txt.gz", [*_DATA, "--tokenizer", "v.txt.gz"]),
    "run": ("other", [*_DATA, "--resume", "other"]),
    "shard": ("x.tar", ["--train-data", "x.tar"]),
    "csv": ("x.csv", ["--train-data", "x.csv"]),
    "jsonl": ("x.jsonl", ["--train-data", "x.jsonl"]),
    "parquet": ("x.parquet", ["--train-data", "x.parquet"]),
    "shard to validate on": ("x.tar", [*_DATA, "--val-data", "x.tar"]),
    "classes": ("classes/classes.json", [*_DATA, "--imagenet-val", "classes"]),
    "prompts": ("classes/templates.json", [*_DATA, "--imagenet-val", "classes"]),
    "logs": (
        "logs/x/checkpoints/step_00000001/manifest.json",
        [*_DATA, "--resume", "latest"],
    ),
    "picture of a class": ("classes/cat/2.jpg", [*_DATA, "--imagenet-val", "classes"]),
}
TRAIN |= {
    f"a run's {Path(name).name}": (f"run/{name}", [*_DATA, "--resume", "run"])
    for name in (
        *RUN_FILES,
        f"{_STEP}/optimizer.safetensors",
        "config.json",
        "metrics.jsonl",
        ".lock",
        ".launch",
        "report.html",
        f"{PROFILE_FOLDER}/{TABLE}",
    )
}
PREPARE: dict[str, tuple[str, list[str]]] = {
    "shard": ("x.tar", ["x.tar", "--output", "output"]),
    "csv": ("x.csv", ["x.csv", "--output", "output"]),
    "caption": ("folder/0.txt", ["folder", "--output", "output"]),
    "picture": ("folder/0.jpg", ["folder", "--output", "output"]),
    "manifest": ("output/manifest.json", ["folder", "--output", "output"]),
    "metadata": ("folder/metadata.jsonl", ["folder", "--output", "output"]),
    "index": ("pairs.tar.clipcore-index", ["pairs.tar", "--output", "output"]),
    "rows": ("pairs.parquet.clipcore-rows", ["pairs.parquet", "--output", "output"]),
    "lock": ("pairs.parquet.clipcore-rows.lock", ["pairs.parquet", "--output", "output"]),
}
TOKENIZER: dict[str, tuple[str, list[str]]] = {
    "captions": ("captions.txt", ["--train", "captions.txt", "--vocab-size", "600"]),
}
_TRAINING = [*NANO, "--global-batch-size", "4", "--epochs", "1"]
# By command: its ``main``, and what it gets beside the arguments of a place.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "classify": (classify, ["--device=cpu"]),
    "train": (
        train.main,
        [*_TRAINING, "--epochs", "2", "--logs", "logs", "--max-bad-fraction", "0.5"],
    ),
    "prepare": (prepare.main, ["--workers", "1", "--quiet"]),
    "tokenizer": (tokenizer_main, []),
}
PLACES = {"classify": CLASSIFY, "train": TRAIN, "prepare": PREPARE, "tokenizer": TOKENIZER}


class Payloads(Attack):
    """A payload in a place that a command reads: its code does not run, and the command ends with 0, or 2 and one line."""

    fast: ClassVar[int] = 20
    limit_s: ClassVar[float] = 60.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._home = folder / "home"
        self._home.mkdir()
        _write_home(self._home)
        self._pickles = pickles()
        self._archives = {
            "TorchScript": archive_of(Overwrites()),
            "TorchScript, nested": archive_of(nn.Sequential(nn.Linear(2, 2), Overwrites())),
            "TorchScript without an end": archive_of(Loops()),
        }
        self._archives["TorchScript, disguised"] = b"#!/bin/sh\n" + self._archives["TorchScript"]

    def cases(self) -> Mapping[str, Any]:
        code = {
            name: _write(content) for name, content in {**self._pickles, **self._archives}.items()
        }
        some = {
            name: code[name] for name in ("protocol 4", "calls exec", "TorchScript", "compressed")
        }
        text = {name: _write(content) for name, content in TAGS.items()}
        found: dict[str, Any] = {
            f"trusted, {name}": ("trust", name) for name in (*self._pickles, "TorchScript")
        }
        puts: dict[tuple[str, str], Mapping[str, _Put]] = {
            ("classify", "weights"): code,
            ("train", "weights"): some,
            ("classify", "weights of a model"): code,
        }
        for command, places in PLACES.items():
            for place in places:
                # Weights are where code is expected, all others get a part of it.
                put = puts.get(
                    (command, place),
                    some if command == "classify" else {"code": code["protocol 2"]},
                )
                for name, function in {**put, **text, **SPECIALS}.items():
                    if (
                        command == "train"
                        and name in ("Python", "shell", "JSON tags")
                        and "class" not in place
                    ):
                        continue
                    found[f"{command}, {place}, {name}"] = (command, place, function)
        found |= {f"shard of {name}": ("member", name) for name in ("npy", "pt", "pickle", "links")}
        found |= {
            f"model, {name}": ("model", function) for name, function in {**code, **SPECIALS}.items()
        }
        return found

    def attempt(self, what: Any, folder: Path) -> str:
        kind, *rest = what
        # The places' paths are relative, as is the canary's.
        here = shutil.copytree(self._home, folder / "here", symlinks=True)
        os.chdir(here)
        os.environ["XDG_CACHE_HOME"] = str(here / "cache")
        limit_memory(_MOST_BYTES)
        if kind == "trust":
            return self._trust(rest[0])
        if kind == "model":
            outcome = self._make_model(rest[0])
        elif kind == "member":
            outcome = self._read_members(rest[0], folder)
        else:
            outcome = self._call(kind, rest[0], rest[1], folder)
        assert not os.path.lexists(CANARY), "its code has run"
        return outcome

    def _trust(self, name: str) -> str:
        """Read a payload as one does who trusts it; raise unless its code runs, as elsewhere it must not."""
        path = Path("trusted.pt")
        path.write_bytes({**self._pickles, **self._archives}[name])
        # What the code gives back is of no use to its readers.
        for read in (
            torch.jit.load if name == "TorchScript" else partial(torch.load, weights_only=False),
            lambda file: pickle.loads(Path(file).read_bytes()),
            lambda file: pickle.loads(Path(file).read_bytes()[len(saved(torch.ones(2))) :]),
            lambda file: pickle.loads(gzip.decompress(Path(file).read_bytes())),
            partial(np.load, allow_pickle=True),
            lambda file: np.load(file, allow_pickle=True)["weights"],
        ):
            try:
                read(str(path))
            except Exception:
                continue
            if os.path.lexists(CANARY) or os.path.lexists(f"{CANARY}.npy"):
                return "code that runs where it is trusted"
        raise AssertionError("the payload does nothing where it is trusted")

    def _make_model(self, put: _Put) -> str:
        """Make a model of a payload in this process."""
        put(Path("w.pt"))
        try:
            create_model_from_pretrained(None, "w.pt")
        except ValueError as error:
            said = str(error)
            assert type(error) is not ValueError, f"a plain ValueError: {said}"
            assert "w.pt" in said and len(said.splitlines()) == 1 and len(said) < 2000, said
            return "refused"
        raise AssertionError("it was made a model")

    def _read_members(self, kind: str, folder: Path) -> str:
        """Train on a shard whose members hold payloads."""
        call = CALLS["os.system"]
        contents = {"npy": numpy_file(call), "pt": saved(call), "pickle": pickle.dumps(call)}
        members = [(f"{n}.{suffix}", data) for n in range(4) for suffix, data in _pair(n)]
        if kind == "links":
            Path("x.tar").write_bytes(Path(write_tar(Path("y.tar"), members)).read_bytes())
            _append_links(Path("x.tar"))
        else:
            members += [(f"5.{kind}", contents[kind]), ("5.txt", b"a payload")]
            write_tar(Path("x.tar"), members)
        return self._call("train", "shard", lambda _: None, folder)

    def _call(self, command: str, place: str, put: _Put, folder: Path) -> str:
        """Call a command with a payload in a place; return how it ended."""
        name, arguments = PLACES[command][place]
        path, output = Path(name), folder / "output"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        put(path)
        main, more = COMMANDS[command]
        status, text = ended(main, [*more, *arguments], output)

        assert status in (0, 2), f"the exit status is {status}: {text[-1000:]}"
        if status == 0:
            assert "Traceback" not in text, text[-2000:]
            return f"{command} ends well"
        line = one_line(text)
        assert "memory" not in line, line
        return f"{command} refuses"


def ended(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str], output: Path
) -> tuple[int, str]:
    """Call a command's ``main`` in a process of its own; return its status and what it wrote."""
    child = os.fork()
    if not child:
        status = 1
        try:
            status, _ = called(command, arguments, output)
        except BaseException:
            with output.open("a") as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, output.read_text(errors="replace")


def _pair(number: int) -> list[tuple[str, bytes]]:
    data, caption = picture(number)
    return [("jpg", data), ("txt", caption.encode())]


def _append_links(path: Path) -> None:
    """Put a link to a file outside behind the members of a shard."""
    import tarfile

    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("7.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def _write_home(home: Path) -> None:
    """Write what commands read beside a payload: pairs, a picture, a run, class folders, and weights of another model."""
    table = write_csv(home, 8)
    (home / "picture.jpg").write_bytes(picture(0)[0])
    for number, name in itertools.product(range(2), ("cat", "dog")):
        path = home / "classes" / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number)[0])
    (home / "folder").mkdir()
    for number in range(4):
        for suffix, data in _pair(number):
            (home / "folder" / f"{number}.{suffix}").write_bytes(data)
    write_parquet(home, 4)
    write_tar(
        home / "pairs.tar", [(f"{n}.{suffix}", d) for n in range(4) for suffix, d in _pair(n)]
    )
    (home / "weights").mkdir()
    (home / "weights" / "open_clip_pytorch_model.bin").write_bytes(
        saved({"logit_scale": torch.ones(())})
    )

    # In a process of its own, as this one must not train before it is forked.
    arguments = ["--train-data", str(table), "--logs", str(home), "--name", "run", *_TRAINING]
    status, text = ended(train.main, arguments, home / "run.txt")
    assert status == 0, text
