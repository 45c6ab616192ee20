"""What a training step does, counted without a GPU: FLOPs, saved bytes, launches, copies and waits; ours and open_clip's.

python bench/bench_counts.py [--models ViT-B-32 RN50] [--pairs 64] [--micro-batch-size 16] [--kept-graphs 1]

Each of twelve published models makes a step of a run on a GPU in bfloat16 autocast, on tensors that have shapes only;
`fake_gpu.py` says what counts. Captions have the lengths of `step_providers.CAPTION_LENGTHS`, 16 tokens on average.
clipcore gets pixels in bytes and trimmed captions, as its loader makes them, and open_clip normalised float32 pixels and
rows of 77 tokens, as its own does. The step of clipcore is `TrainingStep.gradients` and the update of `clipcore.train`;
that of open_clip is its `train_one_epoch`. Neither clips gradients. What only the first step of a run does is not counted.

The parts of a step: "forward" is the upload and both towers, "loss" the loss, "backward" the backward pass of both, and
"update" the norm of the gradients, the optimizer and what is read for the log. clipcore logs each step, open_clip one in a
hundred.

What is saved for the backward pass is that of the whole step. For a token and layer it is the difference that one block of
a transformer makes, over the tokens that the block computes (padding included) and its width.

Rows go to results/computed.jsonl, and the tables of RESULTS.md and README are made anew. With micro-batches, clipcore keeps
all graphs or as many as are asked for, and open_clip embeds all twice (--accum-freq).

Needed FLOPs are a formula over the lengths of the captions; for a ResNet's convolutions they are those of open_clip's
tower. In packed rows, all pairs that a causal mask shows are counted, including pairs of different captions.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import harness
import torch
from contrastive_providers import import_open_clip
from fake_gpu import GPU, FakeGpu
from step_providers import captions
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clipcore.run.flops
from clipcore.data.loader import Batch, trim_tokens
from clipcore.data.packing import PackedText
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World, all_reduce_sum
from clipcore.run.grad_cache import StepOutput
from clipcore.run.optim import build_optimizer, clipped_step, gradient_norm
from clipcore.run.train_step import TrainingStep
from clipcore.towers.architectures import ModelConfig, find_model
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

assert clipcore.run.flops  # registers the FLOP formulas of clipcore's operators
META = torch.device("meta")
OP = "counts of a step"
ASSUMPTIONS = "bfloat16 autocast on one GPU, shapes only; a library's call is one launch; see bench/fake_gpu.py"
Figures = dict[str, Any]


# A model of each shape that matters for a step; the others that clipcore has differ in sizes.
COUNTED = (
    *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
    *("ViT-S-32", "ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"),
)


def random_captions(num_pairs: int, config: ModelConfig) -> Tensor:
    """Return random token rows, padded as by a tokenizer."""
    torch.manual_seed(0)
    return captions(num_pairs, config.text.vocab_size, config.text.context_length)


def flops_of_clipcore(
    name: str, num_pairs: int, micro_batch_size: int | None = None, kept: int | None = None
) -> int:
    """Return the FLOPs of towers and loss, by torch's counter; ``kept`` graphs are not rebuilt (None: all of them)."""
    model = create_model(name, device=META).train()
    step = _step(model, META, "fp32", num_pairs, micro_batch_size, kept)
    with FlopCounterMode(display=False) as counter:
        step.gradients(_batch(model.config, num_pairs), 0)
    return counter.get_total_flops()


def _step(
    model: CLIP,
    device: torch.device,
    precision: str,
    num_pairs: int,
    micro_batch_size: int | None,
    kept: int | None,
) -> TrainingStep:
    return TrainingStep(
        model=model,
        loss_fn=ClipLoss(),
        world=World(0, 1, 0, device),
        precision=precision,
        seed=0,
        global_batch_size=num_pairs,
        scale_loss=lambda loss: loss,
        micro_batch_size=micro_batch_size or num_pairs,
        num_kept_graphs=num_pairs if kept is None else kept,
    )


def _batch(config: ModelConfig, num_pairs: int) -> Batch:
    """Return what clipcore's loader makes."""
    tokens = trim_tokens(random_captions(num_pairs, config))
    return Batch(_pixels(num_pairs, config), tokens, torch.arange(num_pairs))


def of_clipcore(
    name: str, num_pairs: int, micro_batch_size: int | None = None, kept: int | None = None
) -> Figures:
    """Return the counts of a step of a run."""
    model = create_model(name, device=META).train()
    batch = _batch(model.config, num_pairs)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    following = {"forward": "loss", "loss": "backward", "backward": "update"}

    with FakeGpu() as gpu, _as_in_a_run():
        gpu.place(model)
        _warm_up(optimizer, model)
        step = _step(model, GPU, "amp_bf16", num_pairs, micro_batch_size, kept)

        def begin_after(part: str) -> None:
            gpu.part = following[part]

        gpu.reset()
        output = step.gradients(batch, 0, begin_after)
        saved_bytes = gpu.saved_bytes
        update(model, optimizer, scaler, output)
        found = _figures(gpu) | {
            "saved_bytes": saved_bytes,
            "waits": gpu.waits,
            "logged_waits": gpu.waits,
        }

        images, text = (part.to(GPU) for part in step.cutter(batch, 0)(slice(0, num_pairs)))
        num_tokens = text.ids_RP.numel() if isinstance(text, PackedText) else text.numel()
        return found | _of_layers(gpu, model, model.config, images, text, num_tokens)


@contextlib.contextmanager
def _as_in_a_run() -> Iterator[None]:
    """Ask torch for deterministic algorithms, as a run does, without filling fresh memory."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def update(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    output: StepOutput,
) -> None:
    """Do what `clipcore.train` does between a step's gradients and its row in the log; a test compares the operators."""
    scaler.unscale_(optimizer)
    grad_norm = gradient_norm(model.parameters())
    loss, norm = torch.stack([output.loss.double(), grad_norm.double()]).tolist()
    is_finite = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
    all_reduce_sum([loss, float(not is_finite)])
    clipped_step(optimizer, scaler, model.parameters(), grad_norm, None)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    model.clamp_logit_scale_()
    model.logit_scale.exp().item()


def _warm_up(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let the optimizer make its state, which only the first step does."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def of_open_clip(name: str, num_pairs: int, micro_batch_size: int | None = None) -> Figures:
    """Return the counts of a step of open_clip's trainer; micro-batches are those of its --accum-freq."""
    package = import_open_clip()
    from open_clip_train.train import train_one_epoch

    config = find_model(name)
    with META:
        model = package.create_model(name, load_weights=False, device=META, output_dict=True)
    num_parts = num_pairs // (micro_batch_size or num_pairs)
    arguments = SimpleNamespace(
        device=str(GPU),
        precision="amp_bf16",
        accum_freq=num_parts,
        batch_size=num_pairs // num_parts,
        grad_clip_norm=None,
        log_every_n_steps=100,
        skip_scheduler=True,
        distill=False,
        horovod=False,
        wandb=False,
        rank=0,
        world_size=1,
    )
    images = _pixels(num_pairs, config).float()[: arguments.batch_size]
    tokens = random_captions(num_pairs, config)
    # As its own command makes it.
    is_gain = {p: p.ndim < 2 for p in model.parameters()}
    groups = [
        {"params": [p for p in is_gain if is_gain[p]], "weight_decay": 0.0},
        {"params": [p for p in is_gain if not is_gain[p]], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    contrast = package.loss.ClipLoss(cache_labels=True)
    steps: list[Figures] = []

    with FakeGpu() as gpu:
        gpu.place(model)
        _warm_up(optimizer, model)

        def loss(**features: Any) -> Any:
            gpu.part = "loss"
            found = contrast(**features)
            gpu.part = "backward"
            return found

        def begin_update(*_: Any) -> None:
            gpu.part = "update"
            steps[-1]["saved_bytes"] = gpu.saved_bytes

        optimizer.register_step_pre_hook(begin_update)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            """Yield the first step, which is logged, and the next, which is not."""
            for _ in range(2):
                gpu.reset()
                steps.append({})
                for rows in tokens.split(arguments.batch_size):
                    gpu.part = "forward"
                    yield images, rows
                steps[-1] |= _figures(gpu) | {"waits": gpu.waits}

        class Loader:
            num_batches, num_samples = 100 * num_parts, 100 * num_pairs

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return batches()

        data = {"train": SimpleNamespace(dataloader=Loader(), set_epoch=lambda _: None)}
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)
        logged, usual = steps
        found = usual | {"logged_waits": logged["waits"]}
        inputs = images.to(GPU), tokens[: arguments.batch_size].to(GPU)
        return found | _of_layers(gpu, model, config, *inputs, inputs[1].numel())


def _figures(gpu: FakeGpu) -> Figures:
    """Return what has been counted since the last reset."""
    backward = gpu.flops["backward"]
    forward = gpu.flops.total() - backward
    return {
        "flops_forward": forward,
        "flops_backward": backward,
        **{f"launches_{part}": gpu.num_launches(part) for part in harness.PARTS},
        "copies": gpu.copies,
        "copied_bytes": gpu.copied_bytes,
    }


def _of_layers(
    gpu: FakeGpu,
    model: Any,
    config: ModelConfig,
    images: Tensor,
    text: Tensor | PackedText,
    num_tokens: int,
) -> Figures:
    """Return what a transformer block of each tower saves, bytes a token over its width; the model loses a block."""

    def of_block(tower: Any, width: int, tokens: int, encode: Callable[[], Tensor]) -> float:
        saved = []
        for _ in range(2):
            gpu.reset()
            with torch.autocast("cuda", torch.bfloat16):
                encode()
            saved.append(gpu.saved_bytes)
            del tower.resblocks[1]
        return round((saved[0] - saved[1]) / (tokens * width), 2)

    vision = config.vision
    found = {
        "text_saved": of_block(
            model.transformer, config.text.width, num_tokens, lambda: model.encode_text(text)
        )
    }
    if not vision.is_resnet:
        assert vision.patch_size is not None
        patches = (vision.image_size // vision.patch_size) ** 2
        found["image_saved"] = of_block(
            model.visual.transformer,
            vision.width,
            len(images) * (patches + 1),
            lambda: model.encode_image(images),
        )
    return found


def needed(name: str, num_pairs: int) -> float:
    """Return the FLOPs that the gradients need: tokens without padding, the last block only at the token that is read.

    The backward pass has twice the products of the forward pass, and computes attention's scores once more, since they
    are not saved. The pixels have no gradient.
    """
    config = find_model(name)
    lengths_B = (random_captions(num_pairs, config).argmax(1) + 1).double()
    text, vision = config.text, config.vision
    pairs = float((lengths_B * (lengths_B + 1) / 2).sum())
    total = _tower(
        text.width, text.layers, text.heads, float(lengths_B.sum()), pairs, num_pairs
    ) + 3 * (2 * num_pairs * text.width * config.embed_dim)
    if vision.is_resnet:
        total += num_pairs * _convolutions(name, config)
        total += 3 * _resnet_pool(config, num_pairs)
    else:
        assert isinstance(vision.layers, int) and vision.patch_size is not None
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches + 1
        heads = vision.width // vision.head_width
        total += _tower(
            *(vision.width, vision.layers, heads),
            *(num_pairs * tokens, num_pairs * tokens**2, num_pairs),
        )
        total += 2 * (2 * num_pairs * patches * 3 * vision.patch_size**2 * vision.width)
        total += 3 * (2 * num_pairs * vision.width * config.embed_dim)
    return total + 3 * 2 * num_pairs**2 * config.embed_dim


def _tower(
    width: int, layers: int, heads: int, tokens: float, pairs: float, sequences: int
) -> float:
    """Return those of blocks with a hidden layer of 4 D; the last one has one query a sequence, see attention_pool.py."""
    blocks = (layers - 1) * (3 * 24 * width**2 * tokens + 7 * 2 * width * pairs)
    last = 3 * (24 * width**2 * sequences + 4 * heads * width * tokens)
    return blocks + last


def _resnet_pool(config: ModelConfig, num_pairs: int) -> float:
    """Return those of a ResNet's attention pool, forward: query, absorbed keys and values, output layer."""
    channels, grid = 32 * config.vision.width, config.vision.image_size // 32
    tokens = grid**2 + 1
    a_pair = 6 * channels**2 + 4 * config.vision.heads * channels * tokens
    return num_pairs * (a_pair + 2 * channels * config.embed_dim)


def _convolutions(name: str, config: ModelConfig) -> float:
    """Return those of one image in training, as open_clip's tower executes them."""
    with META:
        visual = (
            import_open_clip().create_model(name, load_weights=False, device=META).visual.train()
        )
    visual.attnpool = nn.Identity()
    with FlopCounterMode(display=False) as counter:
        visual(_pixels(2, config).to(META).float()).sum().backward()
    return counter.get_total_flops() / 2


def _pixels(num_pairs: int, config: ModelConfig) -> Tensor:
    """Return images of the right shape in the memory of one number."""
    size = config.vision.image_size
    return torch.zeros(1, dtype=torch.uint8).expand(num_pairs, 3, size, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=COUNTED, default=COUNTED)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, help="pairs embedded at once [all]")
    parser.add_argument("--kept-graphs", type=int, help="of clipcore's micro-batches [all]")
    parsed = parser.parse_args()
    size = parsed.micro_batch_size
    if parsed.pairs < 2 or (size is not None and (size < 1 or parsed.pairs % size)):
        parser.error("--pairs is at least 2, and a multiple of --micro-batch-size")

    if parsed.kept_graphs is not None and (size is None or parsed.kept_graphs < 1):
        parser.error(
            "--kept-graphs is at least 1, and of several micro-batches: --micro-batch-size N"
        )

    split = {} if size is None else {"micro_batch": size}
    kept = {} if parsed.kept_graphs is None else {"kept_graphs": parsed.kept_graphs}
    for name in parsed.models:
        step, least = (name, parsed.pairs, size), needed(name, parsed.pairs)
        for provider, figures, more in (
            ("clipcore", of_clipcore(*step, parsed.kept_graphs), split | kept),
            ("open_clip", of_open_clip(*step), split),
        ):
            total = figures["flops_forward"] + figures["flops_backward"]
            figures["flops_over_needed"] = round(total / least, 3)
            case = {"model": name, "pairs": parsed.pairs, **more}
            harness.record_counted(OP, provider, figures, ASSUMPTIONS, **case)
    harness.write_pages()


if __name__ == "__main__":
    main()
