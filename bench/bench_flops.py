"""Floating-point operations of a training step, counted: clipcore's, open_clip's, and what the step needs.

python bench/bench_flops.py [--models ViT-B-32 RN50] [--batch 64 1024] [--micro-batch-size 64]

The step runs forward and backward on the meta device, where operators have shapes and compute nothing, under torch's
`FlopCounterMode`, which counts matrix products and convolutions. Captions have the lengths of
`step_providers.CAPTION_LENGTHS`, 16 tokens on average. For clipcore's attention in packed rows, all pairs of a row that a
causal mask shows are counted, including pairs of different captions. The needed FLOPs are a formula over the lengths of the
captions; for a ResNet's convolutions they are those of open_clip's tower of the same name. Several micro-batches are counted
twice: with every graph kept, and with one kept, where the others are embedded a second time as by open_clip's --accum-freq.
"""

from __future__ import annotations

import argparse

import torch
from contrastive_providers import import_open_clip
from step_providers import captions
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clipcore.run.flops
from clipcore.data.loader import Batch, trim_tokens
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run.train_step import TrainingStep
from clipcore.towers.architectures import ModelConfig, find_model
from clipcore.towers.factory import create_model

assert clipcore.run.flops  # registers the FLOP formulas of clipcore's operators
MODELS = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"]
META = torch.device("meta")


def random_captions(num_pairs: int, config: ModelConfig) -> Tensor:
    """Return random token rows, padded as by a tokenizer."""
    torch.manual_seed(0)
    return captions(num_pairs, config.text.vocab_size, config.text.context_length)


def of_clipcore(
    name: str, num_pairs: int, micro_batch_size: int | None = None, kept: int | None = None
) -> int:
    """Return the FLOPs of one step of a run, towers and loss; ``kept`` graphs are not rebuilt (None: all of them)."""
    model = create_model(name, device=META).train()
    tokens = trim_tokens(random_captions(num_pairs, model.config))
    step = TrainingStep(
        *(model, model, ClipLoss(), World(0, 1, 0, META), "fp32", 0),
        *(num_pairs, lambda loss: loss, micro_batch_size, kept or num_pairs),
    )
    batch = Batch(_pixels(num_pairs, model.config), tokens, torch.arange(num_pairs))
    with FlopCounterMode(display=False) as counter:
        step.gradients(batch, 0)
    return counter.get_total_flops()


def of_open_clip(name: str, num_pairs: int, micro_batch_size: int | None = None) -> int:
    """Return the FLOPs of open_clip's step; micro-batches are those of its --accum-freq: features first, then all again."""
    package = import_open_clip()
    with META:
        model = package.create_model(name, load_weights=False, device=META).train()
    config = find_model(name)
    tokens = random_captions(num_pairs, config).to(META)
    images = _pixels(num_pairs, config).to(META).float()
    parts = list(torch.arange(num_pairs).split(micro_batch_size or num_pairs))
    loss_fn = package.loss.ClipLoss()

    with FlopCounterMode(display=False) as counter:
        if len(parts) > 1:
            with torch.no_grad():
                for rows in parts:
                    model(images[: len(rows)], tokens[: len(rows)])
        for rows in parts:
            image_BE, text_BE, scale = model(images[: len(rows)], tokens[: len(rows)])[:3]
            others = [image_BE.detach().repeat(len(parts) - 1, 1) for _ in range(2)]
            sides = [
                torch.cat([mine, other])[:num_pairs]
                for mine, other in zip((image_BE, text_BE), others, strict=True)
            ]
            loss_fn(*sides, scale).backward()
    return counter.get_total_flops()


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
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1024])
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parsed = parser.parse_args()

    print(
        "| model | pairs | needed, TFLOP | clipcore | with one graph | open_clip | clipcore / needed |"
        " open_clip / with one graph |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in parsed.models:
        for num_pairs in parsed.batch:
            case = (name, num_pairs, min(num_pairs, parsed.micro_batch_size))
            least, ours, theirs = needed(name, num_pairs), of_clipcore(*case), of_open_clip(*case)
            twice = of_clipcore(*case, kept=1)
            figures = (f"{count / 1e12:.3f}" for count in (least, ours, twice, theirs))
            ratios = f"{ours / least:.3f} | {theirs / twice:.2f}"
            print(f"| {name} | {num_pairs} | {' | '.join(figures)} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
