"""CLIP: two towers and the scale of their cosine, with open_clip's methods.

Legend: B pairs, S side of an image, L tokens, E embedding size. Source: Radford et al. 2021.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.data.packing import PackedText
from clipcore.files import make_directory
from clipcore.kernels.similarity import normalized_similarity
from clipcore.towers.architectures import ModelConfig
from clipcore.towers.intermediates import Indices, check_format
from clipcore.towers.layouts import open_clip_preprocessing, write_open_clip
from clipcore.towers.resnet import ModifiedResNet
from clipcore.towers.text import TextTower
from clipcore.towers.vision import VisionTransformer

MAX_LOGIT_SCALE = math.log(100)
# Functions that were in this module, and those that hold them now.
_MOVED = {
    "create_model": "clipcore.towers.factory",
    "create_model_and_transforms": "clipcore.towers.factory",
    "create_model_from_pretrained": "clipcore.towers.factory",
    "load_checkpoint": "clipcore.towers.loading",
}


def __getattr__(name: str) -> Any:
    """Return a function that is in another module now; those modules import this one, so it imports them on use."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MOVED[name]), name)


class CLIP(TextTower):
    """An image tower, a text tower and the scale of their cosine.

    The published weights keep the text tower's parts at the top level of the model. So CLIP is a text tower with an
    image tower, ``visual``.

    Attributes:
        logit_scale: logarithm of the cosine's factor; starts at ln(1/0.07).
        logit_bias: constant added to the logits in SigLIP's models; None in other models.
        output_dict: whether ``forward`` returns a dict instead of a tuple.
        images: its preprocessing, as arguments of ``ImageTransform``: what its weights state, over what is usual for such
            towers; empty for OpenAI's.
    """

    def __init__(self, config: ModelConfig, output_dict: bool = False) -> None:
        super().__init__(config.text, config.embed_dim, config.quick_gelu)
        self.config = config
        self.output_dict = output_dict
        self.visual: VisionTransformer | ModifiedResNet
        if config.vision.is_resnet:
            self.visual = ModifiedResNet(config.vision, config.embed_dim)
        else:
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        # JSON may hold an integer, which would make an integer tensor without a gradient.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))
        self.set_images(config.usual_images)

    @property
    def is_resnet(self) -> bool:
        return self.config.vision.is_resnet

    def encode_image(
        self,
        image: Tensor,
        normalize: bool = False,
        dropout_seeds: Tensor | None = None,
        projected: bool = True,
    ) -> Tensor:
        """Return features [B, E] of preprocessed images [B, 3, S, S]; ``normalize`` scales them to unit length.

        Args:
            dropout_seeds: see ``VisionTransformer.forward``; for a model with patch dropout, in training.
            projected: False returns a ViT's features before the projection, [B, width of the tower], to which the paper
                fits its linear probes; a ResNet has no projection besides its attention pool.

        Raises:
            ValueError: the images' size is not the model's.
        """
        more: dict[str, Any] = {} if projected else {"projected": False}
        if dropout_seeds is not None:
            more["dropout_seeds"] = dropout_seeds
        features_BE = self.visual(image, **more)
        return F.normalize(features_BE, dim=-1) if normalize else features_BE

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | PackedText | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Any:
        """Return unit features of both sides and the scale of their cosine.

        Args:
            image: [B, 3, S, S], or None.
            text: ids [B, L], or captions that ``pack_captions`` has packed, or None.
            dropout_seeds: see ``encode_image``.

        Returns:
            (image_features [B, E] or None, text_features [B, E] or None, logit_scale.exp()), with logit_bias if the model
            has one; or a dict with these names if ``output_dict`` is set.
        """
        image_features = None
        if image is not None:
            image_features = self.encode_image(image, True, dropout_seeds)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        scale = self.logit_scale.exp()
        named = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": scale,
        }
        if self.logit_bias is not None:
            # A copy, because DistributedDataParallel treats a parameter that is itself an output as unused.
            named["logit_bias"] = self.logit_bias.clone()
        return named if self.output_dict else tuple(named.values())

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled cosines of every image with every text, with the model's bias, and their transpose."""
        logits = normalized_similarity(
            self.encode_image(image), self.encode_text(text), self.logit_scale.exp()
        )
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_indices: Indices = None,
        text_indices: Indices = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",
        text_output_extra_tokens: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Any]:
        """Return the outputs of single blocks of both towers, with open_clip's arguments and keys.

        Args:
            image, text: as for ``forward``; text as token rows only.
            image_indices, text_indices: the blocks: the last n, a list of their indices, or None for all. The outputs are
                in the tower's order. A ResNet has five: the stem and its stages.
            stop_early: run no block of a ViT or stage of a ResNet after the last chosen one. A ViT's features are then those
                of the chosen block, as in open_clip. The text tower runs whole.
            normalize: scale the features to unit length.
            normalize_intermediates: apply the tower's last LayerNorm to the outputs; a ResNet has none.
            intermediates_only: return neither features nor logits.
            image_output_fmt: "NCHW", or of a ViT "NLC".
            image_output_extra_tokens: return the outputs at the class token too, [B, 1, D].
            text_output_fmt: "NLC".
            text_output_extra_tokens: accepted; these text towers have no extra token.
            output_logits: return scaled cosines of every image with every text, with the model's bias.
            output_logit_scale_bias: return the scale, and the bias of a model that has one.

        Returns:
            image_intermediates, image_intermediates_prefix, image_features, text_intermediates, text_features, image_logits,
            text_logits, logit_scale and logit_bias, as far as they are asked for.

        Raises:
            ValueError: there is no such block or format, or logits of one side only are asked for.
        """
        check_format(text_output_fmt, ("NLC",))
        normalize = normalize and not intermediates_only
        output_logits = output_logits and not intermediates_only
        if output_logits and (image is None or text is None):
            raise ValueError("output_logits needs both image and text")
        output: dict[str, Any] = {}
        if image is not None:
            output = self.visual.forward_intermediates(
                image,
                indices=image_indices,
                stop_early=stop_early,
                normalize_intermediates=normalize_intermediates,
                intermediates_only=intermediates_only,
                output_fmt=image_output_fmt,
                output_extra_tokens=image_output_extra_tokens,
            )
        if text is not None:
            found, features = self.text_intermediates(text, text_indices, normalize_intermediates)
            output["text_intermediates"] = found
            if not intermediates_only:
                output["text_features"] = features
        if normalize:
            for key in ("image_features", "text_features"):
                if key in output:
                    output[key] = F.normalize(output[key], dim=-1)

        if output_logits:
            logits = self.logit_scale.exp() * output["image_features"] @ output["text_features"].T
            output["image_logits"] = logits if self.logit_bias is None else logits + self.logit_bias
            output["text_logits"] = output["image_logits"].T
        if output_logit_scale_bias:
            output["logit_scale"] = self.logit_scale.exp()
            if self.logit_bias is not None:
                output["logit_bias"] = self.logit_bias
        return output

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Clamp the scale to at most 100 (section 2.5: needed for stable training) and at least 1."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_images(self, images: Mapping[str, Any]) -> None:
        """Set the model's preprocessing: arguments of ``ImageTransform``.

        The image tower has them as in open_clip: ``visual.preprocess_cfg``, ``image_mean`` and ``image_std``.
        """
        self.images: dict[str, Any] = dict(images)
        # A model of open_clip has the size as a pair, and its files have a number.
        stated = open_clip_preprocessing(self) | {"size": self.visual.image_size}
        self.visual.image_mean, self.visual.image_std = stated["mean"], stated["std"]
        self.visual.preprocess_cfg = stated

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, architecture and preprocessing into a folder, as open_clip's hub folders have them.

        ``create_model_from_pretrained(None, folder)`` and ``open_clip.create_model("local-dir:FOLDER")`` read it. A folder
        with the vocabulary too, or for another package, is made by ``python -m clipcore.export``.
        """
        make_directory(Path(folder))
        write_open_clip(self, Path(folder))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the transformer blocks' activations in the backward pass."""
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower except its last groups (LiT: Zhai et al. 2021)."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)
