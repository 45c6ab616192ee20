"""Sharded training on gloo ranks: the numbers of the unsharded model, and checkpoints that fit any number of ranks.

Letters: B pairs of one rank, G pairs of all, E embedding size.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from runs import NANO, PROGRAMS, ROOT
from safetensors.torch import load_file
from shards import write_csv
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from clipcore.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, load_latest
from clipcore.kernels.weight_casts import WeightCasts
from clipcore.ranks.distributed import World, barrier, gather_objects, gather_rows
from clipcore.run.command_line import parse_command_line
from clipcore.run.folders import open_run
from clipcore.run.grad_cache import sharing
from clipcore.run.metrics import read_metrics
from clipcore.run.optim import (
    ExponentialMovingAverage,
    build_optimizer,
    gradient_norm,
    layer_rates,
)
from clipcore.run.sharding import gathered, gradient_sync, is_sharded, shard
from clipcore.run.state import RunState, load_run
from clipcore.tokenizer import VOCABULARY_FILE, byte_tokenizer
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP
from clipcore.train import train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

NUM_RANKS = 3
NUM_PAIRS = 12


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


_groups: dict[int, Any] = {}


def first_ranks(num_ranks: int) -> Any:
    """Return the group of the first ranks; all make it alike, once a process."""
    if num_ranks not in _groups:
        _groups[num_ranks] = dist.new_group(range(num_ranks))
    return _groups[num_ranks]


def new_model(name: str, precision: str = "fp64", **settings: Any) -> CLIP:
    """Equal weights wherever it is called, none of them zero, so that every gradient counts."""
    torch.manual_seed(0)
    model = create_model(name, precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    if settings.get("locked"):
        model.lock_image_tower(unlocked_groups=2)
    model.set_grad_checkpointing(bool(settings.get("recomputed")))
    return model


def pairs(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images [G, 3, S, S] and tokens [G, L] of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(NUM_PAIRS, 3, 32, 32, dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, 256, (NUM_PAIRS, 6), generator=generator)
    tokens[:, -1] = 513
    return images.to(dtype), tokens


def loss_of(image_GE: Tensor, text_GE: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image_GE @ text_GE.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fill_gradients(model: CLIP, world: World, group: Any, step: int, num_kept: int) -> Tensor:
    """Take a step over stored features: two micro-batches embedded without a graph and then replayed, only the last in sync;
    of ``num_kept`` of them the graph is kept instead. Returns the loss."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    images, tokens = (t.chunk(num_ranks)[rank] for t in pairs(step))
    batches = list(zip(images.chunk(2), tokens.chunk(2), strict=True))
    kept = {}
    features = []
    for i, batch in enumerate(batches):
        with torch.set_grad_enabled(i < num_kept):
            *pair, _ = model(*batch)
        features.append([side.detach() for side in pair])
        if i < num_kept:
            kept[i] = pair
    sides = [torch.cat(side) for side in zip(*features, strict=True)]
    sides_GE = [gather_rows(side, group).requires_grad_() for side in sides]
    loss = loss_of(*sides_GE, model.logit_scale.exp())
    *wholes, scale_gradient = torch.autograd.grad(loss, [*sides_GE, model.logit_scale])
    # Ranks average what they pass: each its own rows, and, so that a missing average shows, unequal parts of the scale's.
    own = [num_ranks * whole.chunk(num_ranks)[rank] for whole in wholes]
    model.logit_scale.grad = scale_gradient * (2 * rank + 1) / num_ranks
    for i, batch in enumerate(batches):
        with gradient_sync(model, is_last=i == len(batches) - 1):
            pair = kept[i] if i in kept else model(*batch)[:2]
            ups = [side.chunk(2)[i] for side in own]
            needed = [(y, up) for y, up in zip(pair, ups, strict=True) if y.requires_grad]
            torch.autograd.backward(*map(list, zip(*needed, strict=True)))
        if is_sharded(model) and i < len(batches) - 1:
            assert all(p.grad is None for p in model.parameters() if isinstance(p, DTensor))
    return loss.detach()


def whole(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that are not None, with their rows of all ranks."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
        for name, value in tensors.items()
        if value is not None
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return whole({name: p.grad for name, p in model.named_parameters()})


def steps_of(world: World, num_ranks: int, name: str, num_kept: int, settings: Any) -> Any:
    """Two steps, sharded and not: losses and norms, gradients of the first, clipped ones of the second, weights, moving
    average, features."""
    group = first_ranks(num_ranks)
    if world.rank >= num_ranks:
        return None
    results = []
    for sharded in (True, False):
        model = new_model(name, **settings)
        if sharded:
            shard(model, world, group)
        assert is_sharded(model) is sharded
        settings_of_adam = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
        optimizer = build_optimizer(model, **settings_of_adam, rates=layer_rates(model, 0.5, 0.7))
        ema = ExponentialMovingAverage(model, 0.9)
        results.append(found := [])
        for step in range(2):
            loss = fill_gradients(model, world, group, step, num_kept)
            if not sharded:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad, group=group)
                        parameter.grad /= num_ranks
            if step == 0:
                found.append(gradients(model))
            norm = gradient_norm(model.parameters())
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.01, norm)
            found.append({"loss": loss, "norm": norm})
            if step == 1:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.clamp_logit_scale_()
            ema.update(model, step)
        found += [whole(model.state_dict()), whole(ema.shadow)]
        copy = gathered(model) if sharded else model
        copy.eval()
        with torch.no_grad():
            images, tokens = pairs(9)
            found.append({"image": copy.encode_image(images), "text": copy.encode_text(tokens)})
            if sharded:
                # One rank alone.
                assert rank_of(group) != 1 or copy.encode_image(images[:1]).shape == (1, 32)
                model.eval()
                for side, encode in (("image", model.encode_image), ("text", model.encode_text)):
                    torch.testing.assert_close(encode(pairs(9)[side == "text"]), found[-1][side])
    return results


def rank_of(group: Any) -> int:
    return dist.get_rank(group)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=message)


@pytest.mark.parametrize(
    ("num_ranks", "name", "num_kept", "settings"),
    [
        (3, "ViT-nano-8-32", 0, {}),
        (2, "ViT-nano-8-32", 1, {"locked": True, "recomputed": True}),
        (3, "RN-nano-32", 2, {}),
    ],
)
def test_steps_are_those_of_the_unsharded_model(
    pool: RankPool, num_ranks: int, name: str, num_kept: int, settings: dict[str, Any]
) -> None:
    results = pool.run(steps_of, num_ranks, name, num_kept, settings)
    for sharded, plain in results[:num_ranks]:
        for found, expected in zip(sharded, plain, strict=True):
            assert_close(found, expected)
        # The same bits on every rank: the norms decide about clipping, and the weights are one model's.
        for mine, first in zip(sharded[:-1], results[0][0], strict=False):
            shared = [n for n in mine if not n.endswith(("running_mean", "running_var"))]
            assert all(torch.equal(mine[n], first[n]) for n in shared)
    if name.startswith("ViT"):
        model = new_model(name, **settings)
        loss = loss_of(*model(*pairs(0)))
        loss.backward()
        norm = gradient_norm(model.parameters())
        assert_close(results[0][0][0], gradients(model))
        assert_close(results[0][0][1], {"loss": loss.detach(), "norm": norm})


def accumulate(world: World) -> list[Tensor]:
    """Return the gradient of a replicated layer after a pass without communication, and after the last."""
    layer = nn.Linear(2, 1, bias=False)
    replica = DistributedDataParallel(layer)
    seen = []
    for is_last in (False, True):
        with gradient_sync(replica, is_last):
            replica(torch.full((1, 2), float(world.rank + 10 * is_last))).sum().backward()
        assert layer.weight.grad is not None
        seen.append(layer.weight.grad.clone())
    return seen


def test_replicas_average_after_the_last_pass_only(pool: RankPool) -> None:
    for rank, (first, last) in enumerate(pool.run(accumulate)):
        assert torch.equal(first, torch.full((1, 2), float(rank)))
        assert torch.equal(last, torch.full((1, 2), 12.0))


def mixed_precision(world: World) -> Any:
    """Under bfloat16 autocast: features, dtypes of gradients; and what one infinite gradient does to a float16 step."""
    model, plain = (new_model("ViT-nano-8-32", "fp32") for _ in range(2))
    shard(model, world)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    outputs = []
    kept_bytes = []
    for one in (model, plain):
        casts = WeightCasts()
        with (
            gradient_sync(one, is_last=True),
            sharing(casts, one),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            *features, scale = one(*pairs(0, torch.float32))
            (scale * (features[0] * features[1]).sum()).backward()
        outputs.append([feature.detach() for feature in features])
        kept_bytes.append(casts.nbytes)
    dtypes = {p.grad.dtype for p in model.parameters() if p.grad is not None}

    before = whole(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    if world.rank == 1:
        cast("Any", model.text_projection.grad).to_local()[-1, -1] = torch.inf
    scaler.unscale_(optimizer)
    norm = gradient_norm(model.parameters())
    scaler.step(optimizer)
    scaler.update()
    skipped = all(torch.equal(v, before[n]) for n, v in whole(model.state_dict()).items())
    return outputs, kept_bytes, dtypes, skipped, scaler.get_scale(), norm.isfinite().item()


def test_autocast_decides_as_without_sharding(pool: RankPool) -> None:
    for outputs, kept_bytes, dtypes, skipped, scale, is_finite in pool.run(mixed_precision):
        # The weights of a pass are freed after it, and so are their copies.
        assert kept_bytes[0] == 0 < kept_bytes[1]
        for sharded, plain in zip(*outputs, strict=True):
            assert torch.equal(sharded, plain)
        assert dtypes == {torch.float32}
        assert skipped and scale == 2.0 and not is_finite


# Checkpoints.


def new_state(world: World, group: Any, seed: int) -> RunState:
    """Return the state of a run, its model sharded among a group, or (None) whole."""
    model = new_model("ViT-nano-8-32", "fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += seed
    if group is not None:
        shard(model, world, group)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    identity = {"model": model.config.to_dict(), "vocabulary": byte_tokenizer().sha256}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = ExponentialMovingAverage(model, 0.5)
    return RunState(model, optimizer, scaler, ema, identity, global_batch_size=NUM_PAIRS)


def advance(state: RunState, world: World, group: Any) -> None:
    """One step; afterwards the weights outside the blocks are whole, as after an evaluation."""
    images, tokens = (t.chunk(NUM_RANKS)[world.rank] for t in pairs(state.step, torch.float32))
    with gradient_sync(state.model, is_last=True):
        loss_of(*state.model(images, tokens)).backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    assert state.ema is not None
    state.ema.update(state.model, state.step)
    state.step += 1
    with torch.no_grad():
        state.model(images, tokens)


def contents(state: RunState) -> dict[str, Tensor]:
    return {
        f"{group}/{name}": value
        for group, tensors in state.tensors().items()
        for name, value in whole(tensors).items()
    }


def save_on_all(world: World, run_dir: Path) -> Any:
    """Save after one step and after two; return what the second checkpoint has to hold."""
    group = first_ranks(NUM_RANKS)
    state = new_state(world, group, seed=0)
    state.bad_samples = 7
    for _ in range(2):
        advance(state, world, group)
        state.save(run_dir, keep=2)
    return contents(state)


@pytest.fixture(scope="module")
def run(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return the folder of a run with the checkpoints of steps 1 and 2, and the tensors of the second."""
    run_dir = tmp_path_factory.mktemp("run")
    saved, *others = pool.run(save_on_all, run_dir)
    for other in others:
        assert_equal(other, saved)
    return run_dir, saved


@pytest.fixture
def run_dir(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """Return a copy to spoil."""
    return Path(shutil.copytree(run[0], tmp_path / "copy"))


def load_on(world: World, run_dir: Path, num_ranks: int, out_dir: Path) -> Any:
    """Load on the first ranks, and save again from there; also from a checkpoint that was read whole."""
    group = first_ranks(num_ranks)
    if world.rank >= num_ranks:
        return None
    state = new_state(world, group, seed=1)
    state.load(open_run(run_dir)[0])
    eager = new_state(world, group, seed=2)
    eager.load(load_checkpoint(cast("Path", latest_checkpoint(run_dir / "checkpoints"))))
    state.save(out_dir, keep=1)
    found, same = contents(state), contents(eager)
    assert all(torch.equal(value, same[name]) for name, value in found.items())
    return found, state.step, state.bad_samples


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n, value in expected.items() if not torch.equal(found[n], value)] == []
    assert all(found[n].shape == value.shape for n, value in expected.items())


def test_a_checkpoint_fits_any_number_of_ranks(
    pool: RankPool, run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    run_dir, saved = run
    assert saved["model/logit_scale"].shape == () and len(saved) > 150
    folder = run_dir / "checkpoints" / "step_00000002"
    files = {path.name for path in folder.glob("*.safetensors")}
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2
    parts = [f"-0000{rank}-of-00003.safetensors" for rank in (1, 2, 3)]
    assert files == {group + part for group in ("ema", "model", "optimizer") for part in parts}
    for part in folder.glob("model-*"):
        rows = load_file(part)
        num_elements = sum(t.numel() for t in rows.values())
        assert num_elements < 0.36 * sum(v.numel() for v in only("model", saved).values())
        assert rows["token_embedding.weight"].shape[0] in (170, 172)

    for num_ranks in (2, 1):
        again = tmp_path / f"again_{num_ranks}"
        loaded = pool.run(load_on, run_dir, num_ranks, again)[:num_ranks]
        for found, step, bad_samples in loaded:
            assert (step, bad_samples) == (2, 7)
            assert_equal(found, saved)
        checkpoint = load_latest(again / "checkpoints")
        assert checkpoint is not None
        assert_equal(flat(checkpoint.tensors), saved)
    # One rank writes as a run of one process does, so that an older clipcore can read it.
    folder_of_one = again / "checkpoints" / "step_00000002"
    assert json.loads((folder_of_one / "manifest.json").read_text())["version"] == 1
    assert (folder_of_one / "model.safetensors").exists()

    world = World(0, 1, 0, torch.device("cpu"))
    for lazily in (False, True):
        state = new_state(world, None, seed=3)
        state.load(load_checkpoint(folder, lazily=lazily))
        assert_equal(contents(state), saved)

    byte_tokenizer().save(run_dir / VOCABULARY_FILE)
    model, _, _ = load_run(run_dir)
    assert_equal({f"ema/{n}": v for n, v in model.state_dict().items()}, only("ema", saved))
    model = create_model("ViT-nano-8-32", pretrained=run_dir)
    assert_equal({f"ema/{n}": v for n, v in model.state_dict().items()}, only("ema", saved))


def only(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(f"{group}/")}


def flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{g}/{n}": value for g, named in tensors.items() for n, value in named.items()}


def go_on(world: World, run_dir: Path) -> list[dict[str, Tensor]]:
    """Two steps, resumed and with those before them unbroken."""
    group = first_ranks(NUM_RANKS)
    results = []
    for is_resumed in (True, False):
        state = new_state(world, group, seed=int(is_resumed))
        if is_resumed:
            state.load(open_run(run_dir)[0])
        while state.step < 4:
            advance(state, world, group)
        results.append(contents(state))
    return results


def test_a_resumed_run_has_the_bits_of_the_unbroken_one(pool: RankPool, run: Any) -> None:
    for resumed, unbroken in pool.run(go_on, run[0]):
        assert_equal(resumed, unbroken)


def refuse(function: Callable[..., Any], error: Exception, after: int) -> Callable[..., Any]:
    """Return ``function``, which raises from its call number ``after`` on."""
    calls = iter(range(after))

    def refusing(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return function(*arguments)

    return refusing


# The rank, and which call of ``os`` fails on it from which one on.
FAULTS = [
    (0, "mkdir", 0),
    (1, "open", 0),
    (2, "write", 5),
    (0, "write", 40),
    (2, "fsync", 2),
    (0, "rename", 0),
]


def save_with_faults(world: World, run_dir: Path) -> list[tuple[str, list[str]]]:
    """Save step 3 under each fault, at last without; return the error and the folder's content for each."""
    state = new_state(world, first_ranks(NUM_RANKS), seed=0)
    state.step = 3
    results = []
    for rank, name, after in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                patch.setattr(os, name, refuse(getattr(os, name), error, after))
            with pytest.raises(CheckpointError) as raised:
                state.save(run_dir, keep=2)
        barrier()
        results.append((str(raised.value), sorted(os.listdir(run_dir / "checkpoints"))))
        barrier()
    state.save(run_dir, keep=2)
    return results


def test_a_fault_on_one_rank_leaves_the_last_checkpoint(pool: RankPool, run_dir: Path) -> None:
    # What a killed run leaves behind.
    (run_dir / "checkpoints" / ".tmp_step_00000003").mkdir()
    results = pool.run(save_with_faults, run_dir)
    for i, (rank, name, _) in enumerate(FAULTS):
        for writer, (message, folders) in enumerate(result[i] for result in results):
            assert "No space left" in message and "older ones are untouched" in message
            assert message.startswith(f"rank {rank} of 3: ") is (writer != rank)
            # Where nothing was begun yet the left-overs may still be there.
            left = [folder for folder in folders if not (name == "mkdir" and folder[0] == ".")]
            assert left == ["step_00000001", "step_00000002"]
    checkpoint = load_latest(run_dir / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step_00000002", "step_00000003"]


def test_a_missing_or_changed_part_is_damage(run_dir: Path) -> None:
    newest = run_dir / "checkpoints" / "step_00000002"
    part = newest / "optimizer-00003-of-00003.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00003-of-00003.*content has changed"):
        load_checkpoint(newest, lazily=True)
    part.unlink()
    with pytest.warns(UserWarning, match="skipped step_00000002"):
        checkpoint = load_latest(run_dir / "checkpoints", lazily=True)
    assert checkpoint is not None and checkpoint.step == 1


def test_what_is_read_lazily_outlives_its_folder(run: Any, run_dir: Path) -> None:
    checkpoint = load_latest(run_dir / "checkpoints", lazily=True)
    assert checkpoint is not None
    for path in checkpoint.path.iterdir():
        path.unlink()
    assert_equal(flat(checkpoint.tensors), run[1])


def gather_some(world: World) -> list[Any]:
    return gather_objects({"rank": world.rank, "of": "x" * world.rank})


def test_gather_objects(pool: RankPool) -> None:
    expected = [{"rank": rank, "of": "x" * rank} for rank in range(NUM_RANKS)]
    assert pool.run(gather_some) == [expected] * NUM_RANKS
    assert gather_objects(3) == [3]


# Runs.


def command_line(tmp_path: Path, table: Path, name: str, num_ranks: int) -> list[str]:
    """Return a run of 18 steps of 6 pairs, with three evaluations of 41 pairs, which no number of ranks divides."""
    line = ["--logs", str(tmp_path), "--name", name, "--train-data", str(table), *NANO]
    line += ["--val-data", str(table), "--batch-size", str(6 // num_ranks), "--epochs", "3"]
    return [*line, "--ema-decay", "0.9", "--grad-clip-norm", "1", "--resume", "latest"]


def run_here(world: World, line: list[str]) -> int:
    return train(*parse_command_line(line), world)


def test_a_killed_run_resumes_on_another_number_of_ranks(pool: RankPool, tmp_path: Path) -> None:
    """Two ranks, one of which is killed in its second checkpoint; three go on, and end as a run of whole models does."""
    table = write_csv(tmp_path, num_pairs=41)
    shutil.copy(PROGRAMS / "kill_in_second_checkpoint.py", tmp_path / "sitecustomize.py")
    mark = tmp_path / "killed"
    torchrun = "--standalone --nproc-per-node 2 -m --".split()
    line = command_line(tmp_path, table, "sharded", num_ranks=2)
    done = subprocess.run(
        [
            sys.executable,
            PROGRAMS / "forking_torchrun.py",
            *torchrun,
            "clipcore.train",
            *line,
            "--fsdp",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "KILL_MARK": str(mark),
            "FAULTS": "[]",
        },
    )
    assert done.returncode != 0 and mark.exists(), done.stderr
    newest = latest_checkpoint(tmp_path / "sharded" / "checkpoints")
    assert newest is not None and newest.name == "step_00000006"

    line = command_line(tmp_path, table, "sharded", num_ranks=3)
    assert pool.run(run_here, [*line, "--fsdp"]) == [0, 0, 0]
    assert pool.run(run_here, command_line(tmp_path, table, "whole", num_ranks=3)) == [0, 0, 0]
    steps, evaluations = read_metrics(tmp_path / "sharded")
    for found, expected in zip(steps, read_metrics(tmp_path / "whole")[0], strict=True):
        assert found["step"] == expected["step"]
        for key in ("loss", "grad_norm", "logit_scale"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), (found["step"], key)
    for found, expected in zip(evaluations, read_metrics(tmp_path / "whole")[1], strict=True):
        assert found["num_pairs"] == 41
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
    assert (tmp_path / "sharded" / "report.html").exists()
    folders = sorted(os.listdir(tmp_path / "sharded" / "checkpoints"))
    assert folders == ["step_00000006", "step_00000012", "step_00000018"]
    model, _, _ = load_run(tmp_path / "sharded")
    expected, _, _ = load_run(tmp_path / "whole")
    images = pairs(0, torch.float32)[0]
    torch.testing.assert_close(
        model.encode_image(images), expected.encode_image(images), rtol=1e-3, atol=1e-4
    )
