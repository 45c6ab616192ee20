"""The training steps that bench_step.py measures, clipcore's and its peers', on one batch in the host's memory.

Every step takes the batch of its own loader: for clipcore uint8 pixels and trimmed tokens, which it packs and normalises
itself; for the peers normalised float32 pixels and tokens padded to 77. It uploads the batch, computes features, loss and
gradients under autocast and ends with torch's fused AdamW. A step calls its clock at the end of each part.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from contrastive_providers import import_open_clip
from harness import is_wanted
from torch import Tensor, nn

from clipcore.data.loader import Batch, trim_tokens
from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run.compiled import compile_blocks
from clipcore.run.grad_cache import micro_batches
from clipcore.run.optim import build_optimizer
from clipcore.run.train_step import TrainingStep
from clipcore.towers.architectures import ModelConfig
from clipcore.towers.descriptions import hf_config
from clipcore.towers.factory import create_model

# Tokens of a caption with both special ones, and how many of 128 captions have them: alt texts, lognormal around 16.
CAPTION_LENGTHS = dict(
    zip(
        (*range(5, 21), 22, 24, 27, 30, 34, 40, 48, 60, 77),
        (2, 4, 6, 7, 8, 9, 9, 9, 8, 8, 7, 7, 6, 5, 4, 4, 5, 4, 4, 4, 3, 2, 1, 1, 1),
        strict=True,
    )
)

Mark = Callable[[str], None]
Step = Callable[[Mark], None]


class Case(NamedTuple):
    """What all providers compute."""

    model: str
    num_pairs: int
    device: torch.device
    precision: str  # "fp32" or "amp_bf16"
    patch_dropout: float = 0.0
    micro_batch_size: int | None = None  # None is the direct step

    def autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def num_parts(self) -> int:
        return -(-self.num_pairs // (self.micro_batch_size or self.num_pairs))


class Clock:
    """The seconds of a step's parts. Each begins where the last one ended; the device is idle at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, dict[str, float]()
        self._last_s = self._now()

    def __call__(self, part: str) -> None:
        now_s = self._now()
        self.parts[part] = self.parts.get(part, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def captions(number: int, vocab_size: int, context_length: int) -> Tensor:
    """Return random token ids in rows that end like a tokenizer's; lengths are quantiles of those above, in random order."""
    lengths = torch.tensor([n for n, count in CAPTION_LENGTHS.items() for _ in range(count)])
    quantiles = (2 * torch.arange(number) + 1) * len(lengths) // (2 * number)
    lengths_B = lengths[quantiles[torch.randperm(number)]]
    text = torch.randint(1, vocab_size - 2, (number, context_length))
    place = torch.arange(context_length)
    text[place >= lengths_B[:, None]] = 0
    text[torch.arange(number), lengths_B - 1] = vocab_size - 1
    return text


def random_batch(case: Case, config: ModelConfig) -> Batch:
    """Return pixels and padded tokens on the host, page-locked if there is a GPU."""
    torch.manual_seed(0)
    size, on_gpu = config.vision.image_size, case.device.type == "cuda"
    images = torch.empty(case.num_pairs, 3, size, size, dtype=torch.uint8, pin_memory=on_gpu)
    images.random_(0, 256)
    text = captions(case.num_pairs, config.text.vocab_size, config.text.context_length)
    return Batch(images, text, torch.arange(case.num_pairs))


def useful_flops(config: ModelConfig, case: Case, text: Tensor) -> float:
    """Return the FLOPs of a direct step's matrix products, with gradients, for tokens that are neither padding nor dropped.

    All blocks count in full, although the last one is read at one token only. The first layer has no input gradient.
    """

    def tower(width: int, layers: int, tokens: float, seen: float) -> float:
        return layers * tokens * (24 * width**2 + 4 * seen * width)

    vision = config.vision
    assert isinstance(vision.layers, int) and vision.patch_size is not None
    patches = (vision.image_size // vision.patch_size) ** 2
    kept = max(1, int(patches * (1 - case.patch_dropout))) + 1
    lengths_B = (text.argmax(1) + 1).double()
    forward = tower(vision.width, vision.layers, case.num_pairs * kept, kept)
    # A causal token sees half of its caption on average.
    seen = float((lengths_B * (lengths_B + 1) / 2).sum() / lengths_B.sum())
    forward += tower(config.text.width, config.text.layers, float(lengths_B.sum()), seen)
    forward += 2 * case.num_pairs * config.embed_dim * (vision.width + config.text.width)
    patch_embedding = 2 * case.num_pairs * patches * 3 * vision.patch_size**2 * vision.width
    return 3 * forward + 2 * patch_embedding


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)


def _normalised(images: Tensor) -> Tensor:
    """Return pixels in float32, as the peers' loaders do."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    found = torch.empty(images.shape, pin_memory=images.is_pinned())
    for part, out in zip(images.split(64), found.split(64), strict=True):
        out.copy_((part / 255 - mean) / std)
    return found


def clipcore(case: Case, batch: Batch, model: nn.Module) -> Step:
    """Return clipcore's step, as in a run; in micro-batches, it keeps as many graphs as its plan says."""
    step = TrainingStep(
        *(model, ClipLoss(), World(0, 1, 0, case.device), case.precision, 0),
        *(case.num_pairs, lambda loss: loss, case.micro_batch_size or case.num_pairs),
    )
    batch = dataclasses.replace(batch, tokens=trim_tokens(batch.tokens))
    if step.needs_plan():
        print(step.plan(batch, 0), flush=True)
    optimizer = _optimizer(model)

    def whole(mark: Mark) -> None:
        step.gradients(batch, 0, on_phase=mark)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    def direct(mark: Mark) -> None:
        """Run the direct step in parts, since its towers and uploads are otherwise one call."""
        parts = step.cutter(batch, 0)(slice(0, case.num_pairs))
        mark("data")
        images, tokens, *seeds = (part.to(case.device, non_blocking=True) for part in parts)
        mark("upload")
        with step.autocast():
            image_BE = model.encode_image(images, True, *seeds)
            mark("image forward")
            text_BE = model.encode_text(tokens, normalize=True)
            mark("text forward")
        loss = step.loss(image_BE, text_BE, model.logit_scale.exp())
        mark("loss")
        loss.backward()
        mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    return lambda mark: (direct if step.num_parts == 1 and mark is not ignore else whole)(mark)


def ignore(part: str) -> None:
    """Ignore the end of a part: the clock of a step that is timed as a whole."""


def open_clip(case: Case, batch: Batch, model: nn.Module, compiled: bool = False) -> Step:
    """Return the step of open_clip's trainer on one device; micro-batches are those of its --accum-freq."""
    towers = torch.compile(model) if compiled else model
    loss_fn, optimizer = import_open_clip().loss.ClipLoss(), _optimizer(model)
    images, text = _normalised(batch.images), batch.tokens
    text = text.pin_memory() if images.is_pinned() else text
    parts = micro_batches(case.num_pairs, case.num_parts)

    def upload(rows: slice) -> list[Tensor]:
        return [part[rows].to(case.device, non_blocking=True) for part in (images, text)]

    def direct(mark: Mark) -> None:
        inputs = upload(parts[0])
        mark("upload")
        with case.autocast():
            if compiled or mark is ignore:
                image_BE, text_BE, scale = towers(*inputs)[:3]
                mark("towers forward")
            else:
                image_BE = model.encode_image(inputs[0], normalize=True)
                mark("image forward")
                text_BE, scale = model.encode_text(inputs[1], normalize=True), model.logit_scale
                scale = scale.exp()
                mark("text forward")
            loss = loss_fn(image_BE, text_BE, scale)
        mark("loss")
        loss.backward()
        mark("backward")

    def accumulated(mark: Mark) -> None:
        """Embed all without gradients, then each micro-batch once more with the whole loss."""
        features: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), case.autocast():
            for rows in parts:
                features.append(towers(*upload(rows))[:2])
        mark("forward")
        for i, rows in enumerate(parts):
            with case.autocast():
                *mine, scale = towers(*upload(rows))[:3]
                sides = [list(side) for side in zip(*features, strict=True)]
                for side, part in zip(sides, mine, strict=True):
                    side[i] = part
                loss = loss_fn(*(torch.cat(side) for side in sides), scale)
            loss.backward()
        mark("loss and backward")

    def step(mark: Mark) -> None:
        (direct if case.num_parts == 1 else accumulated)(mark)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    return step


def transformers(case: Case, batch: Batch, config: ModelConfig) -> Step:
    """Return the step of transformers' CLIPModel, with the same shapes and its own loss."""
    model = transformers_model(config).to(case.device).train()
    optimizer = _optimizer(model)
    images, text = _normalised(batch.images), batch.tokens
    text = text.pin_memory() if images.is_pinned() else text

    def step(mark: Mark) -> None:
        pixels, ids = (part.to(case.device, non_blocking=True) for part in (images, text))
        mark("upload")
        with case.autocast():
            loss = model(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        mark("towers and loss")
        loss.backward()
        mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    return step


def transformers_model(config: ModelConfig) -> nn.Module:
    """Return transformers' model of these shapes, randomly initialised, with its default, torch's attention.

    Raises:
        ImportError: transformers is not installed.
    """
    import_open_clip()  # makes torchvision, which transformers looks for, importable
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**hf_config(config)))


def providers(case: Case, names: list[str]) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Return (name, how to make its step) of each provider that can run the case; a model is made when its turn comes."""
    dropped = {"force_patch_dropout": case.patch_dropout} if case.patch_dropout else {}
    template = create_model(case.model)
    batch = random_batch(case, template.config)

    def of_open_clip(compiled: bool) -> Step:
        package = import_open_clip()
        model = package.create_model(case.model, load_weights=False, **dropped)
        model.load_state_dict(template.state_dict())
        return open_clip(case, batch, model.to(case.device).train(), compiled)

    def of_clipcore(compiled: bool) -> Step:
        model = create_model(case.model, **dropped)
        model.load_state_dict(template.state_dict())
        if compiled:
            compile_blocks(model)
        return clipcore(case, batch, model.to(case.device).train())

    known = {
        "clipcore": lambda: of_clipcore(False),
        "clipcore, blocks compiled": lambda: of_clipcore(True),
        "open_clip": lambda: of_open_clip(False),
        "open_clip compiled": lambda: of_open_clip(True),
        "transformers": lambda: transformers(case, batch, template.config),
    }
    for name in filter(is_wanted, names):
        if name == "transformers" and (case.patch_dropout or case.micro_batch_size):
            print(
                "transformers is left out: it has neither patch dropout nor an exact step in micro-batches"
            )
        else:
            yield name, known[name]
