"""The command line: names that users know, one clear line for a mistake, help that fits on two screens."""

from __future__ import annotations

import dataclasses
import os
import re
import typing

import pytest

from clipcore.data.transforms import ImageTransform
from clipcore.run import open_clip_flags
from clipcore.run.command_line import build_parser, parse_command_line
from clipcore.run.config import PRESETS, RECORDED, ConfigError, TrainConfig
from clipcore.run.parts import augmentation
from clipcore.run.recipe import PAPER_LEARNING_RATES, RECIPES, RunConfig, resolve, warmup_steps
from clipcore.towers.architectures import OPENAI_NAMES

pytestmark = pytest.mark.fast


def test_an_open_clip_command_line():
    config, given = parse_command_line(
        "--model ViT-B-32 --train-data a.tar::b.tar --train-data-upsampling-factors 1::2 --batch-size 320"
        " --precision amp_bf16 --workers 4 --lr 1e-3 --wd 0.1 --csv-separator , --warmup 10000 --resume latest"
        " --local-loss --gather-with-grad --grad-checkpointing --save-frequency 2".split()
    )
    assert (config.model, config.batch_size, config.lr, config.csv_separator) == (
        "ViT-B-32",
        320,
        1e-3,
        ",",
    )
    assert config.local_loss and config.grad_checkpointing and not config.lock_text
    assert "warmup" in given and "epochs" not in given


@pytest.mark.parametrize(
    ("line", "num_ranks", "found"),
    [
        ("--batch-size 320", 1, (320, 320)),
        ("--batch-size 320", 4, (1280, 320)),
        ("--batch-size 64 --accum-freq 8", 4, (2048, 64)),
        ("--batch-size 64 --accum-freq 8 --micro-batch-size 16", 2, (1024, 16)),
        ("--global-batch-size 32768", 3, (32768, None)),
        ("--global-batch-size 32768 --micro-batch-size 512", 3, (32768, 512)),
        ("--global-batch-size 256 --batch-size 32 --accum-freq 4", 2, (256, 32)),
        ("", 2, (512, 256)),
    ],
)
def test_open_clips_ways_to_give_a_batch_are_a_global_batch(line, num_ranks, found):
    config, _ = parse_command_line(line.split())
    config = resolve(config, num_ranks)
    assert (config.global_batch_size, config.micro_batch_size) == found
    assert config.batch_size is None and config.accum_freq == 1
    assert resolve(config, num_ranks) == config


def test_presets_are_whole_recipes_that_flags_overrule():
    assert set(PRESETS) == set(RECIPES)
    for name in PRESETS:
        config = resolve(parse_command_line(["--train-data", "a.csv", "--preset", name])[0], 2)
        assert resolve(config, 2) == config and config.preset == name
    found = {name: resolve(parse_command_line(["--preset", name])[0]) for name in PRESETS}
    small, large = found["small"], found["datacomp-xlarge"]
    assert (small.model, small.tokenizer, small.vocab_size) == ("ViT-glyphs", "train", 3072)
    assert (large.model, large.global_batch_size, large.lr) == ("ViT-L-14", 90_112, 1e-3)
    assert (large.warmup, large.beta1, large.beta2) == (10_000, 0.9, 0.95)
    for name, pairs in (("small", 12_800_000), ("medium", 128_000_000), ("large", 1_280_000_000)):
        of_scale = found[f"datacomp-{name}"]
        assert of_scale.epochs * of_scale.train_num_samples == pairs
        assert (of_scale.lr, of_scale.beta2, of_scale.warmup) == (5e-4, 0.98, 500)
    # The data's own recipe, by its name or without.
    default = dataclasses.asdict(resolve(parse_command_line([])[0]))
    assert dataclasses.asdict(found["glyphs"]) == default | {"preset": "glyphs"}
    line = (
        "--preset datacomp-small --batch-size 32 --lr 1e-3 --model ViT-B-16 --train-num-samples 64"
    )
    config = resolve(parse_command_line(line.split())[0], 2)
    assert (config.global_batch_size, config.lr, config.model) == (64, 1e-3, "ViT-B-16")
    assert (config.train_num_samples, config.epochs) == (64, 5)
    # The paper's rate for a model is of the paper's recipe alone.
    for name, lr in (("paper", 4e-4), ("datacomp-small", 5e-4)):
        line = ["--train-data", "a.csv", "--preset", name, "--model", "ViT-L-14"]
        assert resolve(parse_command_line(line)[0]).lr == lr
    with pytest.raises(ConfigError, match="invalid choice: 'tiny'"):
        parse_command_line(["--preset", "tiny"])


def test_aug_cfg_is_open_clips_and_takes_the_place_of_the_recipes_crop():
    line = ["--train-data", "a.csv", "--aug-cfg", "scale=(0.4, 1.0)", "ratio=(0.5,2)"]
    config, given = parse_command_line([*line, "color_jitter=None", "--epochs", "3"])
    assert (config.aug_cfg, config.epochs) == (
        "scale=(0.4, 1.0) ratio=(0.5,2) color_jitter=None",
        3,
    )
    config = resolve(config)
    assert "aug_cfg" in given and (config.aug_scale, config.aug_ratio) == (None, None)
    assert resolve(config) == config
    assert augmentation(config) == {"scale": (0.4, 1.0), "ratio": (0.5, 2)}
    for words, message in (
        (["scale=(0.4,1)", "--aug-scale", "0.5"], "leave one or the other out"),
        (["scale=(0.4,1)", "--aug-resize", "256"], "leave one or the other out"),
        (["scale", "=", "3"], "got 'scale = 3'; write no space around ="),
        ([], "expected at least one argument"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_command_line(["--aug-cfg", *words])
    for words, message in (
        ("color_jitter=0.32", "--aug-cfg: aug_cfg's color_jitter=0.32 exists only in open_clip"),
        ("scael=(0.4,1)", "no key 'scael'; did you mean scale"),
        ("scale=words", r"scale is a pair such as \(0.9, 1.0\), got 'words'"),
        ("scale=(0.4,x)", r"scale is a pair such as \(0.9, 1.0\), got '\(0.4,x\)'"),
        ("scale=('a','b')", r"scale is a pair such as \(0.9, 1.0\), got \('a', 'b'\)"),
        ("scale=(0.9,0.1)", "scale of a crop is a range within"),
        ("resize=x", "resize is a number of pixels, got 'x'"),
    ):
        config = resolve(parse_command_line(["--train-data", "a.csv", "--aug-cfg", words])[0])
        with pytest.raises(ValueError, match=message):
            ImageTransform(32, True, **augmentation(config))


@pytest.mark.parametrize("data", [[], ["--train-data", "icons"], ["--train-data", "x.csv"]])
def test_synthetic_data_take_the_place_of_any(data):
    """As in open_clip, where the flag stands alone; the embedded data would bring their own recipe and evaluations."""
    config, _ = parse_command_line(["--dataset-type", "synthetic", *data])
    config = resolve(config)
    assert (config.train_data, config.model) == ("synthetic", RECIPES["paper"]["model"])
    assert resolve(config) == config


@pytest.mark.parametrize("data", ["glyphs", "icons"])
def test_embedded_data_are_of_no_other_type(data):
    config, _ = parse_command_line(["--dataset-type", "csv", "--train-data", data])
    with pytest.raises(ConfigError, match=rf"name them with --train-data, .* is \./{data}\)"):
        resolve(config)
    resolve(dataclasses.replace(config, train_data=f"./{data}"))


def test_aug_resize_takes_the_place_of_the_recipes_crop():
    config, _ = parse_command_line(["--train-data", "a.csv", "--aug-resize", "256"])
    config = resolve(config)
    assert (config.aug_resize, config.aug_scale, config.aug_ratio) == (256, None, None)
    assert resolve(config) == config
    assert resolve(parse_command_line(["--train-data", "a.csv"])[0]).aug_scale == 0.9
    for line, message in (
        ("--aug-resize 256 --aug-scale 0.5", "leave one or the other out"),
        ("--aug-resize 256 --aug-ratio 1", "leave one or the other out"),
        ("--aug-resize 0", "--aug-resize must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_command_line(line.split())


def test_batches_that_contradict_each_other_are_refused():
    for line, message in (
        (
            "--global-batch-size 100 --batch-size 32",
            "is 64 pairs, and --global-batch-size says 100",
        ),
        ("--global-batch-size 100 --accum-freq 2", "--accum-freq counts micro-batches"),
        ("--global-batch-size 0", "--global-batch-size must be at least 1"),
        ("--keep-graphs 0", "--keep-graphs must be at least 1"),
        ("--step-memory 0", "--step-memory must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(parse_command_line(line.split())[0], 2)


def test_every_field_is_a_flag_with_a_line_of_help():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    flags &= set(re.findall(r"--[\w-]+", build_parser().format_help()))
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] == RECORDED:
            continue
        assert f"--{field.name.replace('_', '-')}" in flags
        assert field.metadata["help"]


def test_help_fits_on_two_screens():
    lines = build_parser().format_help().splitlines()
    assert len(lines) <= 125 and max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bach-size", "; did you mean --batch-size?"),
        ("--qiet", "; did you mean --quiet?"),
        ("--learning-rate", "; did you mean --lr?"),
        ("--weight_decay=0.1", "; did you mean --wd?"),
        ("--fp16", "; did you mean --precision amp?"),
        ("--optim", "; see --help"),
        ("--local-rank", "; see --help"),
        ("--evaluate", "; see --help"),
        ("quiet", "; see --help"),
        ("-x", "; see --help"),
    ],
)
def test_an_unknown_flag_names_one_of_its_meaning_or_none(flag, message):
    said = f"unknown argument {flag.partition('=')[0]}{message}"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        parse_command_line([flag])


def test_what_stands_for_a_flag_of_another_program_exists():
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    for flag, meant in open_clip_flags._SAME.items():
        name, *value = meant.split()
        assert name in known and flag not in known
        parse_command_line([name, *value] if value else [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--resume weights.pt", "from the weights in a file, --pretrained weights.pt"),
        ("--resume no/weights.safetensors", "--pretrained no/weights.safetensors"),
        ("--resume FILE", "names its folder or one of its checkpoints"),
        (
            "--val-data v.csv",
            "--val-data without --train-data: to evaluate a model, python -m clip",
        ),
        ("--imagenet-val d --pretrained w.pt", "--imagenet-val without --train-data"),
        ("--imagenet-val d --val-data v", "--imagenet-val and --val-data without"),
        ("--force-image-size 224 336", "images are square: --force-image-size 224"),
        (
            "--trace",
            "--trace exists only in open_clip: python -m clipcore.evaluate evaluates a run",
        ),
        ("--horovod", "start several processes with torchrun"),
        ("--opt timm/lamb", "choose from"),
    ],
)
def test_another_purpose_is_pointed_to(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_bytes(b"")
    (tmp_path / "run.pt").mkdir()
    with pytest.raises(ConfigError) as error:
        parse_command_line(line.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_is_resumed_whatever_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.pt").mkdir()
    for line in (
        "--resume --val-data v.csv",
        "--resume run.pt",
        "--train-data glyphs --val-data v",
    ):
        parse_command_line(line.split())
    assert parse_command_line("--force-image-size 64 64".split())[0].force_image_size == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs 0", "--epochs must be at least 1"),
        ("--max-pixels 0", "--max-pixels must be at least 1"),
        ("--name ..", "--name is of one folder in --logs"),
        ("--name .", "--name is of one folder in --logs"),
        ("--name /abs", "--name is of one folder in --logs"),
        ("--name a/b", "--name is of one folder in --logs"),
        ("--name \x1b[31mred", "--name is of one folder in --logs"),
        ("--warmup -1", "--warmup must be at least 0, got -1"),
        ("--lr 0", "--lr must be above 0"),
        ("--lr nan", "--lr is a finite number"),
        ("--timeout 0", "--timeout must be above 0"),
        ("--aug-scale 1e-320", "--aug-scale must be at least 0.0001 and at most 1, got"),
        ("--aug-scale 1.1", "--aug-scale must be at least 0.0001 and at most 1, got 1.1"),
        ("--logs a\udcff", "--logs a\ufffd is not UTF-8; rename the folder"),
        ("--resume a\udcff", "--resume a\ufffd is not UTF-8"),
        (
            "--force-patch-dropout 1.5",
            "--force-patch-dropout must be at least 0 and at most 1, got 1.5",
        ),
        ("--label-smoothing 1", "--label-smoothing must be at least 0 and less than 1, got 1"),
        ("--label-smoothing -0.1", "--label-smoothing must be at least 0"),
        ("--siglip --label-smoothing 0.1", "--siglip has none; leave one of them out"),
        ("--siglip --loss-stash 1", "--siglip keeps no logits; leave one of them out"),
        ("--loss-stash -1", "--loss-stash must be at least 0 and at most 1,000,000, got -1"),
        ("--loss-workspace 0", "--loss-workspace must be at least 0.001"),
        ("--threads 2000", "--threads must be at least 1 and at most 1,024, got 2000"),
        ("--duplicate-captions both", "negative"),
        ("--lr-scheduler const-cooldown", "--epochs-cooldown"),
        ("--lr-scheduler linear", "cosine"),
        ("--report-to pigeon", "tensorboard, wandb and all"),
        ("--batch-size many", "--batch-size"),
        ("--precision fp8", "amp_bf16"),
        ("--precision bf16 --fsdp", "take --precision amp_bf16"),
        ("--image-layer-decay 0", "--image-layer-decay must be above 0 and at most 1"),
        ("--text-layer-decay 1.1", "--text-layer-decay must be above 0 and at most 1"),
        ("--wise-alpha 0.5,2", "--wise-alpha is numbers from 0, the start, to 1, the end"),
        ("--wise-alpha half", "--wise-alpha is numbers from 0"),
        ("--distill-model ViT-B-32", "--distill-model needs its weights"),
        (
            "--distill-pretrained w.pt --siglip --duplicate-captions ignore",
            "does not go with --siglip, --duplicate-captions; leave one of them out",
        ),
        ("--distill-pretrained w.pt --label-smoothing 0.1", "does not go with --label-smoothing"),
        ("--profile --torchcompile", "--profile names operators"),
    ],
)
def test_a_value_that_cannot_work_is_one_line(line, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse_command_line(line.split())
    assert "\n" not in str(error.value)


def test_recipes_fill_what_is_not_given():
    glyphs = resolve(parse_command_line([])[0])
    assert glyphs.model is not None and glyphs.epochs is not None and glyphs.tokenizer == "train"
    paper = resolve(parse_command_line("--train-data x.tar --model ViT-L-14 --wd 0.1".split())[0])
    assert (paper.lr, paper.wd, paper.epochs, paper.tokenizer) == (4e-4, 0.1, 32, "openai")
    assert resolve(glyphs) == glyphs
    # Of the paper's recipe, but no more than there are cores.
    assert paper.workers == min(4, len(os.sched_getaffinity(0)))
    assert resolve(parse_command_line("--train-data x.tar --workers 4".split())[0]).workers == 4


LINES = (
    "",
    "--train-data icons",
    "--train-data x.tar --model RN50 --global-batch-size 64",
    "--train-data x.tar --batch-size 4 --accum-freq 2 --aug-resize 300",
)


@pytest.mark.parametrize("line", LINES)
def test_what_a_run_needs_has_a_value(line):
    config = resolve(parse_command_line(line.split())[0])
    types = typing.get_type_hints(RunConfig)
    needed = [name for name, kind in types.items() if type(None) not in typing.get_args(kind)]
    assert {"lr", "beta1", "workers", "warmup"} <= set(needed)
    assert not [name for name in needed if getattr(config, name) is None]


@pytest.mark.parametrize("line", LINES)
def test_a_record_gives_the_same_settings(line):
    """That of this version, and that of an earlier one, which knew nothing of some and left others open."""
    config = resolve(parse_command_line(line.split())[0])
    record = dataclasses.asdict(config)
    assert record.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    assert resolve(TrainConfig(**record)) == config
    for name in ("beta1", "beta2", "eps"):
        record[name] = None
    del record["loss_stash"], record["loss_workspace"]
    assert resolve(TrainConfig(**record)) == config


def test_the_device_decides_the_precision_at_each_launch():
    config = resolve(TrainConfig())
    assert config.precision is None  # a run that goes on elsewhere decides anew
    assert [config.precision_on(kind) for kind in ("cpu", "cuda")] == ["fp32", "amp_bf16"]
    assert TrainConfig(precision="amp").precision_on("cuda") == "amp"


def test_adams_settings_are_the_paper_s_of_the_model():
    values = [
        (config.beta1, config.beta2, config.eps)
        for config in (resolve(TrainConfig(model=name)) for name in ("RN50", "ViT-B-32"))
    ]
    assert values == [(0.9, 0.999, 1e-8), (0.9, 0.98, 1e-6)]
    config = resolve(TrainConfig(model="RN50", beta2=0.95))
    assert (config.beta1, config.beta2, config.eps) == (0.9, 0.95, 1e-8)


@pytest.mark.parametrize("openai", ["ViT-L/14", "ViT-L/14@336px"])
def test_openais_spelling_has_the_papers_learning_rate(openai):
    names = (openai, OPENAI_NAMES[openai], OPENAI_NAMES[openai] + "-quickgelu")
    rates = [resolve(TrainConfig(train_data="x.tar", model=name)).lr for name in names]
    assert rates == [PAPER_LEARNING_RATES[OPENAI_NAMES[openai]]] * 3


def test_warm_up_longer_than_the_run():
    config = resolve(TrainConfig(warmup=50))
    with pytest.raises(ConfigError, match="longer than the run of 40 steps"):
        warmup_steps(config, is_chosen=True, num_steps=40)
    assert warmup_steps(config, is_chosen=True, num_steps=400) == 50
    assert warmup_steps(config, is_chosen=False, num_steps=40) == 4


KINDS = {"int": 3, "float": 1.5, "str": "text", "bool": True, "list": [1], "dict": {}, "none": None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_of_another_type_is_named(kind):
    value = KINDS[kind]
    for field in dataclasses.fields(TrainConfig):
        default_type = field.type.removesuffix(" | None")
        fits = type(value).__name__ == default_type or (kind, default_type) == ("int", "float")
        if fits or (value is None and field.type.endswith("None")):
            continue
        with pytest.raises(
            ConfigError, match=f"--{field.name.replace('_', '-')} is .*which is no "
        ):
            TrainConfig(**{field.name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    for field in dataclasses.fields(TrainConfig):
        # Of a gradient it means no limit.
        is_taken = field.name == "grad_clip_norm" and value == float("inf")
        if field.type.startswith("float") and not is_taken:
            with pytest.raises(
                ConfigError, match=f"--{field.name.replace('_', '-')} is a finite number"
            ):
                TrainConfig(**{field.name: value})


def test_numbers_that_nothing_can_hold_are_refused():
    for field in dataclasses.fields(TrainConfig):
        if field.type.startswith(("int", "float")):
            for value in (-(10**400), 10**400):
                with pytest.raises(ConfigError, match=f"--{field.name.replace('_', '-')} "):
                    TrainConfig(**{field.name: value})


@pytest.mark.parametrize(
    "line",
    [
        ["--seed", "-1"],
        ["--wd", "-0.1"],
        ["--lock-image-unlocked-groups", "-1"],
        ["--lock-text-unlocked-layers", "-1"],
        ["--force-image-size", "0"],
        ["--vocab-size", "0"],
        ["--aug-ratio", "0.5"],
        ["--aug-ratio", "1e308"],
        ["--workers", "1000000"],
        ["--threads", "1000000"],
        ["--timeout", "1e12"],
        ["--image-decoder", "magic"],
        ["--logs", "a\0b"],
    ],
)
def test_values_out_of_range_name_their_flag(line):
    with pytest.raises(ConfigError, match=line[0]):
        parse_command_line(line)


@pytest.mark.parametrize(
    "name", ["image_decoder", "precision", "lr_scheduler", "adam_moments", "duplicate_captions"]
)
def test_a_choice_that_is_none_is_refused_wherever_it_comes_from(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is one of .*'magic'"):
        TrainConfig(**{name: "magic"})
