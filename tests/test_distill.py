"""Distillation: open_clip's loss to the last digit, over ranks, in bounded memory, and in a run."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import LiveStorages
from openclip import import_open_clip
from problems import assert_exact, unit_embeddings
from runs import NANO, assert_same_bits
from shards import write_csv
from torch import Tensor
from weight_files import hub_folder, saved

import clipcore
from clipcore import train
from clipcore.data.loader import Batch
from clipcore.export.write import export_model
from clipcore.loss import ClipLoss, DistillClipLoss
from clipcore.ranks.distributed import World
from clipcore.run import teacher as teachers
from clipcore.run import train_step
from clipcore.run.collapse import CollapseWatch
from clipcore.run.command_line import parse_command_line
from clipcore.run.config import ConfigError
from clipcore.run.metrics import read_metrics
from clipcore.run.recipe import RunConfig, resolve
from clipcore.run.sharding import replicate
from clipcore.run.state import load_run
from clipcore.run.teacher import build_teacher
from clipcore.run.train_step import TrainingStep
from clipcore.tokenizer import byte_tokenizer, train_tokenizer
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

SCALE, TEACHER_SCALE = 30.0, 50.0


def problem(num_pairs: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return [image, text, scale] of a student, and of a teacher of another width."""
    torch.manual_seed(num_pairs)
    student = unit_embeddings(num_pairs, num_pairs, 6, dtype=dtype)
    teacher = unit_embeddings(num_pairs, num_pairs, 10, dtype=dtype)
    scales = (torch.tensor(value, dtype=dtype) for value in (SCALE, TEACHER_SCALE))
    return [*student, next(scales), *teacher, next(scales)]


def with_gradients(loss_fn: Any, tensors: list[Tensor], is_dict: bool = False) -> list[Tensor]:
    """Return [sum of losses, gradients of the student's three, both losses]."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    losses = loss_fn(*leaves, *tensors[3:], output_dict=is_dict)
    contrastive, distill = losses.values() if is_dict else losses
    total = contrastive + distill
    found = torch.autograd.grad(total, leaves)
    return [total.detach(), *found, contrastive.detach(), distill.detach()]


@pytest.mark.parametrize("workspace_bytes", [None, 1, 700])
@pytest.mark.parametrize("num_pairs", [1, 2, 13])
def test_losses_and_gradients_are_open_clips(num_pairs, workspace_bytes):
    """At once, row by row, and in blocks of some rows."""
    theirs = with_gradients(import_open_clip().loss.DistillClipLoss(), problem(num_pairs))
    ours = with_gradients(
        DistillClipLoss(workspace_bytes=workspace_bytes), problem(num_pairs), is_dict=True
    )
    assert_exact(ours, theirs)


def test_a_teacher_of_its_own_features_leaves_nothing_to_learn_from_it():
    """The cross-entropy to itself is the entropy, whose gradient is zero."""
    image, text, scale = problem(9)[:3]
    leaf = image.clone().requires_grad_()
    _, distill = DistillClipLoss()(leaf, text, scale, image, text, scale)
    (gradient,) = torch.autograd.grad(distill, leaf)
    assert gradient.abs().max() < 1e-12
    p = (scale * image @ text.T).softmax(1), (scale * text @ image.T).softmax(1)
    entropy = sum(-(q * q.log()).sum(1).mean() for q in p) / 2
    torch.testing.assert_close(distill.detach(), entropy, rtol=1e-12, atol=0)


def test_autocast_rounds_no_product_of_the_soft_targets():
    plain = with_gradients(DistillClipLoss(), problem(33, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = with_gradients(DistillClipLoss(), problem(33, torch.float32))
    for one, other in zip(plain, rounded, strict=True):
        assert torch.equal(one, other)


def test_no_matrix_of_all_pairs_is_in_memory():
    """The largest tensor and the peak stay within what the loss says, which grows with the batch and not its square."""
    said = []
    for num_pairs in (256, 512):
        tensors = problem(num_pairs, torch.float32)
        workspace_bytes = 16 * num_pairs * 4
        loss_fn = DistillClipLoss(stash_bytes=0, workspace_bytes=workspace_bytes)
        leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
        with LiveStorages() as storages:
            contrastive, distill = loss_fn(*leaves, *tensors[3:])
            (contrastive + distill).backward()
        said.append(loss_fn.memory_bytes(*leaves[:2]))
        assert storages.bytes <= max(workspace_bytes, num_pairs * 10 * 8)
        assert storages.peak_bytes <= said[-1]
    assert said[1] <= 2 * said[0]


def test_mistakes_are_named():
    tensors = problem(4)
    for change, message in (
        ({3: tensors[3][:3], 4: tensors[4][:3]}, "all four have as many rows; got 4, 4, 3 and 3"),
        ({1: tensors[1][:3]}, "all four have as many rows; got 4, 3, 4 and 4"),
        ({3: tensors[3][:, :5]}, "must be pairs of one shape"),
        ({5: torch.ones(2)}, "dist_logit_scale has to be a number or one"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillClipLoss()(*(change.get(i, tensor) for i, tensor in enumerate(tensors)))
    with pytest.raises(ValueError, match="leave label_smoothing out"):
        DistillClipLoss(label_smoothing=0.1)(*tensors)

    class Own(DistillClipLoss):
        def get_logits(self, *arguments: Any) -> Any:
            raise AssertionError

    with pytest.raises(ValueError, match="a custom get_logits has no effect"):
        Own()(*tensors)
    assert issubclass(clipcore.DistillClipLoss, ClipLoss)


# In a run.


def model_of(seed: int, name: str = "ViT-nano-8-32", **settings: object) -> CLIP:
    torch.manual_seed(seed)
    return create_model(name, force_vocab_size=byte_tokenizer().vocab_size, **settings)


def step_of(model: CLIP, teacher: CLIP | None) -> TrainingStep:
    loss_fn = ClipLoss() if teacher is None else DistillClipLoss()
    return TrainingStep(
        model=model,
        loss_fn=loss_fn,
        world=World(0, 1, 0, torch.device("cpu")),
        precision="fp32",
        seed=0,
        global_batch_size=6,
        scale_loss=lambda loss: loss,
        teacher=teacher,
    )


@pytest.mark.parametrize(
    ("name", "dropout", "bias"),
    [("ViT-nano-8-32", None, None), ("RN-nano-32", 0.5, None), ("ViT-nano-8-32", None, -10)],
)
def test_a_step_in_micro_batches_has_the_gradients_of_open_clips_loss(name, dropout, bias):
    """In float64; the teacher has features of another width, drops no patches, and gets no gradient.

    A logit bias changes no softmax: its gradient is zero.
    """
    model = model_of(1, force_patch_dropout=dropout, init_logit_bias=bias).double()
    teacher = model_of(2, name, embed_dim=48).double().eval().requires_grad_(False)
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    tokens = torch.stack([byte_tokenizer()([f"number {i}"])[0] for i in range(6)])
    batch = Batch(images, tokens, torch.arange(6))
    training = step_of(model, teacher)

    embed = training.embedder(batch, 0, model)
    torch.manual_seed(0)
    features = embed(slice(0, 6), None)
    with torch.no_grad():
        taught = teacher(images, tokens)
    losses = import_open_clip().loss.DistillClipLoss()(*features[:3], *taught)
    expected = torch.autograd.grad(
        sum(losses), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    for num_parts in (1, 3):
        model.zero_grad()
        output = training.gradients(batch, 0, num_parts=num_parts)
        torch.testing.assert_close(output.loss, sum(losses).detach(), rtol=1e-12, atol=1e-12)
        for parameter, theirs in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-10, atol=1e-12)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def two_steps_of_rank(world: World, num_parts: int) -> list[Tensor | None]:
    """Return the gradients of the second of two steps of a student with a logit bias, averaged over ranks."""
    model, teacher = model_of(1, init_logit_bias=-10), model_of(2).eval().requires_grad_(False)
    training = step_of(model.double(), teacher.double())
    training.world, training.global_batch_size = world, 4 * world.world_size
    training.loss_fn = DistillClipLoss(rank=world.rank, world_size=world.world_size)
    training.reduced = replicate(model) if world.world_size > 1 else None
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    tokens = byte_tokenizer()([f"number {i}" for i in range(8)])
    share = slice(4 * world.rank, 4 * world.rank + 4) if world.world_size > 1 else slice(0, 8)
    batch = Batch(images[share], tokens[share], torch.arange(8)[share])
    for step in range(2):
        model.zero_grad()
        training.gradients(batch, step, num_parts=num_parts)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_gradient_of_a_bias_is_zero_on_every_rank(pool_of_two, num_parts):
    expected = two_steps_of_rank(World(0, 1, 0, torch.device("cpu")), 1)
    biases = [
        name.endswith("logit_bias")
        for name, _ in model_of(1, init_logit_bias=-10).named_parameters()
    ]
    assert sum(biases) == 1
    for found in pool_of_two.run(two_steps_of_rank, num_parts):
        assert found[biases.index(True)] == 0
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=40)


def flags(folder: Path, data: Path, *more: object) -> list[str]:
    line = ["--logs", folder, "--name", "run", "--train-data", data, *NANO, "--threads", 1]
    line += ["--batch-size", 4, "--accum-freq", 2, "--epochs", 1, "--keep-checkpoints", 0]
    return [str(word) for word in (*line, "--save-every-steps", 1, *more)]


def test_a_run_learns_from_a_teacher_and_goes_on_bit_for_bit(table, tmp_path, in_process, capfd):
    weights = saved(tmp_path / "teacher.pt", model_of(2))
    named = ["--distill-model", "ViT-nano-8-32", "--distill-pretrained", weights]
    assert train.main(flags(tmp_path, table, *named, "--verify-gradients")) == 0
    said = capfd.readouterr().out
    assert "the cross-entropy to the softmax of a teacher, ViT-nano-8-32" in said
    assert "gradients of 8 pairs verified against float64" in said
    steps, _ = read_metrics(tmp_path / "run")
    # Twice that of guessing, since both are about it.
    assert 2 * math.log(8) < steps[0]["loss"] + 0.5
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    begun = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert train.main(["--resume", str(begun), "--quiet"]) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "straight")

    # The run itself is a teacher, which says what it is, and its vocabulary is compared.
    config = config_of("--distill-pretrained", tmp_path / "run")
    teacher = build_teacher(config, model_of(1), byte_tokenizer(), torch.device("cpu"))
    trained, _, _ = load_run(tmp_path / "run")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    other = train_tokenizer(["to be or not to be", "to see"] * 9, 520)
    with pytest.raises(ConfigError, match="was trained with another vocabulary"):
        build_teacher(config, model_of(1), other, torch.device("cpu"))
    # Its own name is that of its model, whatever its dropout and vocabulary.
    named = config_of("--distill-pretrained", tmp_path / "run", "--distill-model", "ViT-nano-8-32")
    dropping = dataclasses.replace(trained.config.vision, patch_dropout=0.5)
    dropping = CLIP(dataclasses.replace(trained.config, vision=dropping)).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "load_run", lambda path: (dropping, None, byte_tokenizer()))
        assert build_teacher(named, model_of(1), byte_tokenizer(), torch.device("cpu")) is dropping
    config = config_of("--distill-pretrained", tmp_path / "run", "--distill-model", "RN-nano-32")
    with pytest.raises(ConfigError, match="--distill-model RN-nano-32 is not the model of the run"):
        build_teacher(config, model_of(1), byte_tokenizer(), torch.device("cpu"))


def config_of(*line: object) -> RunConfig:
    return resolve(parse_command_line([str(word) for word in line])[0])


def test_a_collapsed_student_stands_at_twice_the_loss_of_guessing():
    watch = CollapseWatch(8, is_sigmoid=False, warmup=0, is_distilled=True)
    for step in range(1, 40):
        watch.see(step, 3.0, 1.0)
    assert not watch.collapses
    for step in range(40, 80):
        watch.see(step, 2 * math.log(8), 1e-3)
    (collapse,) = watch.collapses
    assert collapse.first == 40 and "that of guessing, 4.159" in watch.describe(collapse)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"force_image_size": 64}, "choose --force-image-size 64"),
        ({"force_context_length": 9}, "reads captions of 9 tokens"),
        ({"force_vocab_size": 600}, "has 600 tokens, and this run's vocabulary 514"),
        (
            {"text_cfg": {"vocab_size": 514, "width": 64, "no_causal_mask": True}},
            "the teacher reads the padding of captions too",
        ),
    ],
)
def test_a_teacher_of_other_inputs_is_refused(settings, message, tmp_path):
    config = config_of("--distill-pretrained", tmp_path / "t")
    torch.manual_seed(0)
    hub_folder(
        tmp_path / "t", create_model("ViT-nano-8-32", **{"force_vocab_size": 514, **settings})
    )
    with pytest.raises(ConfigError, match=message):
        build_teacher(config, model_of(1), byte_tokenizer(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"context_length": 99}, "has context_length 99 and this model 77"),
        ({"clean": "canonicalize"}, "has clean canonicalize and this model whitespace"),
        ({"strip_sep_token": True}, "has strip_sep_token True and this model False"),
        ({"pool_type": "eos", "eos_id": 513}, "has pool_type eos and this model last"),
    ],
)
def test_a_teacher_that_reads_padding_takes_the_rows_of_the_student(more, message, tmp_path):
    config = config_of("--distill-pretrained", tmp_path / "t")
    reader = {"vocab_size": 514, "width": 64, "heads": 2, "layers": 1}
    reader |= {"no_causal_mask": True, "pool_type": "last"}
    student = create_model("ViT-nano-8-32", text_cfg=reader)
    hub_folder(tmp_path / "t", create_model("ViT-nano-8-32", text_cfg={**reader, **more}))
    with pytest.raises(ConfigError, match=message):
        build_teacher(config, student, byte_tokenizer(), torch.device("cpu"))


def test_a_teachers_vocabulary_of_the_same_size_is_compared(tmp_path):
    words = train_tokenizer(["to be or not to be", "to see"] * 9, 516)
    other = train_tokenizer(["an old cat on an old mat"] * 9, 516)
    assert words.vocab_size == other.vocab_size
    model = create_model("ViT-nano-8-32", force_vocab_size=words.vocab_size)
    export_model(model, words, "transformers", tmp_path / "t", is_checked=False)
    config = config_of("--distill-pretrained", tmp_path / "t")
    build_teacher(config, model, words, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"was trained with another vocabulary .* --tokenizer"):
        build_teacher(config, model, other, torch.device("cpu"))


def test_a_teacher_embeds_few_pairs_at_once_and_no_feature_changes(monkeypatch):
    """The memory plan, which may keep a batch whole, does not measure the teacher."""
    training = step_of(model_of(1), model_of(2).double().eval())
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    tokens = byte_tokenizer()([f"number {i}" for i in range(6)])
    batch = Batch(images, tokens, torch.arange(6))
    expected = training.features_of_teacher(batch, 0)
    sizes = []
    training.teacher.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr(train_step, "TEACHER_ROWS", 4)
    found = training.features_of_teacher(batch, 0)
    assert sizes == [3, 3]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
