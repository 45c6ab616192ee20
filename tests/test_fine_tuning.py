"""Fine-tuning: what a run trains, with which rates, and from which weights."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import NANO, assert_same_bits, final_state
from shards import write_csv
from weight_files import saved

from clipcore import train
from clipcore.data.embedded import EMBEDDED
from clipcore.ranks.distributed import World
from clipcore.run.command_line import parse_command_line
from clipcore.run.config import ConfigError
from clipcore.run.optim import build_optimizer, layer_rates
from clipcore.run.parts import lock_towers
from clipcore.run.recipe import RunConfig, finetune_note, resolve, warmup_steps
from clipcore.run.setup import describe
from clipcore.run.state import load_run
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ("", ("visual.", "transformer.", "token", "positional", "ln_final", "text_proj", "logit")),
        ("--lock-image", ("transformer.", "token", "positional", "ln_final", "text_proj", "logit")),
        ("--lock-image --lock-image-unlocked-groups 1 --lock-text", ("visual.proj", "logit")),
    ],
)
def test_a_run_says_how_many_parameters_it_trains(flags, trained):
    config = resolve(parse_command_line(["--model", "ViT-nano-8-32", *flags.split()])[0])
    model = create_model("ViT-nano-8-32")
    lock_towers(model, config)
    said = describe(config, model, EMBEDDED["glyphs"].open("train"), ALONE, 10, 0, Path("run"))
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    num_image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    num_trained = sum(size for name, size in sizes.items() if name.startswith(trained))
    assert said.splitlines()[0] == (
        f"ViT-nano-8-32: {sum(sizes.values()):,} parameters, {num_image:,} of them in the image tower; "
        f"{num_trained:,} are trained"
    )


def rate_of(name: str, depth: int, decay: float) -> float:
    """Return a parameter's rate as timm has it: blocks and what is before them, by distance from the head."""
    block = re.search(r"resblocks\.(\d+)\.", name)
    if block:
        return decay ** (depth - int(block[1]))
    if re.search(r"ln_(post|final)", name):
        return decay
    return 1.0 if "proj" in name else decay ** (depth + 1)


def test_rates_fall_from_the_projection_to_the_embeddings():
    model = create_model("ViT-nano-8-32")
    rates = layer_rates(model, 0.5, 0.9)
    image_depth, text_depth = model.config.vision.layers, model.config.text.layers
    for name, parameter in model.named_parameters():
        if name.startswith("logit"):
            assert parameter not in rates
        elif name.startswith("visual."):
            assert rates[parameter] == pytest.approx(rate_of(name, image_depth, 0.5)), name
        else:
            assert rates[parameter] == pytest.approx(rate_of(name, text_depth, 0.9)), name
    assert set(layer_rates(model).values()) == {1.0}


def test_rates_of_a_resnet_fall_by_stages():
    model = create_model("RN-nano-32")
    rates = layer_rates(model, 0.5, 1.0)
    places = ("conv", "bn", "layer1", "layer2", "layer3", "layer4", "attnpool")
    exponents = (5, 5, 4, 3, 2, 1, 0)
    for name, parameter in model.visual.named_parameters():
        (exponent,) = (e for p, e in zip(places, exponents, strict=True) if name.startswith(p))
        assert rates[parameter] == 0.5**exponent, name
    assert len(rates) == len(list(model.parameters())) - 1  # the logit scale has none


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_each_parameter_is_updated_as_by_an_optimizer_of_its_own_rate(moments):
    """Bit for bit; and parameters of equal rate share a launch."""
    settings = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2, "moments": moments}
    model = create_model("ViT-nano-8-32")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: torch.randn_like(value) for name, value in model.named_parameters()}

    def updated(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
        result = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(start)
        return result

    rates = layer_rates(model, 0.5, 0.5)
    decayed = build_optimizer(model, lr=0.1, **settings, rates=rates)
    # Groups of both towers, of equal distance from their projections, are one; the projections have no gains.
    num_rates = 2 + max(model.config.vision.layers, model.config.text.layers)
    assert len(decayed.param_groups) == 2 * num_rates
    ours = updated(decayed)
    for rate in set(rates.values()):
        theirs = updated(build_optimizer(model, lr=0.1 * rate, **settings))
        for name, parameter in model.named_parameters():
            if rates.get(parameter, 1.0) == rate:
                assert torch.equal(ours[name], theirs[name]), name


def test_the_preset_sets_only_what_is_not_given():
    def preset(line: str) -> tuple[RunConfig, str | None]:
        given, names = parse_command_line(["--train-data", "x.tar", *line.split()])
        config = resolve(given)
        is_given = "warmup" in names
        warmup = warmup_steps(config, is_given, 1000)
        config = dataclasses.replace(config, warmup=warmup)
        return config, finetune_note(given, config, is_given)

    config, note = preset("--finetune --pretrained w.pt")
    assert (config.lr, config.image_layer_decay, config.text_layer_decay) == (1e-5, 0.75, 0.75)
    assert note == (
        "--finetune sets --lr 1e-05, --image-layer-decay 0.75, --text-layer-decay 0.75, --warmup 100"
    )
    config, note = preset("--finetune --pretrained-image w.pt --lr 3e-6 --warmup 7")
    assert (config.lr, config.warmup, config.image_layer_decay) == (3e-6, 7, 0.75)
    assert note == "--finetune sets --image-layer-decay 0.75, --text-layer-decay 0.75"
    plain, note = preset("--pretrained w.pt")
    assert (plain.lr, plain.image_layer_decay, note) == (5e-4, None, None)
    # A tenth also of a long run, where the paper's 2,000 steps would be less.
    plain, tuned = (
        resolve(parse_command_line(["--train-data", "x.tar", *more, "--pretrained", "w.pt"])[0])
        for more in ([], ["--finetune"])
    )
    assert (warmup_steps(plain, False, 50_000), warmup_steps(tuned, False, 50_000)) == (2000, 5000)
    with pytest.raises(ConfigError, match=r"--finetune goes on from weights: name them with"):
        preset("--finetune")
    with pytest.raises(ConfigError, match=r"--wise-alpha goes on from weights: name them with"):
        preset("--wise-alpha 0.5")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=40)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIP, Path]:
    """Return a model for the vocabulary of bytes, and its weights in a file."""
    torch.manual_seed(1)
    model = create_model("ViT-nano-8-32", force_vocab_size=byte_tokenizer().vocab_size)
    return model, saved(tmp_path_factory.mktemp("weights") / "start.pt", model)


def flags(folder: Path, data: Path, *more: object) -> list[str]:
    """Return the command line of a run of ten steps."""
    line = ["--logs", folder, "--name", "run", "--train-data", data, *NANO, "--threads", 1]
    line += ["--batch-size", 8, "--epochs", 2, "--keep-checkpoints", 0, "--save-every-steps", 1]
    return [str(word) for word in (*line, *more)]


def test_a_fine_tuning_run_goes_on_bit_for_bit(start, table, tmp_path, in_process, capfd):
    model, weights = start
    more = ["--finetune", "--pretrained", weights, "--text-layer-decay", 1e-30]
    assert train.main(flags(tmp_path, table, *more, "--ema-decay", 0.9)) == 0
    said = "--finetune sets --lr 1e-05, --image-layer-decay 0.75, --warmup 1\n"
    assert said in capfd.readouterr().out
    saved_config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved_config["warmup"] == 1 and saved_config["image_layer_decay"] == 0.75
    # So small a rate moves no weight but those of the projection.
    tensors, _ = final_state(tmp_path / "run")
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, tensors[f"model/{n}"])}
    still = {name for name in model.state_dict() if name not in moved}
    assert still and all(rate_of(name, model.config.text.layers, 0.5) < 1 for name in still)
    assert {"visual.conv1.weight", "text_projection", "logit_scale"} <= moved
    assert "token_embedding.weight" in still
    shutil.copytree(tmp_path / "run", tmp_path / "straight")

    begun = tmp_path / "run" / "checkpoints" / "step_00000004"
    assert train.main(["--resume", str(begun), "--quiet"]) == 0
    assert "--finetune sets" not in capfd.readouterr().out
    assert_same_bits(tmp_path / "run", tmp_path / "straight")


def test_a_locked_image_tower_begins_from_weights_of_its_own(
    start, table, tmp_path, in_process, capfd
):
    """Of the tower alone, as of a whole CLIP; what does not fit is one line."""
    model, whole = start
    tower = saved(tmp_path / "tower.pt", model.visual)
    ends = []
    for number, weights in enumerate((tower, whole)):
        folder = tmp_path / str(number)
        assert train.main(flags(folder, table, "--pretrained-image", weights, "--lock-image")) == 0
        trained, _, _ = load_run(folder / "run")
        ends.append(trained.state_dict())
    own = model.state_dict()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])
        assert torch.equal(value, own[name]) == name.startswith("visual."), name

    wrong = saved(tmp_path / "wrong.pt", create_model("RN-nano-32").visual)
    capfd.readouterr()
    assert train.main(flags(tmp_path / "2", table, "--pretrained-image", wrong)) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "do not fit the image tower of" in said[0]
