"""CLIP, and the functions that make one: open_clip's names, arguments and return values.

Legend: B pairs, S side of an image, L tokens, E embedding size. Source: Radford et al. 2021.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.architectures import ModelConfig, find_model
from clipcore.checkpoint import load_state_dict_file
from clipcore.convert import ConversionError, infer_config, to_open_clip_names
from clipcore.data.transforms import ImageTransform
from clipcore.kernels.similarity import normalized_similarity
from clipcore.resnet import ModifiedResNet
from clipcore.text import TextTower
from clipcore.vision import VisionTransformer

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)

PRECISIONS = {
    "fp32": torch.float32,
    "amp": torch.float32,
    "amp_bf16": torch.float32,
    "amp_bfloat16": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class CLIP(TextTower):
    """An image tower, a text tower and the scale of their cosine.

    The published weights keep the text tower's parts at the top of the model; so a CLIP is a text tower that has an
    image tower, ``visual``.

    Attributes:
        logit_scale: logarithm of what the cosine is multiplied with; starts at ln(1/0.07).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.text, config.embed_dim, config.quick_gelu)
        self.config = config
        self.visual: VisionTransformer | ModifiedResNet
        if config.vision.is_resnet:
            self.visual = ModifiedResNet(config.vision, config.embed_dim)
        else:
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    @property
    def is_resnet(self) -> bool:
        return self.config.vision.is_resnet

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, E] of preprocessed images [B, 3, S, S]; ``normalize`` scales them to unit length.

        Raises:
            ValueError: images of another size than the model's.
        """
        features_BE = self.visual(image)
        return F.normalize(features_BE, dim=-1) if normalize else features_BE

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, output_dict: bool = False
    ) -> Any:
        """Unit features of both sides and the scale of their cosine.

        Args:
            image: [B, 3, S, S], or None.
            text: [B, L] ids, or None.
            output_dict: return a dict in place of the tuple.

        Returns:
            (image_features [B, E] or None, text_features [B, E] or None, logit_scale.exp()).
        """
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        scale = self.logit_scale.exp()
        if output_dict:
            return {
                "image_features": image_features,
                "text_features": text_features,
                "logit_scale": scale,
            }
        return image_features, text_features, scale

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of every image with every text, and their transpose."""
        logits = normalized_similarity(
            self.encode_image(image), self.encode_text(text), self.logit_scale.exp()
        )
        return logits, logits.T

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keeps the scale at most 100 (section 2.5: needed for stable training) and at least 1."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the transformer blocks' activations in the backward pass."""
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes the image tower but its last groups (LiT: Zhai et al. 2021)."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    force_image_size: int | None = None,
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_vocab_size: int | None = None,
    force_context_length: int | None = None,
) -> CLIP:
    """A model of a known architecture, newly initialised or with weights from a file.

    Args:
        model_name: one of ``list_models()``, or OpenAI's spelling (``ViT-B/32``).
        pretrained: a file or folder of weights: OpenAI's, open_clip's, transformers', or a run of clipcore.
        precision: ``fp32``; ``bf16`` or ``fp16`` for weights of that type.
        force_image_size: another side of the image, pixels; position embeddings of the weights are resized.
        force_quick_gelu: QuickGELU whatever the name says.
        force_patch_dropout, force_vocab_size, force_context_length: other values than the architecture's.

    Raises:
        UnknownModelError: with the nearest names. ValueError: weights that do not fit.
    """
    config = find_model(model_name)
    vision = {"image_size": force_image_size, "patch_dropout": force_patch_dropout}
    text = {"vocab_size": force_vocab_size, "context_length": force_context_length}
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **_given(vision)),
        text=dataclasses.replace(config.text, **_given(text)),
        quick_gelu=config.quick_gelu or force_quick_gelu,
    )
    if config.vision.is_resnet and config.vision.patch_dropout:
        raise ValueError("patch dropout is for Vision Transformers; leave it out for a ResNet")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    model = CLIP(config)
    if pretrained:
        load_checkpoint(model, pretrained)
    return model.to(device=device, dtype=PRECISIONS[precision])


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    aug_cfg: Mapping[str, Any] | None = None,
    **forced: Any,
) -> tuple[CLIP, ImageTransform, ImageTransform]:
    """``create_model`` with its preprocessing: (model, preprocess_train, preprocess_val).

    Args:
        aug_cfg: of the random crop in training, such as ``{"scale": (0.9, 1.0)}``.
        forced: the ``force_...`` arguments of ``create_model``.
    """
    model = create_model(model_name, pretrained, precision, device, **forced)
    size = model.visual.image_size
    train = ImageTransform(size, is_train=True, **(aug_cfg or {}))
    return model, train, ImageTransform(size, is_train=False)


def create_model_from_pretrained(
    model_name: str | None,
    pretrained: str | Path,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **forced: Any,
) -> tuple[CLIP, ImageTransform]:
    """A model with weights from a file, in evaluation mode, and its preprocessing.

    Args:
        model_name: None reads the architecture off the shapes, with QuickGELU if they are a model's that OpenAI published:
            the activation leaves no trace in the weights, so name the model when they are open_clip's own.
    """
    if model_name is None:
        state = to_open_clip_names(load_state_dict_file(pretrained))
        model = CLIP(infer_config(state, quick_gelu=True))
        load_weights(model, state, str(pretrained))
        model = model.to(device=device, dtype=PRECISIONS[precision])
    else:
        model = create_model(model_name, pretrained, precision, device, **forced)
    return model.eval(), ImageTransform(model.visual.image_size, is_train=False)


def load_checkpoint(model: CLIP, checkpoint_path: str | Path) -> None:
    """Loads weights from a file of any known layout; position embeddings are resized to the model's.

    Raises:
        ValueError: the weights are of another architecture; names the first that differ and what they look like.
    """
    load_weights(
        model, to_open_clip_names(load_state_dict_file(checkpoint_path)), str(checkpoint_path)
    )


def load_weights(model: CLIP, state: dict[str, Tensor], origin: str) -> None:
    """Loads weights under open_clip's names; see ``load_checkpoint``."""
    own = model.state_dict()
    state = resize_position_embeddings(state, own)
    differing = sorted(own.keys() ^ state.keys()) or [
        f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if state[name].shape != value.shape
    ]
    if differing:
        try:
            config = infer_config(state)
            looks = f"they look like {config.vision} with {config.text}"
        except ConversionError as error:
            looks = str(error)
        raise ValueError(
            f"the weights in {origin} do not fit the model: {differing[0]} is the first of {len(differing)} that differ; "
            f"{looks}"
        )
    model.load_state_dict(state)


def resize_position_embeddings(
    state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``state`` with position embeddings of the lengths in ``own``: images bicubic with antialiasing, texts linear."""
    resized = dict(state)
    key = "visual.positional_embedding"
    if key in state and key in own and state[key].shape[0] != own[key].shape[0]:
        old, new = (math.isqrt(x[key].shape[0] - 1) for x in (state, own))
        token_1D, grid = state[key][:1], state[key][1:].float()
        grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(token_1D.dtype)
        resized[key] = torch.cat([token_1D, patches])
    key = "positional_embedding"
    if key in state and state[key].shape[0] != own[key].shape[0]:
        line = state[key].float().T[None]
        line = F.interpolate(line, own[key].shape[0], mode="linear", align_corners=False)
        resized[key] = line[0].T.to(state[key].dtype)
    return resized
