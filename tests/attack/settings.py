"""Command lines and descriptions by a hand that means no good: a mistake is one line, and all else works."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import train_server
from runs import NANO
from safetensors.torch import save_file
from shards import picture, write_csv

from attack.harness import Attack, limit_memory, one_line, redirected
from attack.mutations import ALONE, NEWEST, finish, in_a_child, quietly, run_flags
from clipcore.checkpoint import load_checkpoint, load_latest
from clipcore.classify import arguments as classify_arguments
from clipcore.data import prepare, prepare_arguments
from clipcore.data.shards import ImageFormat
from clipcore.evaluate.tasks import class_folders
from clipcore.evaluate.zero_shot import build_zero_shot_classifier
from clipcore.ranks.failures import end_with
from clipcore.run.command_line import build_parser
from clipcore.run.config import TrainConfig
from clipcore.run.folders import resumed_config
from clipcore.run.state import load_run
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.convert import to_hf
from clipcore.towers.descriptions import hf_config
from clipcore.towers.factory import create_model, create_model_from_pretrained
from clipcore.towers.model import CLIP

# Of a process of the attack: three times what it has when everything is imported.
MOST_BYTES = 4 << 30
# A run of two steps makes 300 events (tests/programs/train_server.py); a longer one is told to stop at this.
LAST_EVENT = 1500

# What stands behind a flag; "{folder}" is the case's.
VALUES: dict[str, str] = {
    "empty": "",
    "space": " ",
    "spaces": "   \t ",
    "lines": "a\nb",
    "return": "a\rb",
    "-1": "-1",
    "0": "0",
    "-0": "-0",
    "1": "1",
    "-1.5": "-1.5",
    "0.5": "0.5",
    "1.0": "1.0",
    "1e3": "1e3",
    "1e999": "1e999",
    "-1e999": "-1e999",
    "nan": "nan",
    "1e-320": "1e-320",
    "1e308": "1e308",
    "2**31": str(2**31),
    "2**63 - 1": str(2**63 - 1),
    "2**63": str(2**63),
    "10**30": str(10**30),
    "10**400": str(10**400),
    "10**5000": "1" + "0" * 5000,
    "1_0": "1_0",
    "0x10": "0x10",
    "digit of another script": "\u0663",
    "one half": "\u00bd",
    "unicode": "gr\u00fc\u00df \u4e2d\u6587 \U0001f600 e\u0301",
    "turned around": "\u202egnp.exe",
    "line of unicode": "a\u2028b\u2029c\u0085d",
    "no text": "a\udcff\udc80b",
    "escapes": "\x1b]0;owned\x07\x1b[2J",
    "escapes of one byte": "\x9b2J\x9d0;owned\x9c",
    "above": "..",
    "here": ".",
    "way around": "a/b/../c",
    "home": "~",
    "null device": "/dev/null",
    "zeros": "/dev/zero",
    "input": "/dev/stdin",
    "pipe": "{folder}/pipe",
    "folder": "{folder}/empty",
    "link to itself": "{folder}/loop",
    "no such file": "{folder}/none/none.csv",
    "file of text": "{folder}/text.csv",
    "long name": "x" * 300,
    "long": "x" * 5000,
    "long path": "x/" * 2500,
    "option": "--x",
    "own option": "--quiet",
    "dash": "-",
    "dashes": "--",
    "JSON": '{"a": [1, null]}',
    "quotes": "\"'`",
    "shell": "$HOME `id` ; $(id) | cat > a",
    "formats": "%s %n {} {0} {a}",
    "range": "{0..999999999}",
    "braces": "{{{",
    "list": "a::b",
    "lists": "::::",
    "commas": ",,,",
    "stars": "**/*",
    "None": "None",
    "True": "True",
    "latest": "latest",
}
# Eight of which any flag that takes no value gets.
FOR_SWITCHES = ("empty", "0", "1", "True", "escapes", "lines", "option", "no text")
# What would be a long run or a large one if it is taken, and says nothing new.
LEFT_OUT = {("--workers", "1_0")}


def hostile(value: str, folder: Path) -> str:
    """Return a value for a case."""
    return value.replace("{folder}", str(folder))


def write_strange_files(folder: Path) -> None:
    """Make what the values of a case name."""
    os.mkfifo(folder / "pipe")
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "text.csv").write_text("no table,\x1b[2J\n\x00")


def watch_writes(folder: Path) -> None:
    """Say on standard output what this process writes, makes or removes outside of a folder, links resolved."""
    allowed = (f"{folder.resolve()}{os.sep}", "/dev/", "/proc/")
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    names = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link"}
    names |= {"os.truncate", "os.chmod", "os.chown"}

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event in names or (event == "open" and int(arguments[2] or 0) & flags)
        if not is_write or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, where = os.fsdecode(arguments[0]), [a for a in arguments[1:] if type(a) is int]
        if event != "open" and where and where[-1] >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{where[-1]}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        if not f"{os.path.realpath(parent)}{os.sep}{name}{os.sep}".startswith(allowed):
            print(f"WROTE {event} {path!r}")

    sys.addaudithook(see)


def ended(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str], folder: Path
) -> tuple[int, str]:
    """Call a command in a process of its own, with little memory, whose writes are watched; return status and output."""
    here = folder / "here"
    here.mkdir()

    def act() -> int:
        os.chdir(here)
        os.environ |= {"HOME": str(here), "XDG_CACHE_HOME": str(here), "TMPDIR": str(here)}
        tempfile.tempdir, sys.dont_write_bytecode = None, True
        limit_memory(MOST_BYTES)
        watch_writes(folder)
        train_server.count_events({LAST_EVENT: signal.SIGTERM}, None)
        return command(arguments)

    return in_a_child(act, folder / "output")


def steering(text: str) -> list[str]:
    """Return the characters that steer a terminal or turn the direction of a line, the ends of lines aside."""
    kinds = {"Cc", "Zl", "Zp"}
    turning = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return [
        c
        for c in text
        if c not in "\n\t" and (unicodedata.category(c) in kinds or ord(c) in turning)
    ]


def mistake(text: str, program: str, value: str) -> str:
    """Return the one line that says what is wrong; raise where it is none, or steers a terminal."""
    assert "Traceback" not in text, text[-300:]
    assert not steering(text), f"it prints {steering(text)[:5]}: {text[-300:]!r}"
    # argparse says how a command is used before it says what is wrong.
    begins = (f"{program}: error: ", f"python -m {program}: error: ", f"{program}: stopped: ")
    *before, last = text.splitlines()
    lines = [line for line in (*before, last) if line.startswith(begins)]
    assert lines == [last], text[-300:]
    # What the user wrote comes back whole, escaped at most.
    assert len(last) < 1000 + 6 * len(value), f"a line of {len(last)} characters"
    return last


class CommandLines(Attack):
    """Each flag of a command with each hostile value, in a command line that is right without it."""

    fast: ClassVar[int] = 75
    limit_s: ClassVar[float] = 60.0
    program: ClassVar[str]
    module: ClassVar[str] = ""  # that holds its `main`, where it is not the program itself
    statuses: ClassVar[set[int]] = {2}

    def cases(self) -> Mapping[str, Any]:
        draw = random.Random(0)
        cases: dict[str, Any] = {}
        for flag, is_switch in self.flags().items():
            for name in FOR_SWITCHES if is_switch else VALUES:
                if (flag, name) not in LEFT_OUT:
                    # Both ways to write it; argparse reads a dash differently.
                    cases[f"{flag}, {name}"] = (flag, VALUES[name], draw.random() < 0.6)
        for name, value in VALUES.items():
            cases[f"a word more, {name}"] = (None, value, False)
        return cases

    def flags(self) -> dict[str, bool]:
        """Return the flags, and whether each is a switch."""
        raise NotImplementedError

    def arguments(self, folder: Path) -> list[str]:
        """Return a command line that is right."""
        raise NotImplementedError

    def check_success(self, flag: str | None, value: str, folder: Path) -> str:
        """Raise unless what a command that ended well has left is right; return the outcome."""
        return f"{self.program} takes it"

    def attempt(self, what: Any, folder: Path) -> str:
        flag, value, is_joined = what
        write_strange_files(folder)
        value = hostile(value, folder)
        more = [value] if flag is None else [f"{flag}={value}"] if is_joined else [flag, value]
        line = self.arguments(folder)
        # A positional argument is replaced.
        line = [value, *line[1:]] if flag == "" else [*line, *more]
        shared = listing(self.folder)
        main = importlib.import_module(self.module or self.program).main
        status, text = ended(main, line, folder)

        wrote = [said for said in text.splitlines() if said.startswith("WROTE")]
        assert not wrote, f"something was written outside of the case's folder: {wrote[:3]}"
        assert listing(self.folder) == shared, "what cases share has changed"
        if status == 0:
            assert "Traceback" not in text and not steering(text), text[-300:]
            return self.check_success(flag, value, folder)
        if status == 128 + signal.SIGTERM:
            assert "go on with: python -m clipcore.train --resume" in text, text[-300:]
            return f"{self.program} would go on for long"
        assert status in self.statuses, f"status {status}: {text[-300:]}"
        said = mistake(text, self.program, value)
        assert status != 1 or " not finite" in said, said
        return f"{self.program} ends with {status}"


def listing(folder: Path) -> dict[str, int]:
    """Return all that lies in a folder that cases share, with the times of the last changes."""
    parts = [part for part in folder.iterdir() if part.name != "cases"]
    paths = [path for part in parts for path in (part, *part.rglob("*"))]
    return {str(path): path.lstat().st_mtime_ns for path in paths}


class TrainLines(CommandLines):
    """The command lines of ``clipcore.train``: of a run of two steps without the flag."""

    program: ClassVar[str] = "clipcore.train"
    statuses: ClassVar[set[int]] = {1, 2}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table = write_csv(folder / "data", num_pairs=8)

    def flags(self) -> dict[str, bool]:
        actions = [action for action in build_parser()._actions if action.dest != "help"]
        return {action.option_strings[0]: action.nargs == 0 for action in actions}

    def arguments(self, folder: Path) -> list[str]:
        line = ["--train-data", str(self.table), *NANO, "--logs", str(folder / "logs")]
        return [
            *line,
            *"--name r --batch-size 4 --epochs 1 --train-num-samples 8 --lr 1e-3".split(),
        ]

    def check_success(self, flag: str | None, value: str, folder: Path) -> str:
        kinds = {a.option_strings[0]: a.type for a in build_parser()._actions if a.option_strings}
        kind = kinds.get(flag or "")
        if kind in (int, float):
            number = kind(value)
            assert math.isfinite(number) or flag == "--grad-clip-norm", f"{flag} is {number}"
        runs = [path.parent for path in folder.rglob("metrics.jsonl")]
        assert len(runs) == 1, f"runs in {runs}"
        if flag not in ("--save-frequency", "--keep-checkpoints"):
            newest = load_latest(runs[0] / "checkpoints")
            assert newest is not None
            for group, tensors in newest.tensors.items():
                for name, tensor in tensors.items():
                    assert tensor.isfinite().all(), f"{group}: {name} was saved, not finite"
        return f"{self.program} takes it"


class ClassifyLines(CommandLines):
    """The command lines of ``clipcore.classify``."""

    fast: ClassVar[int] = 25
    program: ClassVar[str] = "clipcore.classify"
    module: ClassVar[str] = "clipcore.classify.__main__"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        finish(run_flags(folder, "--name", "run"), folder / "output")
        (folder / "picture.jpg").write_bytes(picture(0)[0])

    def flags(self) -> dict[str, bool]:
        actions = classify_arguments.build_parser()._actions
        return {"".join(a.option_strings[:1]): a.nargs == 0 for a in actions if a.dest != "help"}

    def arguments(self, folder: Path) -> list[str]:
        run = ["--checkpoint", str(self.folder / "run")]
        return [str(self.folder / "picture.jpg"), "--labels", "a red square, a blue line", *run]


class PrepareLines(CommandLines):
    """The command lines of ``clipcore.data.prepare``."""

    fast: ClassVar[int] = 25
    program: ClassVar[str] = "clipcore.data.prepare"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table = write_csv(folder / "data", num_pairs=8)

    def flags(self) -> dict[str, bool]:
        actions = prepare_arguments.build_parser()._actions
        return {"".join(a.option_strings[:1]): a.nargs == 0 for a in actions if a.dest != "help"}

    def arguments(self, folder: Path) -> list[str]:
        line = [str(self.table), "--output", str(folder / "shards")]
        return [*line, *"--shard-size 4 --size 16 --workers 1 --quiet".split()]


# What a file of JSON may hold in place of a value, as it is written there.
JSON_TEXTS: dict[str, str] = {
    "null": "null",
    "true": "true",
    "0": "0",
    "-1": "-1",
    "1.5": "1.5",
    "2.0": "2.0",
    "1e999": "1e999",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "2**24": str(2**24),
    "2**63": str(2**63),
    "10**400": str(10**400),
    "10**4200": str(10**4200),
    "10**5000": "1" + "0" * 5000,
    "1e-320": "1e-320",
    "1e308": "1e308",
    "empty": '""',
    "number as text": '"32"',
    "zero byte": '"\\u0000"',
    "half of a character": '"\\ud800"',
    "escapes": '"\\u001b]0;owned\\u0007"',
    "lines": '"a\\nb\\u2028c"',
    "long": '"' + "x" * 20_000 + '"',
    "path": '"../../etc/passwd"',
    "markup": '"<script>alert(1)</script>"',
    "empty list": "[]",
    "list": "[1, 2, 3]",
    "list of lists": "[[[[]]]]",
    "list of strings": '["a", "b"]',
    "three numbers": "[0.5, -1e999, 0]",
    "empty object": "{}",
    "object": '{"a": {"b": null}}',
    "depth": "[" * 900 + "]" * 900,
    "great depth": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "not JSON": "undefined",
}
_MARK = "@here@"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the ways to all values in a value of JSON, itself last."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))
    yield path


def words(keys: Sequence[str]) -> list[str]:
    """Return the words that keys consist of, as a sentence has them."""
    return [key.replace("_", " ") for key in keys]


def rewritten(content: Any, draw: random.Random) -> tuple[str, tuple[str, ...]]:
    """Return a JSON text with one change in it, and the keys that the change is about."""
    text = json.dumps(content)
    kind = draw.choice(["value"] * 6 + ["removed", "renamed", "added", "twice", "swapped", "text"])
    path = draw.choice(list(places(content)))
    if kind == "text":
        return changed_text(text, draw), ()
    if not path:
        return JSON_TEXTS[draw.choice(list(JSON_TEXTS))], ()

    content, key = json.loads(text), path[-1]
    keys = [str(part) for part in path if isinstance(part, str)]
    holder = functools.reduce(lambda value, part: value[part], path[:-1], content)
    raw = JSON_TEXTS[draw.choice(list(JSON_TEXTS))]
    if kind == "removed" or (kind in ("renamed", "added", "twice") and isinstance(holder, list)):
        del holder[key]
    elif kind == "renamed":
        name = draw.choice(
            [key.upper(), f"{key} ", key[:-1], "\u0435mbed_dim", "\x1b[2J", "", "__class__"]
        )
        holder[name] = holder.pop(key)
    elif kind == "added":
        holder[draw.choice(["x", "__proto__", "\x1b[2J", "a\nb", "model_type", "vision_cfg"])] = (
            _MARK
        )
    elif kind == "twice":
        mark = json.dumps(_MARK)
        raw = f"{json.dumps(holder[key])}, {json.dumps(key)}: {raw}"
        assert mark not in raw
        holder[key] = _MARK
    elif kind == "swapped":
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
        keys.append(str(other))
    else:
        holder[key] = _MARK
    return json.dumps(content).replace(json.dumps(_MARK), raw), tuple(keys)


def changed_text(text: str, draw: random.Random) -> str:
    """Return a text with something in it that JSON does not allow, or whose encoding is another."""
    at = draw.randrange(len(text))
    return draw.choice(
        [
            text[:at],
            text[:at] + text[at + 1 :],
            text[:at] + draw.choice('{}[],:"\\0-') + text[at:],
            "\ufeff" + text,
            text + text,
            text + "\0",
            f"[{text}]",
            json.dumps(text),
            "".join(f"{c}\0" for c in text),
            f"{text[:at]}/* {text[at:]} */",
            text.replace('"', "'"),
            " " * 20_000_000 + text,
        ]
    )


class Descriptions(Attack):
    """One change in a file of JSON that says what a model, its images, a run, its classes or its shards are."""

    fast: ClassVar[int] = 75

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = create_model("ViT-nano-8-32")
        self._write_models(folder, model)
        finish(run_flags(folder, "--name", "run"), folder / "output")
        for name, number in (("ant", 0), ("red_bee", 1)):
            (folder / "classes" / name).mkdir(parents=True)
            (folder / "classes" / name / "0.jpg").write_bytes(picture(number)[0])
        classes = {"ant": "an ant", "red_bee": "a bee"}
        (folder / "classes" / "classes.json").write_text(json.dumps(classes))
        templates = ["a photo of a {}.", "{c}, drawn"]
        (folder / "classes" / "templates.json").write_text(json.dumps(templates))
        write_csv(folder / "prepared", num_pairs=8)
        self._prepare(folder / "prepared")

    def cases(self) -> Mapping[str, Any]:
        files: dict[str, tuple[Callable[[Path, str], str], int]] = {
            "hub/open_clip_config.json": (self._try_model, 500),
            "transformers/config.json": (self._try_model, 400),
            "transformers/preprocessor_config.json": (self._try_model, 200),
            "parts/model.safetensors.index.json": (self._try_model, 150),
            "run/config.json": (self._try_settings, 400),
            f"run/{NEWEST}/state.json": (self._try_run, 300),
            f"run/{NEWEST}/manifest.json": (self._try_manifest, 200),
            "classes/classes.json": (self._try_classes, 150),
            "classes/templates.json": (self._try_classes, 150),
            "prepared/shards/manifest.json": (self._try_prepared, 250),
        }
        return {
            f"{path}, {seed}": (path, seed, attempt)
            for path, (attempt, number) in files.items()
            for seed in range(number)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        path, seed, attempt = what
        limit_memory(MOST_BYTES)
        top = Path(path).parts[0]
        shutil.copytree(self.folder / top, folder / top)
        content = json.loads((self.folder / path).read_text())
        if path.endswith("manifest.json"):
            content.pop("sha256", None)
        text, keys = rewritten(content, random.Random(f"{path} {seed}"))
        (folder / path).write_text(text)
        if top == "run" and "checkpoints" in path:
            sign(folder / path)

        name = Path(path).name
        try:
            with redirected(folder / "output"):
                outcome = quietly(lambda: attempt(folder, path))
        except ValueError as error:
            with redirected(folder / "said"):
                end_with("clipcore.train", error, "")
            said = one_line((folder / "said").read_text(errors="replace"))
            # A state and a manifest are known by their checkpoint, a description by its folder.
            known = (name, Path(NEWEST).name, f"{(folder / path).parent} ", *keys, *words(keys))
            assert any(word and word in said for word in known), f"it names neither: {said}"
            return f"{name} is refused"
        said = (folder / "output").read_text(errors="replace")
        assert "Traceback" not in said and not steering(said), said[-300:]
        return f"{name}: {outcome}"

    def _write_models(self, folder: Path, model: CLIP) -> None:
        hub, hf, parts = (folder / name for name in ("hub", "transformers", "parts"))
        for path in (hub, hf, parts):
            path.mkdir()
        save_file(model.state_dict(), hub / "open_clip_model.safetensors")
        images = {"size": 32, "mode": "RGB", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
        images |= {"interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0}
        content = {"model_cfg": model.config.to_dict(), "preprocess_cfg": images}
        (hub / "open_clip_config.json").write_text(json.dumps(content))

        save_file(to_hf(model.state_dict()), hf / "model.safetensors")
        (hf / "config.json").write_text(json.dumps(hf_config(model.config)))
        square = {"height": 32, "width": 32}
        images = {"crop_size": square, "do_center_crop": True, "do_convert_rgb": True}
        images |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
        images |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        images |= {"rescale_factor": 1 / 255, "size": {"shortest_edge": 32}}
        (hf / "preprocessor_config.json").write_text(json.dumps(images))

        halves = [dict(list(model.state_dict().items())[start::2]) for start in range(2)]
        places = {}
        for number, half in enumerate(halves):
            save_file(half, parts / f"part-{number}.safetensors")
            places |= dict.fromkeys(half, f"part-{number}.safetensors")
        content = {"metadata": {"total_size": 1}, "weight_map": places}
        (parts / "model.safetensors.index.json").write_text(json.dumps(content))

    def _try_model(self, folder: Path, path: str) -> str:
        model, _ = create_model_from_pretrained(None, (folder / path).parent)
        return works(model)

    def _try_settings(self, folder: Path, path: str) -> str:
        given = frozenset({"resume"})
        config = resumed_config(folder / "run", TrainConfig(resume="latest"), given, ALONE)
        assert isinstance(config, TrainConfig)
        return "settings are taken"

    def _try_run(self, folder: Path, path: str) -> str:
        model, _, tokenizer = load_run(folder / "run")
        assert model.encode_text(tokenizer(["a"])).shape == (1, model.config.embed_dim)
        return works(model)

    def _try_manifest(self, folder: Path, path: str) -> str:
        latest = load_latest(folder / "run" / "checkpoints")
        assert latest is not None
        expected = load_checkpoint(self.folder / "run" / latest.path.relative_to(folder / "run"))
        for group in latest.tensors:
            for name, tensor in latest.tensors[group].items():
                assert torch.equal(tensor, expected.tensors[group][name])
        load_checkpoint((folder / path).parent)
        return "a checkpoint is read"

    def _try_classes(self, folder: Path, path: str) -> str:
        task = class_folders(folder / "classes")
        assert len(task.classnames) == 2
        model = create_model("ViT-nano-8-32").eval()
        classifier_EC = build_zero_shot_classifier(
            model, byte_tokenizer(), task.classnames, task.templates
        )
        assert classifier_EC.isfinite().all() and classifier_EC.shape[1] == 2
        return "classes are taken"

    def _prepare(self, folder: Path) -> str:
        settings = prepare.Settings(ImageFormat("jpeg", size=16), shard_size=4)
        manifest = prepare.prepare(str(folder / "pairs.csv"), folder / "shards", settings)
        return prepare.summary(manifest, manifest.made, 1.0)

    def _try_prepared(self, folder: Path, path: str) -> str:
        print(self._prepare(folder / "prepared"))
        for shard in (self.folder / "prepared" / "shards").glob("*.tar"):
            assert (folder / "prepared" / "shards" / shard.name).read_bytes() == shard.read_bytes()
        return "shards are the same"


def sign(path: Path) -> None:
    """Make the manifest of a checkpoint right for a file of it, or for its own content, as far as it has any."""
    manifest = path.with_name("manifest.json")
    try:
        fields = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(fields, dict):
        return
    if path != manifest:
        content = path.read_bytes()
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        fields["files"][path.name] = record
    fields.pop("sha256", None)
    with contextlib.suppress(RecursionError):
        body = json.dumps(fields, sort_keys=True).encode()
        signed = {**fields, "sha256": hashlib.sha256(body).hexdigest()}
        manifest.write_text(json.dumps(signed, indent=2, sort_keys=True) + "\n")


def works(model: CLIP) -> str:
    """Return that a model gives features; of one with many positions nothing is computed."""
    config, size = model.config, model.config.vision.image_size
    if (size // (config.vision.patch_size or 32)) ** 2 > 4096 or config.text.context_length > 4096:
        return "a large model is taken"
    with torch.inference_mode():
        features_1E = model.encode_image(torch.zeros(1, 3, size, size), normalize=True)
        assert features_1E.shape == (1, config.embed_dim) and features_1E.isfinite().all()
        tokens = torch.zeros(1, config.text.context_length, dtype=torch.long)
        features_1E = model.encode_text(tokens, normalize=True)
        assert features_1E.shape == (1, config.embed_dim) and features_1E.isfinite().all()
    assert all(map(math.isfinite, (*model.images.get("mean", ()), *model.images.get("std", ()))))
    return "a model works"
