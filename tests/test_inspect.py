"""``python -m clipcore.inspect``: what weights of every origin say about their model, and the call that loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from weight_files import WRITERS, extras_file, hub_folder, run_folder, saved

import clipcore
from clipcore.inspection import inspect_weights, main
from clipcore.tokenizer import VOCABULARY_FILE, byte_tokenizer
from clipcore.towers.factory import create_model

pytestmark = pytest.mark.fast

NAME = "ViT-nano-8-32"
QUICK = f"{NAME}-quickgelu"


def called(call: str) -> dict[str, Any]:
    """Run the call that is shown, and return its variables."""
    variables: dict[str, Any] = {}
    exec(call, variables)
    return variables


@pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning", "ignore:.*jit.*")
@pytest.mark.parametrize("name", [NAME, QUICK])
@pytest.mark.parametrize("writer", [*WRITERS, "bare", "extras"])
def test_the_call_that_is_shown_loads_the_weights(tmp_path: Path, writer: str, name: str) -> None:
    if (writer, name) == ("extras", NAME):
        name = QUICK  # whose files always are
    model = create_model(name).eval()
    write = WRITERS.get(writer, saved if writer == "bare" else extras_file)
    found = inspect_weights(write(tmp_path / "weights", model))
    assert found.fault == ""

    if writer == "bare":
        # Nothing tells the activation of such a file, and the call says which one is assumed.
        assert found.name == NAME and "assumed" in found.activation
        model = create_model(NAME).eval()
        model.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    else:
        assert found.name == name and "assumed" not in found.activation
    variables = called(found.call)
    loaded, images = variables["model"], torch.randn(2, 3, 32, 32)
    assert loaded.config == model.config
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert variables["tokenizer"].vocab_size == model.config.text.vocab_size


def test_parameters_are_counted_as_the_model_has_them(tmp_path: Path) -> None:
    for name in (NAME, "RN-nano-32"):
        model = create_model(name, init_logit_bias=-10.0)
        found = inspect_weights(saved(tmp_path / "weights.pt", model))
        image = sum(p.numel() for p in model.visual.parameters())
        assert found.parameters == {
            "image": image,
            "text": sum(p.numel() for p in model.parameters()) - image - 2,
            "other": 2,
        }
        assert found.logit_bias == -10.0 and found.logit_scale == pytest.approx(1 / 0.07)


def test_stated_preprocessing_is_shown(tmp_path: Path) -> None:
    images = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "resize_mode": "squash"}
    found = inspect_weights(hub_folder(tmp_path / "hub", create_model(NAME), images))
    assert found.images == {"mean": (0.5,) * 3, "std": (0.25, 0.5, 0.5), "resize_mode": "squash"}
    said = dict(found.lines())["preprocessing"]
    assert said == "32 pixels, resize squash, mean 0.5/0.5/0.5, std 0.25/0.5/0.5 (stated)"


def test_a_run_has_its_own_vocabulary(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", create_model(NAME))
    byte_tokenizer().save(run / VOCABULARY_FILE)
    checkpoint = run / "checkpoints/step_00000001"
    for path in (run, checkpoint, checkpoint / "model.safetensors"):
        found = inspect_weights(path)
        assert found.vocabulary == f"514 tokens, {run / VOCABULARY_FILE}"
        assert called(found.call)["tokenizer"].sha256 == byte_tokenizer().sha256


def test_a_model_without_a_name_is_loaded_by_its_shapes(tmp_path: Path) -> None:
    model = create_model(NAME, force_context_length=20, force_vocab_size=700)
    found = inspect_weights(saved(tmp_path / "weights.pt", model))
    assert found.name is None and "bpe_path" in found.vocabulary
    with pytest.warns(UserWarning, match="does not state its model's activation"):
        assert called(found.call)["model"].context_length == 20
    assert "tokenizer" not in found.call


def test_what_keeps_weights_from_loading_is_what_loading_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(**values: torch.Tensor | None) -> Path:
        state = create_model(NAME).state_dict() | values
        path = tmp_path / "weights.pt"
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        return path

    for values, told in (
        ({"visual.ln_pre.bias": None}, "visual.ln_pre.bias is missing"),
        ({"adapter.weight": torch.zeros(2)}, "adapter.weight is unknown"),
        ({"ln_final.weight": torch.full((32,), torch.nan)}, "ln_final.weight in .* is not finite"),
        ({"ln_final.weight": torch.ones(32, dtype=torch.int8)}, "quantised weights are not read"),
        ({"logit_scale": torch.ones(2)}, "logit_scale"),
    ):
        path = changed(**values)
        with pytest.raises(ValueError, match=told) as raised:
            clipcore.create_model_from_pretrained(None, path)
        if "logit_scale" in values:
            continue  # of no CLIP, so that there is nothing to show
        found = inspect_weights(path)
        assert found.call == "" and found.fault == str(raised.value)
        assert main([str(path)]) == 1
        out = capsys.readouterr().out
        assert f"does not load  {found.fault}" in out and "load it by" not in out


def test_a_bias_is_loaded_by_the_call_or_is_a_fault(tmp_path: Path) -> None:
    model = create_model(NAME, init_logit_bias=-120.0)
    found = inspect_weights(saved(tmp_path / "weights.pt", model))
    assert found.logit_bias == -120.0
    with pytest.warns(UserWarning, match="does not state its model's activation"):
        assert called(found.call)["model"].logit_bias == -120.0

    folder = hub_folder(tmp_path / "hub", model)
    assert inspect_weights(folder).fault == ""
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["init_logit_bias"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "no logit_bias" in inspect_weights(folder).fault


def test_positions_of_another_length_are_resized_as_on_loading(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", create_model(NAME))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 40
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    found = inspect_weights(folder)
    assert found.fault == "" and called(found.call)["model"].visual.image_size == (40, 40)


def test_a_vocabulary_beside_weights_is_only_theirs_if_it_belongs_to_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pt", create_model(NAME))
    # What clipcore.tokenizer --train leaves in the current folder.
    byte_tokenizer().save(tmp_path / VOCABULARY_FILE)
    found = inspect_weights(path)
    assert found.vocabulary == "514 tokens, one for each byte"
    assert str(tmp_path) not in found.call.splitlines()[-1]

    run = run_folder(tmp_path / "run", create_model(NAME, force_vocab_size=700))
    byte_tokenizer().save(run / VOCABULARY_FILE)
    found = inspect_weights(run)
    assert "has 514, and is another model's" in found.vocabulary and "tokenizer" not in found.call


def test_files_that_cannot_be_read_are_lines_and_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = saved(tmp_path / "good.pt", create_model(NAME))
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(2)}, other)
    assert main([str(tmp_path / "none.pt"), str(other), str(good)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(
        f"weights        {good}\nmodel          {NAME} (inferred from the shapes)\n"
    )
    missing, foreign = err.splitlines()
    assert (
        missing.startswith("clipcore.inspect: error: cannot read the weights")
        and "none.pt" in missing
    )
    assert foreign.startswith(f"clipcore.inspect: error: {other}: the weights are not a CLIP")


def test_json_is_what_python_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "weights.pt", create_model(NAME))
    assert main(["--json", str(path)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == json.loads(json.dumps(inspect_weights(path).to_dict()))
    assert row["config"] == clipcore.get_model_config(NAME)
