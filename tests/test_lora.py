"""LoRA: low-rank matrices beside frozen weights, in our kernels, in a run, and in peft's files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from openclip import import_open_clip
from runs import NANO, assert_same_bits, final_state
from shards import write_csv
from torch import Tensor
from weight_files import saved

from clipcore import train
from clipcore.run.command_line import parse_command_line
from clipcore.run.config import ConfigError
from clipcore.run.state import load_run
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model, create_model_from_pretrained
from clipcore.towers.lora import adapter_of, add_lora, load_adapter, merged, write_adapter
from clipcore.towers.model import CLIP


def model_of(seed: int, name: str = "ViT-nano-8-32") -> CLIP:
    torch.manual_seed(seed)
    return create_model(name, force_vocab_size=byte_tokenizer().vocab_size)


def adapted(name: str = "ViT-nano-8-32") -> CLIP:
    """Return a model in float64 whose products are not zero."""
    model = model_of(1, name).double()
    add_lora(model, 3, 6.0)
    with torch.no_grad():
        for value in adapter_of(model).values():
            value.normal_(std=0.1)
    return model.double()


def pairs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    tokens = byte_tokenizer()([f"number {i}" for i in range(4)])
    return torch.randn(4, 3, 32, 32, dtype=torch.float64), tokens


@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_features_and_gradients_are_those_of_the_summed_weights(name):
    """To 1e-12 in float64: of the weight W + 2 B A a gradient G gives B one of 2 G A', A one of 2 B' G."""
    # A ResNet normalises by the running statistics, which LoRA freezes.
    model = adapted(name).eval()
    plain = merged(model)
    assert plain.state_dict().keys() == model_of(1, name).state_dict().keys()
    results = []
    for each in (model, plain):
        image, text, scale = each(*pairs())
        (scale * image @ text.T).square().sum().backward()
        results.append((image.detach(), text.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)

    weights = dict(plain.named_parameters())
    own = adapter_of(model)
    names = {key.rpartition(".")[0] for key in own}
    linear = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    attnpool = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert names == {name for name in weights if name.endswith((*linear, *attnpool))}
    for name in names:
        down, up, whole = own[f"{name}.lora_A"], own[f"{name}.lora_B"], weights[name].grad
        for found, expected in ((up.grad, 2 * whole @ down.T), (down.grad, 2 * up.T @ whole)):
            limit = 1e-10 * max(1.0, expected.abs().max().item())
            assert (found - expected).abs().max().item() <= limit, name
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in own.values()}


def test_blocks_keep_their_kernels_and_locked_layers_get_nothing():
    model = adapted()
    assert all(block.is_as_made() for block in model.transformer.blocks)
    model = model_of(1)
    model.lock_image_tower(unlocked_groups=2)
    add_lora(model, 2, 2.0)
    names = {key for key in adapter_of(model) if key.startswith("visual.")}
    assert names and all(".resblocks.1." in name for name in names)
    model = model_of(1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every linear layer is locked"):
        add_lora(model, 2, 2.0)


def test_autocast_does_not_round_the_product():
    model = adapted().float()
    expected = model.transformer.resblocks[0].mlp.c_fc.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.transformer.resblocks[0].mlp.c_fc.weight, expected)


def test_an_adapter_of_another_rank_is_refused():
    model, other = adapted(), model_of(1)
    add_lora(other, 4, 4.0)
    with pytest.raises(ValueError, match="the adapter is of another rank or of other layers"):
        load_adapter(model, adapter_of(other))


@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_peft_reads_the_adapter(name, tmp_path):
    """Into a plain model of clipcore, with the same features; and merges it."""
    import_open_clip()  # peft imports transformers
    from peft import PeftModel

    model = adapted(name).float()
    write_adapter(model, tmp_path, "start")
    found = PeftModel.from_pretrained(model_of(1, name), tmp_path).eval()
    images, tokens = pairs()
    expected = model.eval()(images.float(), tokens)
    assert found.peft_config["default"].base_model_name_or_path == "start"
    for each in (found, found.merge_and_unload()):
        torch.testing.assert_close(each(images.float(), tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_peft_gives_no_layer_of_a_locked_tower_a_product(tmp_path):
    """The text tower's ``transformer`` is not the image tower's ``visual.transformer``.

    peft's ``target_parameters`` know endings alone: it wraps the packed projections there with products of zero.
    """
    import_open_clip()
    from peft import PeftModel

    model = model_of(1)
    model.lock_image_tower()
    add_lora(model, 2, 2.0)
    write_adapter(model, tmp_path, "start")
    found = PeftModel.from_pretrained(model_of(1), tmp_path)
    given = {name: value for name, value in found.named_parameters() if "lora_" in name}
    text = {name for name in given if ".visual." not in name}
    assert len(text) == len(adapter_of(model))
    rest = given.keys() - text
    assert all(name.rpartition(".lora_")[0].endswith(".attn") for name in rest)
    assert not any(given[name].any() for name in rest if ".lora_B." in name)


def test_training_leaves_the_statistics_of_a_resnet_alone():
    """Checkpoints hold the adapter and not these, so a run goes on with those that it began with."""
    model = model_of(1, "RN-nano-32")
    add_lora(model, 2, 2.0)
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert any(name.endswith("running_var") for name in before)
    images, tokens = pairs()
    image, text, scale = model.train()(images.float(), tokens)
    (scale * image @ text.T).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_run_trains_the_adapter_alone_and_goes_on_bit_for_bit(tmp_path, in_process, capfd):
    start = model_of(1)
    weights = saved(tmp_path / "start.pt", start)
    line = ["--logs", tmp_path, "--name", "run", "--train-data", write_csv(tmp_path, num_pairs=40)]
    line += [*NANO, "--threads", 1, "--batch-size", 8, "--epochs", 1, "--keep-checkpoints", 0]
    line += ["--save-every-steps", 1, "--lora-rank", 2, "--pretrained", weights, "--lr", 0.01]
    line += ["--wise-alpha", "0", "--verify-gradients"]
    assert train.main([str(word) for word in line]) == 0
    run_dir = tmp_path / "run"
    tensors, _ = final_state(run_dir)
    adapter = {k.removeprefix("adapter/") for k in tensors if k.startswith("adapter/")}
    num_trained = sum(tensors[f"adapter/{name}"].numel() for name in adapter)
    said = capfd.readouterr().out
    assert f"; {num_trained:,} are trained" in said and "verified against float64" in said
    moments = {k for k in tensors if k.startswith("optimizer/") and k.endswith("exp_avg")}
    assert sum(tensors[key].numel() for key in moments) == num_trained

    # The checkpoint has whole weights for every reader: only those with a product have moved.
    trained, _, _ = load_run(run_dir)
    own = start.state_dict()
    moved = {n for n, v in trained.state_dict().items() if not torch.equal(v, own[n])}
    assert moved == {name.rpartition(".")[0] for name in adapter}
    first = create_model_from_pretrained(None, run_dir / "wise" / "alpha_0")[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in first.items())
    described = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (2, 2)

    # From the kept start: the file may be gone.
    weights.unlink()
    shutil.copytree(run_dir, tmp_path / "straight")
    begun = run_dir / "checkpoints" / "step_00000002"
    assert train.main(["--resume", str(begun), "--quiet"]) == 0
    assert_same_bits(run_dir, tmp_path / "straight")
    capfd.readouterr()
    assert train.main(["--resume", str(begun), "--quiet", "--lora-alpha", "4"]) == 2
    assert "is of another adapter: {'rank': 2, 'alpha': 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora-alpha 4", "--lora-alpha is of --lora-rank"),
        ("--lora-rank 4 --fsdp --ema-decay 0.9", "does not go with --fsdp, --ema-decay"),
        ("--lora-rank 4 --torchcompile", "does not go with --torchcompile"),
        ("--lora-rank 0", "--lora-rank must be at least 1"),
    ],
)
def test_settings_that_do_not_go_with_it_are_one_line(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_command_line(line.split())
