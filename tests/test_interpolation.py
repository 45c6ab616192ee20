"""Interpolated weights: exact ends, float32 between, one model only; as a function, a command, and at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from openclip import import_open_clip
from runs import NANO, leave_process_alone
from shards import write_csv
from weight_files import hub_folder, saved

from clipcore import interpolate, train
from clipcore.evaluate.loading import load_model
from clipcore.export.interpolations import keep_start
from clipcore.export.write import export_model
from clipcore.ranks.distributed import World
from clipcore.run.config import ConfigError
from clipcore.run.metrics import read_metrics
from clipcore.run.state import load_run
from clipcore.tokenizer import VOCABULARY_FILE, byte_tokenizer, train_tokenizer
from clipcore.towers.factory import create_model, create_model_from_pretrained
from clipcore.towers.interpolation import interpolated
from clipcore.towers.model import CLIP


def model_of(seed: int, name: str = "ViT-nano-8-32", **settings: object) -> CLIP:
    torch.manual_seed(seed)
    return create_model(name, force_vocab_size=byte_tokenizer().vocab_size, **settings)


def assert_equal_weights(model: CLIP, expected: dict[str, torch.Tensor]) -> None:
    """Compare bits, also the sign of a zero."""
    for name, value in model.state_dict().items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape
        assert value.numpy().tobytes() == expected[name].numpy().tobytes(), name


@pytest.mark.fast
def test_ends_are_exact_and_between_them_float32_is_used():
    start, end = model_of(1, "RN-nano-32"), model_of(2, "RN-nano-32", precision="bf16")
    with torch.no_grad():
        # 0 times infinity is no number, and 0 plus minus zero loses the sign.
        start.text_projection.flatten()[:3] = torch.tensor([-0.0, 1.0, torch.inf])
        end.text_projection.flatten()[:3] = torch.tensor([1.0, torch.inf, -0.0])
        for number, model in enumerate((start, end)):
            model.visual.bn1.num_batches_tracked.fill_(number + 3)
    first = {name: value.float() for name, value in start.state_dict().items()}
    last = {name: value.float() for name, value in end.state_dict().items()}
    for states in (first, last):
        for name in states:
            if name.endswith("num_batches_tracked"):
                states[name] = states[name].long()

    assert_equal_weights(interpolated(start, end, 0), first)
    assert_equal_weights(interpolated(start, end, 1), last)
    between = {
        name: 0.7 * value + 0.3 * last[name] if value.is_floating_point() else last[name]
        for name, value in first.items()
    }
    assert_equal_weights(interpolated(start, end, 0.3), between)
    # The models themselves are left alone.
    assert end.text_projection.dtype == torch.bfloat16 and start.text_projection.flatten()[1] == 1


@pytest.mark.fast
def test_models_of_different_shapes_or_activations_are_refused():
    start = model_of(1)
    others = [model_of(2, force_image_size=64), model_of(2, force_quick_gelu=True)]
    others += [create_model("ViT-nano-8-32", force_vocab_size=600)]
    others += [model_of(2, init_logit_bias=-10.0)]
    for end in others:
        with pytest.raises(ValueError, match="interpolated between two states of one model"):
            interpolated(start, end, 0.5)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha is from 0, the start, to 1, the end"):
            interpolated(start, start, alpha)
    # Only training uses it.
    interpolated(start, model_of(2, force_patch_dropout=0.5), 0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIP, Path]:
    """Return a model, and a run of five steps that began with it and ended with --wise-alpha."""
    folder = tmp_path_factory.mktemp("run")
    start, weights = model_of(1), folder / "start.pt"
    line = ["--logs", folder, "--name", "run", "--train-data", write_csv(folder, num_pairs=40)]
    line += [*NANO, "--threads", 1, "--batch-size", 8, "--epochs", 1, "--lr", 1e-3]
    line += ["--pretrained", saved(weights, start), "--wise-alpha", "0.5,0", "--ema-decay", 0.5]
    line += ["--val-data", folder / "pairs.csv"]
    with pytest.MonkeyPatch.context() as patch:
        leave_process_alone(patch)
        assert train.main([str(word) for word in line]) == 0
    return start, folder / "run"


def test_a_run_writes_and_evaluates_the_models_between_its_ends(run):
    start, run_dir = run
    end, _, tokenizer = load_run(run_dir)  # the moving average
    for alpha, folder in ((0.5, "alpha_0.5"), (0.0, "alpha_0")):
        found = load_model(None, str(run_dir / "wise" / folder))
        assert_equal_weights(found.model, interpolated(start, end, alpha).state_dict())
        assert found.tokenizer.sha256 == tokenizer.sha256
    _, evaluations = read_metrics(run_dir)
    own, half, first = evaluations
    assert (half["alpha"], first["alpha"]) == (0.5, 0.0) and "alpha" not in own
    assert half["task"] == own["task"] + ", alpha 0.5"
    assert len({row["val_loss"] for row in evaluations}) == 3
    assert "alpha 0.5" not in own["task"] and (run_dir / "report.html").is_file()


def test_the_command_gives_the_runs_own_interpolation(run, tmp_path, capsys):
    """From the kept start, and from the file that the run began with; the folder is one for every command."""
    import_open_clip()  # which checks the folder
    _, run_dir = run
    expected = create_model_from_pretrained(None, run_dir / "wise" / "alpha_0.5")[0].state_dict()
    starts = (run_dir / "start", run_dir.parent / "start.pt")
    for number, start in enumerate(starts):
        out = tmp_path / str(number)
        assert interpolate.main([str(start), str(run_dir), str(out), "--alpha", "0.5"]) == 0
        assert_equal_weights(load_model(None, str(out)).model, expected)
        assert "0.5 of the way from" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["other shapes", "no weights", "other images"])
def test_the_commands_mistakes_are_one_line_and_leave_nothing(case, run, tmp_path, capsys):
    start, run_dir = run
    end, more = run_dir, []
    if case == "other shapes":
        path, said = saved(tmp_path / "w.pt", model_of(1, "RN-nano-32")), "do not fit"
    elif case == "no weights":
        path, said = tmp_path / "none.pt", "none.pt"
    else:
        path, end = (
            hub_folder(tmp_path / name, start, {"mean": [mean] * 3, "std": [0.5] * 3})
            for name, mean in (("a", 0.5), ("b", 0.4))
        )
        said = "have different preprocessing: mean is (0.5, 0.5, 0.5) and (0.4, 0.4, 0.4)"
        more = ["--bpe-path", str(run_dir / VOCABULARY_FILE)]
    line = [str(path), str(end), str(tmp_path / "out"), "--alpha", "0.5", *more]
    assert interpolate.main(line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


def test_weights_with_another_vocabulary_are_no_start(run, tmp_path):
    """Those of a run, and those of a folder that has its vocabulary."""
    _, run_dir = run
    exported = tmp_path / "exported"
    own = load_model(str(run_dir))
    export_model(own.model, own.tokenizer, "transformers", exported, is_checked=False)
    interpolate.load_start(str(exported), own)
    other = train_tokenizer(["to be or not to be", "to see"] * 9, 520)
    end = load_model(str(run_dir))._replace(tokenizer=other)
    for start in (run_dir, exported):
        with pytest.raises(ValueError, match="were trained with different vocabularies"):
            interpolate.load_start(str(start), end)


def test_preprocessing_is_compared_with_its_defaults(run, tmp_path, capsys):
    """A start that states the usual mean is refused beside another; one that states nothing has a note."""
    start, run_dir = run
    end = load_model(str(run_dir))
    end.model.set_images({"mean": (0.5, 0.5, 0.5)})
    bare = saved(tmp_path / "bare.pt", start)
    interpolate.load_start(str(bare), end)
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not say its mean; that of" in line and "is (0.5, 0.5, 0.5)" in line
    end.model.set_images({})
    stated = hub_folder(tmp_path / "stated", start, {"mean": [0.5] * 3})
    with pytest.raises(ValueError, match=r"different preprocessing: mean is \(0\.5"):
        interpolate.load_start(str(stated), end)


def test_a_run_keeps_its_start_from_the_beginning_only(run, tmp_path):
    """A run that goes on without it names the command; a run that begins anew replaces it."""
    start, _ = run
    tokenizer, alone = byte_tokenizer(), World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"use python -m clipcore.interpolate START"):
        keep_start(start, tokenizer, tmp_path, alone, is_beginning=False)
    for model in (model_of(5), start):
        keep_start(model, tokenizer, tmp_path, alone, is_beginning=True)
        assert model.training
    keep_start(model_of(5), tokenizer, tmp_path, alone, is_beginning=False)
    assert_equal_weights(load_model(None, str(tmp_path / "start")).model, start.state_dict())
