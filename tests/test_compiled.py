"""Compiled transformer blocks: the values of the others, how often is compiled, and whole runs with ``--torchcompile``.

Inductor takes seconds a graph, so most tests trace the same graphs and run them by torch's own operators ("aot_eager").
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankPool
from runs import NANO, PROGRAMS, ROOT, RunServer, assert_same_bits, final_state
from shards import write_csv
from torch import Tensor, nn
from torch._dynamo.utils import counters

from clipcore.data.loader import Batch
from clipcore.data.packing import pack_captions
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run.compiled import compile_blocks, uncompile_blocks
from clipcore.run.config import ConfigError, TrainConfig
from clipcore.run.sharding import gradient_sync, replicate, shard
from clipcore.run.train_step import TrainingStep
from clipcore.run.verify import verify_gradients
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP
from clipcore.towers.modules import ResidualAttentionBlock

END = 513


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Begin without code and counts of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def new_model(precision: str = "fp64", **settings: Any) -> CLIP:
    """Return a model of two towers of two blocks, none of whose weights are zero, in training."""
    torch.manual_seed(0)
    model = create_model("ViT-nano-8-32", precision=precision, force_vocab_size=514, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def deeper_model(layers: int) -> CLIP:
    """Return such a model with more blocks, and towers of two widths."""
    model = new_model("fp32")
    for tower, width in ((model.visual.transformer, 32), (model.transformer, 32)):
        blocks = (ResidualAttentionBlock(width, 2, 4.0, False) for _ in range(layers))
        tower.resblocks = nn.ModuleList(blocks)
    return model


def captions(num_pairs: int, length: int) -> Tensor:
    """Return captions of which the longest has this length; the others have a third of it or less."""
    tokens = torch.zeros(num_pairs, length, dtype=torch.int64)
    for i in range(num_pairs):
        end = length if i == 0 else 1 + i % max(1, length // 3)
        tokens[i, :end] = torch.randint(1, 500, (end,))
        tokens[i, end - 1] = END
    return tokens


def results(model: CLIP, images: Tensor, text: Any) -> dict[str, Tensor]:
    """Return features, and the gradients of a sum in which each of their numbers has a factor of its own."""
    model.zero_grad()
    torch.manual_seed(1)
    found = dict(zip(("image", "text"), model(images, text)[:2], strict=True))
    factors = torch.linspace(-1, 1, found["image"].numel(), dtype=torch.float64)
    trained = [side for side in found.values() if side.requires_grad]
    sum((side.double().flatten() * factors).sum() for side in trained).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in (found | gradients).items()}


def assert_equal_to_1e12(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        limit = 1e-12 * max(1.0, exact.abs().max().item())
        assert (ours[name] - exact).abs().max().item() <= limit, name


# Values.


def train_norms_only(model: CLIP) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_" in name)


CHANGES: dict[str, Callable[[CLIP], Any]] = {
    "whole": lambda model: None,
    "recomputed": lambda model: model.set_grad_checkpointing(True),
    "locked image tower": lambda model: model.lock_image_tower(),
    "locked in part": lambda model: (model.lock_image_tower(3), model.lock_text_tower(2)),
    "locked within blocks": train_norms_only,
}


# Of one tower for the other too, since they have one width. Locked blocks and such as train only in part have their own.
NUM_GRAPHS = {
    "whole": 3,
    "recomputed": 3,
    "locked image tower": 6,
    "locked in part": 5,
    "locked within blocks": 3,
}


@pytest.mark.parametrize(
    ("change", "quick"), [*((change, False) for change in CHANGES), ("recomputed", True)]
)
def test_features_and_gradients_are_those_of_the_uncompiled_blocks(
    change: str, quick: bool
) -> None:
    plain = new_model(force_quick_gelu=quick, force_patch_dropout=0.5)
    CHANGES[change](plain)
    model = copy.deepcopy(plain)
    halves = compile_blocks(model, "aot_eager")
    tokens = captions(5, 20)
    for text in (tokens, tokens[:, :1] * 0 + END, pack_captions(tokens)):
        images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
        ours = results(model, images, text)
        assert_equal_to_1e12(ours, results(plain, images, text))
        with torch.no_grad():
            torch.manual_seed(1)
            for name, again in zip(("image", "text"), model(images, text), strict=False):
                assert torch.equal(again, ours[name]) and not again.requires_grad
    assert counters["stats"]["unique_graphs"] == halves.num_graphs == NUM_GRAPHS[change]


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_either_part_of_a_stream_may_have_a_gradient(needs: tuple[bool, bool]) -> None:
    plain = new_model().visual.transformer.resblocks[0]
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, "aot_eager")
    found: list[dict[str, Tensor]] = []
    values = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    for block in (compiled, plain):
        stream = [x.clone().requires_grad_(need) for x, need in zip(values, needs, strict=True)]
        out = sum(block(*stream, True))
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        assert [x.grad is not None for x in stream] == list(needs)
        gradients = [x.grad for x in (*stream, *block.parameters()) if x.grad is not None]
        found.append({str(i): value for i, value in enumerate((out.detach(), *gradients))})
    assert_equal_to_1e12(*found)


def test_under_autocast_as_near_to_float64_as_the_uncompiled_blocks() -> None:
    plain = new_model("fp32")
    exact = copy.deepcopy(plain).double()
    model = copy.deepcopy(plain)
    compile_blocks(model, "aot_eager")
    images, tokens = torch.randn(6, 3, 32, 32), captions(6, 20)
    expected = results(exact, images.double(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(one, images, tokens) for one in (model, plain))
    assert ours.keys() == theirs.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == theirs[name].dtype
        errors = [(found[name].double() - value).norm() for found in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3 * value.norm(), name


@pytest.mark.parametrize("num_kept", [1, 3])
def test_cached_micro_batches_have_the_direct_gradients(num_kept: int) -> None:
    plain = new_model(force_patch_dropout=0.25)
    model = copy.deepcopy(plain)
    halves = compile_blocks(model, "aot_eager")
    batch = pairs(11)
    expected = gradients(step_of(plain, 11, None), batch)
    assert_equal_to_1e12(gradients(step_of(model, 11, 3, num_kept), batch), expected)
    assert halves.num_graphs == 3


def test_a_plan_measures_the_compiled_blocks_and_compiles_nothing_anew() -> None:
    model = new_model("fp32")
    step = dataclasses.replace(step_of(model, 70, None), num_kept_graphs=None)
    batch = pairs(70)
    halves = compile_blocks(model, "aot_eager_decomp_partition")
    gradients(step, pairs(2))
    made = step.plan(batch, 0)
    assert made.num_rows == 70 and all(p.grad is None for p in model.parameters())
    gradients(step, batch)
    assert halves.num_graphs == counters["stats"]["unique_graphs"] == 3


def pairs(num_pairs: int) -> Batch:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (num_pairs, 3, 32, 32), np.uint8))
    return Batch(images, captions(num_pairs, 12), torch.arange(num_pairs))


def step_of(model: CLIP, num_pairs: int, size: int | None, kept: int = 1) -> TrainingStep:
    return TrainingStep(
        model=model,
        loss_fn=ClipLoss(),
        world=World(0, 1, 0, torch.device("cpu")),
        precision="fp32",
        seed=5,
        global_batch_size=num_pairs,
        scale_loss=lambda loss: loss,
        micro_batch_size=size,
        num_kept_graphs=kept,
    )


def gradients(step: TrainingStep, batch: Batch) -> dict[str, Tensor]:
    step.model.zero_grad()
    step.gradients(batch, 7)
    named = step.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_gradients_are_verified_against_the_uncompiled_blocks() -> None:
    model = new_model("fp32")
    halves = compile_blocks(model, "aot_eager")
    batch = pairs(12)
    assert verify_gradients(step_of(model, 12, 5), batch, 0).startswith("gradients of 12 pairs")
    assert halves.num_graphs == 3  # none of them for float64
    assert all(block.compiled is halves for block in blocks(model))


def blocks(model: nn.Module) -> list[ResidualAttentionBlock]:
    return [part for part in model.modules() if isinstance(part, ResidualAttentionBlock)]


# How often is compiled.


@pytest.mark.parametrize("first", [(7, 16), (1, 1), (32, 32)])
def test_three_graphs_serve_every_length_number_and_depth(first: tuple[int, int]) -> None:
    """One more where a tower has three blocks or more: of those that get the stream in two parts. Widths are equal here."""
    model = deeper_model(layers=3)
    halves = compile_blocks(model, "aot_eager")
    num_pairs, length = first
    model(torch.randn(num_pairs, 3, 32, 32), captions(num_pairs, length))
    for num_pairs in (1, 2, 3, 32, 31):
        for is_recorded in (False, True):
            with torch.set_grad_enabled(is_recorded):
                model.encode_image(torch.randn(num_pairs, 3, 32, 32))
    # Those at which torch may take a length for a constant or a multiple, and some between.
    for length in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 76, 77):
        tokens = captions(1 + length % 3, length)
        for text in (tokens, pack_captions(tokens)):
            with torch.set_grad_enabled(length % 2 > 0):
                model.encode_text(text)
    assert halves.num_graphs == counters["stats"]["unique_graphs"] == 4
    for num_pairs in (4, 5):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=num_pairs == 4):
            model(torch.randn(num_pairs, 3, 32, 32), captions(num_pairs, 9))
    assert halves.num_graphs == counters["stats"]["unique_graphs"] == 8


def test_depth_costs_no_graph() -> None:
    numbers = []
    for layers in (3, 12):
        model = deeper_model(layers)
        halves = compile_blocks(model, "eager")
        model(torch.randn(2, 3, 32, 32), captions(2, 9))
        numbers.append(halves.num_graphs)
    assert numbers == [4, 4]


def test_a_partly_locked_tower_meets_no_limit() -> None:
    """Each pattern of trained weights has code of its own, so that no code object is compiled for eight of them."""
    model = deeper_model(layers=3)
    halves = compile_blocks(model, "eager")
    for i in range(9):
        for j, parameter in enumerate(model.visual.transformer.parameters()):
            parameter.requires_grad_(j % 13 <= i)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "torch.compile has compiled")
            model(torch.randn(2, 3, 32, 32), captions(2, 9))
    assert halves.num_graphs == counters["stats"]["unique_graphs"] > 8


@torch._dynamo.config.patch(recompile_limit=1)
def test_too_many_compilations_are_said_and_change_no_value() -> None:
    plain = new_model()
    model = copy.deepcopy(plain)
    halves = compile_blocks(model, "aot_eager")
    images, tokens = torch.randn(3, 3, 32, 32, dtype=torch.float64), captions(3, 9)
    results(model, images, tokens)
    torch.use_deterministic_algorithms(True)  # code is compiled for one setting of it
    try:
        with pytest.warns(UserWarning, match=r"has compiled a part .* \(\w+\) too often") as told:
            ours = results(model, images, tokens)
        expected = results(plain, images, tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(told) == 1 and halves.num_graphs == 3 and halves.is_given_up
    # From then on our own operations compute, whose activations are those that a plan knows.
    assert model.transformer.resblocks[0]._halves() is None
    assert_equal_to_1e12(ours, expected)


# What is kept.


def test_a_block_keeps_ten_numbers_a_token_and_unit_of_width() -> None:
    """In 16 bits 20 bytes, as by our own operations, and no cast of a weight."""
    block = ResidualAttentionBlock(64, 2, 4.0, False)
    compile_blocks(block, "aot_eager_decomp_partition")
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x, delta = torch.randn(2, 2, 40, 64, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block(x, delta)
    # float32: two statistics of each LayerNorm, a log-sum-exp of each of the two heads
    assert sum(kept.values()) == 2 * 40 * (20 * 64 + 4 * (4 + 2))


# What users do with a model.


def test_parameters_keep_their_names_and_a_model_can_be_copied_and_pickled() -> None:
    model = new_model()
    names = list(model.state_dict())
    halves = compile_blocks(model, "aot_eager")
    assert list(model.state_dict()) == names == list(new_model().state_dict())
    assert all(block.compiled is halves for block in blocks(copy.deepcopy(model)))
    images, tokens = torch.randn(3, 3, 32, 32, dtype=torch.float64), captions(3, 9)
    expected = results(model, images, tokens)
    assert_equal_to_1e12(results(pickle.loads(pickle.dumps(model)), images, tokens), expected)
    uncompile_blocks(model)
    assert all(block.compiled is None for block in blocks(model))


def test_evaluation_hooks_and_other_modules_run_uncompiled() -> None:
    model = new_model()
    halves = compile_blocks(model, "aot_eager")
    images, tokens = torch.randn(3, 3, 32, 32, dtype=torch.float64), captions(3, 9)
    model.eval()
    expected = results(model, images, tokens)
    model.train()
    seen: list[tuple[int, ...]] = []
    handles = [
        block.mlp.c_fc.register_forward_hook(lambda *a: seen.append(tuple(a[2].shape)))
        for block in blocks(model)
    ]
    assert_equal_to_1e12(results(model, images, tokens), expected)
    assert len(seen) == 4 and {shape[:-1] for shape in seen} == {(3, 17), (3, 9)}
    assert halves.num_graphs == 0

    for handle in handles:
        handle.remove()
    outputs: list[Any] = []
    for block in blocks(model):
        block.register_forward_hook(lambda *a: outputs.append(a[2]))
    assert_equal_to_1e12(results(model, images, tokens), expected)
    assert len(outputs) == 4 and all(isinstance(output, Tensor) for output in outputs)
    assert halves.num_graphs > 0


def test_a_change_in_place_is_refused() -> None:
    block = new_model().visual.transformer.resblocks[0]
    compile_blocks(block, "aot_eager")
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    output, delta = block(x)
    output += delta
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.square().sum().backward()


# Several ranks.


def gradients_of_ranks(world: World) -> tuple[int, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the graphs, the plain gradients of all pairs, and those of replicated and of split compiled models."""
    images, text = torch.randn(4, 3, 32, 32, dtype=torch.float64), captions(4, 9)
    own = slice(2 * world.rank, 2 * world.rank + 2)

    def loss_of(model: nn.Module, rows: slice) -> Tensor:
        image_BE, text_BE, scale = model(images[rows], text[rows])
        return scale * (image_BE * text_BE).sum() / len(image_BE)

    plain = new_model()
    torch.manual_seed(0)
    loss_of(plain, slice(0, 4)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    found = []
    numbers = []
    for is_split in (False, True):
        torch._dynamo.reset()
        model = new_model()
        halves = compile_blocks(model, "aot_eager")
        if is_split:
            shard(model, world)
        # The first pass compiles, within DistributedDataParallel; a pass without and one with a reduction.
        wrapped = model if is_split else replicate(model)
        if not is_split:
            wrapped.bucket_bytes_cap = 100  # at whose borders torch would cut a graph
        for is_last in (False, True):
            with gradient_sync(wrapped, is_last), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", "FSDP2-wrapped")  # module returned a view
                loss_of(wrapped, own).backward()
        found.append(
            {
                name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) / 2
                for name, p in model.named_parameters()
            }
        )
        numbers.append(halves.num_graphs)
    assert numbers[0] == numbers[1]
    return numbers[0], expected, found


def test_ranks_that_are_replicas_and_ranks_that_share_a_model(pool_of_two: RankPool) -> None:
    for number, expected, found in pool_of_two.run(gradients_of_ranks):
        assert number == 3
        for gradients in found:
            assert_equal_to_1e12(gradients, expected)


def test_sharding_and_compiling_go_together() -> None:
    assert TrainConfig(fsdp=True, torchcompile=True).torchcompile


# By Inductor.


def test_a_compiler_that_fails_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that is killed while it compiles can leave a library cut short in the cache, which each later one meets."""

    def fail(*_: object, **__: object) -> None:
        raise ImportError("x.main.so: file too short")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    # torch makes the folder, and sets the variable, where it is asked for the place.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    step, batch = step_of(new_model("fp32"), 4, None), pairs(4)
    with pytest.raises(
        ConfigError, match=r"fails: x\.main\.so: file too short; .* remove .*, the cache"
    ):
        step.compile_blocks(batch, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for compiled code, filled by a process of its own; what that printed is beside it."""
    folder = tmp_path_factory.mktemp("inductor")
    (folder / "first.json").write_text(compiled_in_a_process(folder, num_pairs=2))
    return folder


def compiled_in_a_process(folder: Path, num_pairs: int) -> str:
    # Without what a user has set for the compiler.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    environment = {
        **kept,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "code"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, str(PROGRAMS / "compile_blocks.py"), str(num_pairs)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_the_next_process_finds_the_code_and_gives_the_same_bits(cache: Path) -> None:
    """Also if it meets another number of pairs first."""
    first = json.loads((cache / "first.json").read_text())
    second = json.loads(compiled_in_a_process(cache, num_pairs=9))
    assert first["graphs"] == second["graphs"] == 3
    assert first["is_replay_equal"] and second["is_replay_equal"]
    # Forward and backward pass of each.
    assert (first["hit"], first["miss"], first["bypass"]) == (0, 6, 0)
    assert (first["autograd_hit"], first["autograd_miss"], first["autograd_bypass"]) == (0, 3, 0)
    assert (second["hit"], second["miss"], second["bypass"]) == (6, 0, 0)
    assert (second["autograd_hit"], second["autograd_miss"], second["autograd_bypass"]) == (3, 0, 0)
    assert first["digest"] == second["digest"]


@pytest.fixture
def compiling_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunServer]:
    """Return a server whose runs find the code of the fixture above."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "code"))
    server = RunServer()
    yield server
    server.close()


def test_runs_are_repeated_and_resumed_bit_for_bit(
    compiling_server: RunServer, tmp_path: Path
) -> None:
    """Nothing of the compiler is in a checkpoint, and the losses are the uncompiled run's."""
    table = write_csv(tmp_path, num_pairs=20)

    def line(name: str, *more: str) -> list[str]:
        settings = "--batch-size 2 --accum-freq 2 --epochs 2 --lr 1e-3 --save-every-steps 1".split()
        data = ["--train-data", str(table), "--force-patch-dropout", "0.5"]
        return ["--logs", str(tmp_path), "--name", name, *data, *settings, *NANO, *more]

    server = compiling_server
    num_events = server.counted(line("straight", "--torchcompile"), tmp_path / "a")
    assert (
        "torch.compile: 4 transformer blocks compiled into 3 functions, "
        in (tmp_path / "a").read_text()
    )
    broken = line("broken", "--torchcompile", "--resume", "latest")
    run = server.start(broken, tmp_path / "b", signals=[(num_events // 2, signal.SIGTERM)])
    assert run.wait() == 143, run.text
    assert server.run(broken, tmp_path / "b")[0] == 0
    assert_same_bits(tmp_path / "straight", tmp_path / "broken")
    assert server.run(line("plain"), tmp_path / "c")[0] == 0
    (ours, rows), (theirs, plain_rows) = (final_state(tmp_path / n) for n in ("straight", "plain"))
    assert ours.keys() == theirs.keys()
    for row, plain_row in zip(rows, plain_rows, strict=True):
        if "loss" in row:
            assert row["loss"] == pytest.approx(plain_row["loss"], rel=1e-4)
