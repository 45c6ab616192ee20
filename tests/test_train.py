"""Whole runs: train, stop in every way, resume bit for bit, on every kind of data; one clear line for each mistake."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import (
    NANO,
    PROGRAMS,
    ROOT,
    assert_same_bits,
    final_state,
    leave_process_alone,
    wait_until,
)
from safetensors.torch import load_file, save_file
from shards import write_csv, write_shards
from torch.overrides import TorchFunctionMode

from clipcore import train
from clipcore.checkpoint import latest_checkpoint
from clipcore.run import verify
from clipcore.run.config import ConfigError
from clipcore.run.metrics import read_metrics
from clipcore.run.state import load_run
from clipcore.run.train_step import TrainingStep
from clipcore.tokenizer import Tokenizer, train_tokenizer
from clipcore.towers.factory import create_model, create_model_from_pretrained


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=40)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), num_shards=3, pairs_per_shard=14)


def flags(tmp_path: Path, name: str, data: str | Path, **settings: object) -> list[str]:
    """Return the command line of a small run."""
    settings = {"batch_size": 8, "epochs": 4, "lr": 1e-3, "save_every_steps": 1, **settings}
    line = ["--logs", str(tmp_path), "--name", name, "--train-data", str(data), *NANO]
    for key, value in settings.items():
        if value is None:
            continue
        flag = f"--{key.replace('_', '-')}"
        line += [flag] if value is True else [flag, str(value)]
    return line


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"workers": 2, "force_patch_dropout": 0.5, "grad_clip_norm": 0.5},
        {"ema_decay": 0.9, "grad_checkpointing": True, "precision": "amp_bf16"},
        {"model": "RN-nano-32", "lock_text": True},
        {"precision": "amp", "lr_scheduler": "const-cooldown", "epochs_cooldown": 1},
        {"batch_size": 3, "accum_freq": 3, "force_patch_dropout": 0.5, "siglip": True},
    ],
    ids=[
        "plain",
        "workers+dropout+clip",
        "ema+checkpointing+bf16",
        "resnet+locked",
        "fp16+cooldown",
        "micro-batches+dropout+siglip",
    ],
)
def test_stopped_by_sigterm_and_resumed_is_the_unbroken_run(server, table, tmp_path, settings):
    num_events = server.counted(flags(tmp_path, "straight", table, **settings), tmp_path / "a")
    steps, _ = read_metrics(tmp_path / "straight")
    num_steps = 4 * (40 // (settings.get("batch_size", 8) * settings.get("accum_freq", 1)))
    assert [row["step"] for row in steps] == list(range(1, num_steps + 1))

    line = flags(tmp_path, "broken", table, **settings)
    # A quarter of the run and the rest of a step, three times, is less than all of its steps.
    for _ in range(3):
        resumed = [*line, "--resume", "latest"]
        run = server.start(resumed, tmp_path / "b", signals=[(num_events // 4, signal.SIGTERM)])
        assert run.wait() == 143, run.text
    assert server.run([*line, "--resume", "latest"], tmp_path / "b")[0] == 0
    assert_same_bits(tmp_path / "straight", tmp_path / "broken")


def test_a_global_batch_is_the_same_however_it_goes_through_the_towers(server, table, tmp_path):
    """At once, accumulated, or as planned; and a run goes on as it was planned."""
    settings = {
        "direct": {},
        "accumulated": {"batch_size": 2, "accum_freq": 4},
        "planned": {"batch_size": None, "global_batch_size": 8, "verify_gradients": True},
    }
    told, logs = {}, {}
    for name, chosen in settings.items():
        line = flags(tmp_path, name, table, force_patch_dropout=0.5, epochs=1, **chosen)
        status, told[name] = server.run(line, tmp_path / "out")
        assert status == 0, told[name]
        logs[name], _ = read_metrics(tmp_path / name)
    for name in ("accumulated", "planned"):
        for ours, theirs in zip(logs[name], logs["direct"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert logs[name][0]["grad_norm"] == pytest.approx(logs["direct"][0]["grad_norm"], rel=1e-5)
    assert "4 micro-batches of 2" in told["accumulated"]
    assert "gradients of 8 pairs verified against float64" in told["planned"]
    saved = json.loads((tmp_path / "planned" / "config.json").read_text())
    assert saved["global_batch_size"] == 8 and saved["batch_size"] is None
    assert saved["micro_batch_size"] and saved["keep_graphs"]
    line = flags(tmp_path, "planned", table, batch_size=None, epochs=2, resume="latest")
    status, text = server.run(line, tmp_path / "out")
    assert status == 0 and "pairs on this device" not in text, text
    # Other memory, another plan; the same given again, the same plan.
    for epochs, is_new in ((3, True), (4, False)):
        again = {"epochs": epochs, "resume": "latest", "step_memory": 1.5}
        line = flags(tmp_path, "planned", table, batch_size=None, **again)
        status, text = server.run(line, tmp_path / "out")
        assert status == 0 and ("of 1.50 together" in text) == is_new, text


def test_gradients_that_are_wrong_stop_a_run_in_one_line(table, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(verify.LIMITS, "fp32", 0.0)
    monkeypatch.setattr(train, "make_deterministic", lambda: None)  # for the whole process
    line = flags(tmp_path, "r", table, verify_gradients=True)
    assert train.main(line) == 5
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith(
        "clipcore.train: stopped: --verify-gradients: the gradients of 8 pairs"
    )


@pytest.mark.parametrize("is_stopped", [True, False])
def test_ctrl_c_while_a_compiler_works_is_no_failure_of_the_compiler(
    is_stopped, table, tmp_path, monkeypatch, capfd
):
    """The terminal sends it to the compiler's processes too."""

    def fail(*_: object) -> None:
        if is_stopped:
            os.kill(os.getpid(), signal.SIGINT)
        raise ConfigError("--torchcompile: torch.compile fails: C++ compile error")

    monkeypatch.setattr(TrainingStep, "compile_blocks", fail)
    leave_process_alone(monkeypatch)
    status = train.main(flags(tmp_path, "r", table, torchcompile=True))
    said = capfd.readouterr().err.splitlines()[-1]
    if is_stopped:
        assert (status, said.rpartition("clipcore.train: ")[2]) == (
            130,
            "stopped before the first step; there was nothing to save",
        )
    else:
        assert status == 2 and said.endswith("torch.compile fails: C++ compile error")


def test_a_run_sums_in_float32_and_an_import_or_a_model_changes_no_setting(table, tmp_path):
    program = [sys.executable, str(PROGRAMS / "print_precision.py")]
    line = flags(tmp_path, "r", table, epochs=1, threads=1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, *line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"bf16 sums')]
    before, made, after = said
    assert (
        before
        == made
        == {
            "bf16 sums": True,
            "fp16 sums": True,
            "fp16 accumulation": True,
            "matmul": "high",
            "cudnn": True,
            "convolutions": "tf32",
            "products": "tf32",
            "deterministic": False,
        }
    )
    assert after == {
        "bf16 sums": False,
        "fp16 sums": False,
        "fp16 accumulation": False,
        "matmul": "highest",
        "cudnn": False,
        "convolutions": "none",  # which is no rounding
        "products": "ieee",
        "deterministic": True,
    }


class Reads(TorchFunctionMode):
    """Counts the numbers of tensors that the training loop itself asks for, for which the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        caller = sys._getframe(1).f_code.co_filename
        if (
            name in ("item", "tolist", "__bool__", "__float__", "__int__")
            and caller == train.__file__
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_twice_a_step(table, tmp_path, monkeypatch):
    """For loss and gradient norm before the update, and for the logit scale after it."""
    leave_process_alone(monkeypatch)
    with Reads() as reads:
        assert train.main(flags(tmp_path, "r", table, epochs=2, threads=1)) == 0
    assert reads.names == ["tolist", "item"] * 10
    steps, _ = read_metrics(tmp_path / "r")
    assert len(steps) == 10


def test_an_evaluation_that_a_signal_put_off_is_made_up_for(server, table, tmp_path):
    """Every step ends an epoch here, so that every signal falls on an evaluation."""
    settings = {"batch_size": 40, "epochs": 12, "val_data": table}
    num_events = server.counted(flags(tmp_path, "straight", table, **settings), tmp_path / "a")
    line = [*flags(tmp_path, "broken", table, **settings), "--resume", "latest"]
    # An eighth of the run and the rest of a step, four times, is less than all of its twelve steps.
    for _ in range(4):
        run = server.start(line, tmp_path / "b", signals=[(num_events // 8, signal.SIGTERM)])
        assert run.wait() == 143, run.text
    assert server.run(line, tmp_path / "b")[0] == 0
    assert len(read_metrics(tmp_path / "straight")[1]) == 12
    assert_same_bits(tmp_path / "straight", tmp_path / "broken")


def test_killed_at_twenty_random_moments_ends_with_the_same_bits(server, shards, tmp_path):
    settings = {"epochs": 12, "ema_decay": 0.9, "force_patch_dropout": 0.25, "keep_checkpoints": 2}
    line = flags(tmp_path, "straight", shards, **settings)
    # Each life may reach a fifth of the run: the twenty of them end in all parts of it.
    most = server.counted(line, tmp_path / "a") // 5

    line = [*flags(tmp_path, "killed", shards, **settings), "--resume", "latest"]
    moment, reached = random.Random(0), set()
    for _ in range(20):
        killed = (moment.randrange(1, most), signal.SIGKILL)
        run = server.start(line, tmp_path / "b", signals=[killed])
        assert run.wait() in (-signal.SIGKILL, 0), run.text
        newest = latest_checkpoint(tmp_path / "killed" / "checkpoints")
        reached.add(newest.name if newest else "none")
    assert len(reached) >= 5, "the kills should fall all over the run"
    status, text = server.run(line, tmp_path / "b")
    assert status == 0, text
    assert_same_bits(tmp_path / "straight", tmp_path / "killed")


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(server, table, tmp_path):
    run = server.start(
        flags(tmp_path, "r", table, epochs=10_000, save_every_steps=10**6), tmp_path / "out"
    )
    log = tmp_path / "r" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size > 0, "step")
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert "go on with: python -m clipcore.train --resume" in run.text
    steps, _ = read_metrics(tmp_path / "r")
    newest = latest_checkpoint(tmp_path / "r" / "checkpoints")
    assert newest is not None and newest.name == f"step_{steps[-1]['step']:08d}"

    run = server.start(["--resume", str(tmp_path / "r"), "--quiet"], tmp_path / "out")
    run.wait_for("writing to")
    for _ in range(2):
        try:
            run.signal(signal.SIGTERM)
        except ProcessLookupError:
            break
    assert run.wait() == 143


def test_a_vocabulary_is_learnt_from_the_captions_of_the_data(server, table, tmp_path):
    """A picture that cannot be read costs no caption; a resumed run has the vocabulary from its folder."""
    line = flags(tmp_path, "r", table, epochs=1, tokenizer="train", vocab_size=560)
    line[line.index("--tokenizer") :][:2] = []
    status, text = server.run([*line, "--tokenizer", "train"], tmp_path / "out")
    assert status == 0, text
    captions = [row.split("\t")[1] for row in table.read_text().splitlines()[1:]]
    expected = train_tokenizer(captions, 560)
    assert Tokenizer.from_file(tmp_path / "r" / "vocabulary.txt.gz").sha256 == expected.sha256
    assert "--vocab-size" not in text
    more = ["--resume", str(tmp_path / "r"), "--epochs", "2"]
    assert server.run(more, tmp_path / "out")[0] == 0


def test_a_vocabulary_that_is_smaller_than_asked_is_said_and_recorded(server, table, tmp_path):
    captions = [row.split("\t")[1] for row in table.read_text().splitlines()[1:]]
    with pytest.warns(UserWarning, match="rather than 3,072"):
        size = train_tokenizer(captions, 3072).vocab_size
    line = flags(tmp_path, "r", table, epochs=1, tokenizer="train")
    line[line.index("--tokenizer") :][:2] = []
    status, text = server.run([*line, "--tokenizer", "train"], tmp_path / "out")
    said = f"the vocabulary has {size} entries, where --vocab-size asks for 3,072"
    assert status == 0 and text.count(said) == 1 and "UserWarning" not in text, text
    config_file = tmp_path / "r" / "config.json"
    assert json.loads(config_file.read_text())["vocab_size"] == size

    # A resumed run has no more to say, but to whom asks again.
    more = ["--resume", str(tmp_path / "r"), "--epochs"]
    status, text = server.run([*more, "2"], tmp_path / "out")
    assert status == 0 and "--vocab-size" not in text, text
    status, text = server.run([*more, "3", "--vocab-size", "3072"], tmp_path / "out")
    assert status == 0 and said in text, text
    assert json.loads(config_file.read_text())["vocab_size"] == size


def test_a_table_of_commas_trains_and_resumes_without_a_flag(server, tmp_path):
    table = write_csv(tmp_path / "data", num_pairs=16)
    rows = table.read_text().splitlines()
    table.write_text("".join(row.replace(", ", " ").replace("\t", ",") + "\n" for row in rows))
    line = flags(tmp_path, "r", table, epochs=1, val_data=table)
    status, text = server.run(line, tmp_path / "out")
    said = "pairs.csv: 1 x table with ',' between its columns, by its header (else --csv-separator)"
    assert status == 0 and text.count(said) == 2, text  # of training and of validation
    assert json.loads((tmp_path / "r" / "config.json").read_text())["csv_separator"] is None

    more = ["--resume", str(tmp_path / "r"), "--epochs"]
    status, text = server.run([*more, "2"], tmp_path / "out")
    assert status == 0 and said in text, text
    # As the record of an earlier version has it, which read tabs alone.
    status, text = server.run([*more, "3", "--csv-separator", "tab"], tmp_path / "out")
    assert status == 2 and "they look separated by ','" in text
    status, text = server.run([*more, "3", "--csv-separator", ","], tmp_path / "out")
    assert status == 0 and "between its columns" not in text, text


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_trains_evaluates_and_reports_on_user_data(server, shards, table, tmp_path, kind):
    data = shards if kind == "shards" else table
    status, text = server.run(
        flags(tmp_path, "r", data, val_data=data, report_to="tensorboard", keep_checkpoints=2),
        tmp_path / "out",
    )
    assert status == 0, text
    steps, evaluations = read_metrics(tmp_path / "r")
    assert len(evaluations) == 4 and 0 <= evaluations[-1]["image_to_text_R@1"] <= 1
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert len(list((tmp_path / "r" / "checkpoints").glob("step_*"))) == 2
    assert list((tmp_path / "r" / "tensorboard").glob("events*"))
    page = (tmp_path / "r" / "report.html").read_text()
    assert "ViT-nano-8-32" in page and "<svg" in page


def test_glyphs_run_evaluates_what_it_never_saw(server, tmp_path):
    line = [*flags(tmp_path, "r", "glyphs", train_num_samples=64, epochs=1)]
    line[line.index("--tokenizer") + 1] = "train"
    status, text = server.run(line, tmp_path / "out")
    assert status == 0, text
    tasks = {row["task"]: row for row in read_metrics(tmp_path / "r")[1]}
    assert {t for t in tasks if "acc1" in tasks[t]} == {
        "unseen characters",
        "unseen characters in an unseen typeface",
    }
    assert all(0.001 < row["chance"] < 0.002 for row in tasks.values() if "acc1" in row)


def test_a_seed_is_the_run_and_another_seed_another(server, table, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        server.run(flags(tmp_path, name, table, epochs=1, seed=seed), tmp_path / "out")
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert final_state(tmp_path / "a")[1] != final_state(tmp_path / "c")[1]


def test_a_collapsed_run_is_named_in_its_log_and_on_its_page(server, table, tmp_path):
    """Of a rate that is a hundred times too high; a resumed run says it before its first step."""
    line = flags(tmp_path, "r", table, batch_size=16, epochs=40, lr=0.1, warmup=1)
    said = "the run has collapsed: its loss has been ln(16), 2.773 since step"
    status, text = server.run(line, tmp_path / "out")
    steps, page = read_metrics(tmp_path / "r")[0], (tmp_path / "r" / "report.html").read_text()
    assert status == 0 and text.count(said) >= 2, text  # when it is noticed, and at the end
    assert steps[-1]["loss"] == pytest.approx(math.log(16), abs=0.05)
    assert '<section class="warning">' in page and said in page

    more = ["--logs", str(tmp_path), "--resume", "latest", "--epochs", "41"]
    status, text = server.run(more, tmp_path / "out")
    assert status == 0 and text.index(said) < text.index("contrastive loss"), text

    status, text = server.run(flags(tmp_path, "sound", table, epochs=6), tmp_path / "out")
    assert status == 0 and "has collapsed" not in text
    assert 'class="warning"' not in (tmp_path / "sound" / "report.html").read_text()


def test_resume_without_other_flags_takes_the_settings_of_the_run(server, table, tmp_path):
    line = flags(tmp_path, "r", table, epochs=2)
    assert server.run(line, tmp_path / "out")[0] == 0
    status, text = server.run(
        ["--logs", str(tmp_path), "--resume", "latest", "--epochs", "3"], tmp_path / "out"
    )
    assert status == 0 and "--epochs was 2 in this run, now 3" in text
    assert read_metrics(tmp_path / "r")[0][-1]["step"] == 15


def test_a_warm_up_of_the_users_outlives_a_plain_resume(server, table, tmp_path):
    """Longer than a tenth of the run, to which a recipe's would be cut."""
    line = flags(tmp_path, "r", table, warmup=15, keep_checkpoints=0)
    assert server.run(line, tmp_path / "out")[0] == 0
    straight = [row["lr"] for row in read_metrics(tmp_path / "r")[0]]
    for checkpoint in sorted((tmp_path / "r" / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(checkpoint)
    status, text = server.run(["--logs", str(tmp_path), "--resume", "latest"], tmp_path / "out")
    assert status == 0, text
    resumed = [row["lr"] for row in read_metrics(tmp_path / "r")[0]]
    assert resumed == straight and len(straight) == 20 and max(straight) == straight[14]


def test_a_warm_up_of_the_users_outlives_a_start_without_a_checkpoint(server, table, tmp_path):
    line = flags(tmp_path, "r", table, warmup=15)
    assert server.run(line, tmp_path / "out")[0] == 0
    straight = [row["lr"] for row in read_metrics(tmp_path / "r")[0]]
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    line = ["--logs", str(tmp_path), "--name", "r", "--resume", "latest"]
    status, text = server.run(line, tmp_path / "out")
    assert status == 0, text
    assert [row["lr"] for row in read_metrics(tmp_path / "r")[0]] == straight


def test_resume_with_the_loss_scaler_that_the_run_did_not_have(server, table, tmp_path):
    line = flags(tmp_path, "r", table, epochs=1)
    assert server.run(line, tmp_path / "out")[0] == 0
    more = ["--logs", str(tmp_path), "--resume", "latest", "--epochs", "2", "--precision", "amp"]
    status, text = server.run(more, tmp_path / "out")
    assert status == 0, text
    assert read_metrics(tmp_path / "r")[0][-1]["step"] == 10


def test_an_evaluation_that_fails_costs_no_training(server, table, tmp_path):
    classes = tmp_path / "classes"
    for name in ("a", "b"):
        (classes / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(classes / name / "0.png")
    # More than what may be, and not all, which would be refused before the first step.
    for number in range(1, 8):
        (classes / "a" / f"{number}.png").write_bytes(b"broken")
    line = flags(tmp_path, "r", table, imagenet_val=classes, zeroshot_frequency=1)
    line[line.index("--save-every-steps") + 1] = "1000"
    status, text = server.run(line, tmp_path / "out")
    assert status == 2 and "7 of 9 samples of classes cannot be read" in text, text
    newest = latest_checkpoint(tmp_path / "r" / "checkpoints")
    assert newest is not None and newest.name == "step_00000005"


def test_validation_data_is_read_as_the_training_data_is(server, table, tmp_path):
    text_file = table.with_suffix(".txt")
    shutil.copy(table, text_file)
    line = flags(tmp_path, "r", text_file, dataset_type="csv", val_data=text_file, epochs=1)
    status, text = server.run(line, tmp_path / "out")
    assert status == 0, text
    assert len(read_metrics(tmp_path / "r")[1]) == 1


def test_weights_that_are_not_finite_are_no_beginning(server, table, tmp_path):
    """A mistake in the file, and not a loss that became infinite."""
    assert server.run(flags(tmp_path, "good", table, epochs=1), tmp_path / "out")[0] == 0
    newest = latest_checkpoint(tmp_path / "good" / "checkpoints")
    weights = load_file(newest / "model.safetensors")
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, tmp_path / "bad.safetensors")
    status, text = server.run(
        flags(tmp_path, "bad", table, pretrained=tmp_path / "bad.safetensors"), tmp_path / "out"
    )
    assert status == 2, text
    assert f"visual.proj in {tmp_path / 'bad.safetensors'} is not finite" in text
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_a_bad_sample_is_replaced_named_and_counted(server, tmp_path):
    path = write_csv(tmp_path / "data", num_pairs=40)
    broken = sorted(path.parent.glob("**/*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    status, text = server.run(flags(tmp_path, "r", path, max_bad_fraction=0.2), tmp_path / "out")
    assert status == 0, text
    assert broken.name in text
    assert read_metrics(tmp_path / "r")[0][-1]["bad_samples"] == 4  # once an epoch


def mistakes(tmp_path: Path, table: Path) -> dict[str, tuple[list[str], str]]:
    """Command lines of users' mistakes, and what the one line must say."""
    corrupt = tmp_path / "corrupt.tar"
    corrupt.write_bytes(b"this is no tar file" * 100)
    return {
        "missing shard": (flags(tmp_path, "m", tmp_path / "no-{000..002}.tar"), r"no-000\.tar"),
        "corrupt tar": (flags(tmp_path, "m", corrupt), r"corrupt\.tar"),
        "missing column": (flags(tmp_path, "m", table, csv_caption_key="text"), r"text.*title"),
        "unknown model": ([*flags(tmp_path, "m", table), "--model", "ViT-B-23"], r"ViT-B-32"),
        "unknown flag": ([*flags(tmp_path, "m", table), "--epoch", "3"], r"--epochs"),
        "large batch": (flags(tmp_path, "m", table, batch_size=64), r"64.*40"),
        "short epoch": (
            flags(tmp_path, "m", table, train_num_samples=5),
            r"--train-num-samples 5.*8",
        ),
        "long warm-up": (flags(tmp_path, "m", table, warmup=500), r"--warmup 500.*20 steps"),
        "no vocabulary": ([*flags(tmp_path, "m", table), "--tokenizer", "none.gz"], r"none\.gz"),
        "no checkpoint": (
            [*flags(tmp_path, "m", table), "--resume", str(tmp_path / "none")],
            r"none",
        ),
        "no weights": (flags(tmp_path, "m", table, pretrained=tmp_path / "none.pt"), r"none\.pt"),
        "no reporter": (flags(tmp_path, "m", table, report_to="pigeon"), r"tensorboard"),
    }


def test_every_mistake_gets_one_clear_line(server, table, tmp_path):
    for name, (line, pattern) in mistakes(tmp_path, table).items():
        status, text = server.run(line, tmp_path / "out")
        errors = [row for row in text.splitlines() if "error:" in row]
        assert status == 2 and "Traceback" not in text, f"{name}: {text}"
        assert len(errors) == 1 and re.search(pattern, errors[0]), f"{name}: {text}"


def test_a_checkpoint_of_another_run_is_refused(server, table, shards, tmp_path):
    assert server.run(flags(tmp_path, "r", table, epochs=1), tmp_path / "out")[0] == 0
    for change, word in (
        (["--model", "RN-nano-32"], "model"),
        (["--train-data", shards], "data"),
    ):
        line = [
            "--logs",
            str(tmp_path),
            "--name",
            "r",
            "--resume",
            "latest",
            "--epochs",
            "9",
            *change,
        ]
        status, text = server.run(line, tmp_path / "out")
        assert status == 2 and f"of another {word}" in text, text


def test_a_run_that_exists_is_not_overwritten(server, table, tmp_path):
    line = flags(tmp_path, "r", table, epochs=1)
    assert server.run(line, tmp_path / "out")[0] == 0
    status, text = server.run(line, tmp_path / "out")
    assert status == 2 and "--resume latest or choose another --name" in text


def test_two_runs_on_one_folder(server, table, tmp_path):
    run = server.start(
        flags(tmp_path, "r", table, epochs=10_000, save_every_steps=10**6), tmp_path / "out"
    )
    run.wait_for("writing to")
    status, text = server.run(flags(tmp_path, "r", table), tmp_path / "second")
    run.kill()
    run.wait()
    assert status == 2 and "r" in text and "Traceback" not in text


def test_config_is_written_whole(server, table, tmp_path):
    server.run(flags(tmp_path, "r", table, epochs=1), tmp_path / "out")
    saved = json.loads((tmp_path / "r" / "config.json").read_text())
    assert saved["global_batch_size"] == 8 and saved["warmup"] == 0 and saved["wd"] == 0.2
    assert isinstance(torch.__version__, str)


def test_siglip_from_weights_without_a_bias_begins_with_its_own_scale(server, table, tmp_path):
    """By weights of a softmax loss the scale would be 100, and the first loss in the hundreds."""
    softmax = create_model("ViT-nano-8-32", init_logit_scale=math.log(100))
    torch.save(softmax.state_dict(), tmp_path / "clip.pt")
    line = flags(tmp_path, "r", table, epochs=1, siglip=True, pretrained=tmp_path / "clip.pt")
    status, text = server.run(line, tmp_path / "out")
    assert status == 0, text
    assert "has no logit_bias: --siglip begins with a scale of 10 and a bias of -10" in text
    steps, _ = read_metrics(tmp_path / "r")
    assert steps[0]["logit_scale"] == pytest.approx(10, rel=0.01)

    # A sigmoid loss goes on from the bias and scale that it had.
    trained = load_file(latest_checkpoint(tmp_path / "r" / "checkpoints") / "model.safetensors")
    again = flags(tmp_path, "s", table, epochs=1, siglip=True, pretrained=tmp_path / "r", lr=1e-9)
    status, text = server.run(again, tmp_path / "out")
    assert status == 0 and "no logit_bias" not in text, text
    steps, _ = read_metrics(tmp_path / "s")
    assert steps[0]["logit_scale"] == pytest.approx(trained["logit_scale"].exp().item(), rel=1e-6)


def test_a_run_takes_what_its_weights_say_about_images_and_hands_it_on(server, table, tmp_path):
    """Mean, standard deviation and squashing go from the folder into the run, its resumed part, and whoever uses it."""
    folder, model = tmp_path / "hub", create_model("ViT-nano-8-32-quickgelu")
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    content = {"model_cfg": model.config.to_dict(), "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    data = {"val_data": table, "pretrained": folder}

    # The name says GELU.
    line = flags(tmp_path, "wrong", table, **data)
    status, text = server.run(line, tmp_path / "out")
    assert status == 2 and "; name ViT-nano-8-32-quickgelu" in text
    assert "Traceback" not in text

    line = flags(tmp_path, "whole", table, epochs=2, force_quick_gelu=True, **data)
    assert server.run(line, tmp_path / "out")[0] == 0
    first = flags(tmp_path, "parts", table, epochs=2, force_quick_gelu=True, **data)
    events = server.counted(
        flags(tmp_path, "c", table, epochs=2, **data, force_quick_gelu=True), tmp_path / "o"
    )
    run = server.start(first, tmp_path / "out", signals=[(events // 2, signal.SIGTERM)])
    assert run.wait() == 128 + signal.SIGTERM
    resumed = flags(tmp_path, "parts", table, epochs=2, resume="latest", val_data=table)
    assert server.run(resumed, tmp_path / "out")[0] == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    plain = flags(tmp_path, "plain", table, epochs=2, val_data=table, pretrained=tmp_path / "w.pt")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert server.run([*plain, "--force-quick-gelu"], tmp_path / "out")[0] == 0
    losses = [read_metrics(tmp_path / name)[0][0]["loss"] for name in ("whole", "plain")]
    assert losses[0] != losses[1]

    for used, transform in (
        create_model_from_pretrained(None, tmp_path / "parts"),
        create_model_from_pretrained("ViT-nano-8-32-quickgelu", tmp_path / "parts"),
        load_run(tmp_path / "parts")[:2],
    ):
        assert used.config.quick_gelu
        assert (transform.mean, transform.resize_mode) == ((0.5, 0.4, 0.3), "squash")
        assert tuple(used.visual.image_std) == (0.2, 0.3, 0.4)


def test_transparent_pictures_are_said_once_and_counted(server, tmp_path):
    (tmp_path / "d").mkdir()
    for index in range(16):
        Image.new("RGBA", (32, 32), (255, 16 * index, 0, 0 if index % 4 == 0 else 255)).save(
            tmp_path / "d" / f"{index}.png"
        )
        (tmp_path / "d" / f"{index}.txt").write_text(f"colour {index}")
    line = flags(tmp_path, "r", tmp_path / "d", epochs=2, val_frequency=0)
    status, text = server.run(line, tmp_path / "out")
    assert status == 0, text
    assert text.count("transparent pictures are laid over white") == 1
    state = json.loads(
        (latest_checkpoint(tmp_path / "r" / "checkpoints") / "state.json").read_text()
    )
    assert state["transparent"] == 8
    assert "transparent pictures laid over white" in (tmp_path / "r" / "report.html").read_text()
