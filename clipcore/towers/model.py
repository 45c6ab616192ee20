"""CLIP, and the functions that create it, with open_clip's names, arguments and return values.

Legend: B pairs, S side of an image, L tokens, E embedding size. Source: Radford et al. 2021.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.data.packing import PackedText
from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD, ImageTransform
from clipcore.kernels.similarity import normalized_similarity
from clipcore.towers.architectures import (
    MODELS,
    OPENAI_MODELS,
    QUICK_GELU_SUFFIX,
    ModelConfig,
    find_model,
)
from clipcore.towers.convert import ConversionError, infer_config, to_open_clip_names
from clipcore.towers.modules import Attention
from clipcore.towers.open_clip_arguments import check_others
from clipcore.towers.resnet import ModifiedResNet
from clipcore.towers.text import TextTower
from clipcore.towers.vision import VisionTransformer
from clipcore.towers.weights import Weights, read_weights

MAX_LOGIT_SCALE = math.log(100)
# Names of the position embeddings in all models, and the largest length to which a description beside weights resizes them.
POSITIONS = (
    "visual.positional_embedding",
    "visual.attnpool.positional_embedding",
    "positional_embedding",
)
MAX_POSITIONS = 1 << 15

# open_clip's names, and fp64 for tests. The amp ones keep float32 weights, and autocast chooses the dtype of each
# operation.
PRECISIONS = {
    "fp32": torch.float32,
    "amp": torch.float32,
    "amp_bf16": torch.float32,
    "amp_bfloat16": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "pure_bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
    "fp64": torch.float64,
}


class CLIP(TextTower):
    """An image tower, a text tower and the scale of their cosine.

    The published weights keep the text tower's parts at the top level of the model. So CLIP is a text tower with an
    image tower, ``visual``.

    Attributes:
        logit_scale: logarithm of the cosine's factor; starts at ln(1/0.07).
        logit_bias: constant added to the logits in SigLIP's models; None in other models.
        output_dict: whether ``forward`` returns a dict instead of a tuple.
        images: its preprocessing, as arguments of ``ImageTransform``; empty if its weights do not state it.
    """

    def __init__(self, config: ModelConfig, output_dict: bool = False) -> None:
        super().__init__(config.text, config.embed_dim, config.quick_gelu)
        self.config = config
        self.output_dict = output_dict
        self.images: dict[str, Any] = {}
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

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Clamp the scale to at most 100 (section 2.5: needed for stable training) and at least 1."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_images(self, images: Mapping[str, Any]) -> None:
        """Set the model's preprocessing: arguments of ``ImageTransform``."""
        self.images = dict(images)
        self.visual.image_mean = tuple(images.get("mean", OPENAI_MEAN))
        self.visual.image_std = tuple(images.get("std", OPENAI_STD))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the transformer blocks' activations in the backward pass."""
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower except its last groups (LiT: Zhai et al. 2021)."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    force_image_size: int | Sequence[int] | None = None,
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_vocab_size: int | None = None,
    force_context_length: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    output_dict: bool | None = False,
    require_pretrained: bool = False,
    load_weights: bool = True,
    **others: Any,
) -> CLIP:
    """Return a model of a known architecture, newly initialised or with weights from a file.

    Args:
        model_name: one of ``list_models()``, or OpenAI's spelling (``ViT-B/32``).
        pretrained: a file or folder of weights: OpenAI's, open_clip's, transformers', or a run of clipcore.
        precision: one of ``PRECISIONS``: ``bf16`` and ``fp16`` store matrices in that dtype, and gains, biases of the
            norms, embeddings and the logit scale in float32; ``pure_bf16`` and ``pure_fp16`` store everything in it.
        force_image_size: another image side, pixels, or (side, side); position embeddings of the weights are resized.
        force_quick_gelu: use QuickGELU whatever the name says.
        force_patch_dropout, force_vocab_size, force_context_length: replace the architecture's values.
        init_logit_scale, init_logit_bias: initial values, which override the weights'; SigLIP's are ln(10) and -10. None
            for a model without a bias.
        output_dict: whether ``forward`` returns a dict.
        require_pretrained: refuse a model without weights.
        load_weights: False ignores ``pretrained``.
        others: open_clip's other arguments, with values that change nothing.

    Raises:
        UnknownModelError: the name is unknown; the message lists the nearest ones.
        ValueError: the weights do not fit or are described as another model's, or an argument is out of range.
        TypeError: neither clipcore nor open_clip has such an argument.

    >>> create_model("ViT-nano-8-32").visual.image_size
    32
    """
    check_others("create_model", others, _ARGUMENTS)
    _check_precision(precision)
    # open_clip's other spelling of None.
    pretrained = pretrained if pretrained and load_weights else None
    if require_pretrained and pretrained is None:
        raise ValueError(
            "require_pretrained asks for weights: give their file or folder as pretrained"
        )
    init_logit_scale, init_logit_bias = _plain(init_logit_scale), _plain(init_logit_bias)
    config = find_model(model_name)
    if isinstance(force_image_size, list | tuple):
        if len(set(force_image_size)) != 1:
            raise ValueError(f"the models' images are square, got {tuple(force_image_size)}")
        force_image_size = force_image_size[0]
    vision = {"image_size": _plain(force_image_size), "patch_dropout": _plain(force_patch_dropout)}
    text = {
        "vocab_size": _plain(force_vocab_size),
        "context_length": _plain(force_context_length),
    }
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **_given(vision)),
        text=dataclasses.replace(config.text, **_given(text)),
        quick_gelu=config.quick_gelu or force_quick_gelu,
        **_given({"init_logit_scale": init_logit_scale, "init_logit_bias": init_logit_bias}),
    )
    if config.vision.is_resnet and config.vision.patch_dropout:
        raise ValueError("patch dropout is for Vision Transformers; leave it out for a ResNet")
    # On the meta device, which holds only shapes, weights are not created elsewhere first.
    is_meta = torch.device(device).type == "meta"
    with torch.device("meta") if is_meta else contextlib.nullcontext():
        model = CLIP(config, bool(output_dict))

    if pretrained is not None:
        load_checkpoint(model, pretrained)
        with torch.no_grad():
            if init_logit_scale is not None:
                model.logit_scale.fill_(init_logit_scale)
            if model.logit_bias is not None and init_logit_bias is not None:
                model.logit_bias.fill_(init_logit_bias)
    return _cast(model, precision).to(device)


_ARGUMENTS = tuple(name for name in inspect.signature(create_model).parameters if name != "others")
# These change no shape, so they do not need a model's name.
_FREE_ARGUMENTS = {"output_dict", "require_pretrained"}


def _check_precision(precision: object) -> None:
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")


def _cast(model: CLIP, precision: str) -> CLIP:
    dtype = PRECISIONS[precision]
    if precision not in ("bf16", "fp16"):
        return model.to(dtype)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | Attention):
            part.to(dtype)
    model.text_projection.data = model.text_projection.to(dtype)
    if isinstance(model.visual, VisionTransformer):
        model.visual.proj.data = model.visual.proj.to(dtype)
    return model


def _plain(value: Any) -> Any:
    """Return a NumPy number or scalar tensor as a Python number, and other values unchanged."""
    return value.item() if isinstance(value, np.generic | Tensor) else value


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: Mapping[str, Any] | None = None,
    **forced: Any,
) -> tuple[CLIP, ImageTransform, ImageTransform]:
    """Return a model as ``create_model`` does, with its preprocessing: (model, preprocess_train, preprocess_val).

    Args:
        image_mean, image_std, image_resize_mode: see ``ImageTransform``; they override the weights' description.
        aug_cfg: settings of the random crop in training, such as ``{"scale": (0.9, 1.0)}``.
        forced: the other arguments of ``create_model``.
    """
    model = create_model(model_name, pretrained, precision, device, **forced)
    model.set_images(model.images | _images(image_mean, image_std, image_resize_mode))
    size = model.visual.image_size
    train = ImageTransform(size, is_train=True, **model.images, **(aug_cfg or {}))
    return model, train, ImageTransform(size, is_train=False, **model.images)


def create_model_from_pretrained(
    model_name: str | None,
    pretrained: str | Path,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_resize_mode: str | None = None,
    **forced: Any,
) -> tuple[CLIP, ImageTransform]:
    """Return a model with weights from a file, in evaluation mode, and its preprocessing.

    Args:
        model_name: None uses the description by open_clip or transformers beside the weights, or a run's own record. If
            there is none, the architecture is inferred from the shapes. They do not show the activation, which is then
            assumed to be QuickGELU for models that OpenAI published and GELU for others, with a warning.
        image_mean, image_std, image_resize_mode: see ``create_model_and_transforms``.
        forced: the other arguments of ``create_model``; those that change the model's shape need ``model_name``.
    """
    _check_precision(precision)
    if model_name is None:
        free = {name: forced.pop(name) for name in _FREE_ARGUMENTS & forced.keys()}
        if shaping := [name for name in forced if name in _ARGUMENTS]:
            raise ValueError(f"{', '.join(shaping)} need the name of the model")
        check_others("create_model_from_pretrained", forced, _ARGUMENTS)
        model = _cast(_from_weights_alone(Path(pretrained)), precision).to(device)
        model.output_dict = bool(free.get("output_dict"))
    else:
        model = create_model(model_name, pretrained, precision, device, **forced)
    model.set_images(model.images | _images(image_mean, image_std, image_resize_mode))
    return model.eval(), ImageTransform(model.visual.image_size, is_train=False, **model.images)


def _images(
    mean: Sequence[float] | None, std: Sequence[float] | None, resize_mode: str | None
) -> dict[str, Any]:
    return _given({"mean": mean, "std": std, "resize_mode": resize_mode})


def _from_weights_alone(pretrained: Path) -> CLIP:
    """Return the model that the weights belong to."""
    weights = read_weights(pretrained)
    _check_described_bias(weights)
    state = to_open_clip_names(weights.tensors)
    config = weights.config
    if config is None:
        config = infer_config(state)
        name = config.describe()
        quick_gelu = weights.quick_gelu
        if quick_gelu is None:
            quick_gelu = name in OPENAI_MODELS
            warnings.warn(
                f"{pretrained} does not state its model's activation: assumed to be {name} with "
                f"{_activation(quick_gelu)}; give the name of the model if that is wrong",
                stacklevel=3,
            )
        config = dataclasses.replace(config, quick_gelu=quick_gelu)
    if config.init_logit_bias is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.tensor(float(config.init_logit_bias))
    model = model_of(config, state, str(pretrained), may_resize=True)
    model.set_images(weights.images)
    return model


def model_of(
    config: ModelConfig, state: dict[str, Tensor], origin: str, may_resize: bool = False
) -> CLIP:
    """Return the described model with its weights.

    The shapes are compared before memory is allocated, because a description is not trusted.

    Args:
        state: weights under open_clip's names, in the shapes of the description.
        origin: the weights' file, for messages.
        may_resize: resize position embeddings of another length, as open_clip does, to at most ``MAX_POSITIONS``.

    Raises:
        ValueError: see ``load_checkpoint``.
    """
    with torch.device("meta"):
        own = CLIP(config).state_dict()
    if may_resize and all(own[key].shape[0] <= MAX_POSITIONS for key in POSITIONS if key in own):
        state = resize_position_embeddings(state, own)
    _check_shapes(config, state, own, origin)
    model = CLIP(config)
    model.load_state_dict(state)
    return model


def load_checkpoint(model: CLIP, checkpoint_path: str | Path) -> tuple[str, ...]:
    """Load weights from a file of any known layout; position embeddings are resized to the model's.

    If the description beside them states the preprocessing, the model records it.

    Returns:
        the names of the values that the model keeps, because the weights lack them: see ``load_weights``.

    Raises:
        ValueError: the weights are of another architecture; the message names the first differences and the architecture
            that they look like. Or their description, such as the activation, contradicts ``model``.
    """
    weights = read_weights(checkpoint_path)
    check_description(model.config, weights)
    kept = load_weights(model, to_open_clip_names(weights.tensors), str(checkpoint_path))
    if weights.images:
        model.set_images(model.images | weights.images)
    return kept


def check_description(config: ModelConfig, weights: Weights) -> None:
    """Raise ValueError if the weights' description contradicts an architecture in a way that the shapes do not show."""
    name, is_known = _name(config)
    if weights.quick_gelu not in (None, config.quick_gelu):
        is_quick = bool(weights.quick_gelu)
        right, has_name = _name(weights.config or dataclasses.replace(config, quick_gelu=is_quick))
        verb = "set" if is_quick else "leave out"
        remedy = f"{verb} force_quick_gelu (--force-quick-gelu)"
        if is_known and has_name:
            remedy = f"name {right}" if is_quick else f"name {right}, without --force-quick-gelu"
        raise ValueError(
            f"{weights.witness} that its model has {_activation(is_quick)}, and {name} has "
            f"{_activation(config.quick_gelu)}; {remedy}"
        )
    if weights.config is None:
        return
    for tower, said, own in (
        ("image", weights.config.vision.heads, config.vision.heads),
        ("text", weights.config.text.heads, config.text.heads),
    ):
        if said != own:
            raise ValueError(
                f"{weights.witness} that its {tower} tower has {said} heads, and {name} has {own}; "
                "create_model_from_pretrained(None, ...) makes the model that it describes"
            )
    if config.init_logit_bias is None:
        _check_described_bias(weights)
        if (begins_at := weights.config.init_logit_bias) is not None:
            raise ValueError(
                f"{weights.witness} that its model has a logit_bias, which begins at {begins_at:g}, and {name} has none; "
                f"make it with init_logit_bias={begins_at:g} (--siglip); create_model_from_pretrained(None, ...) makes the "
                "model that it describes"
            )


def _check_described_bias(weights: Weights) -> None:
    """Raise ValueError for weights with a bias beside a description of a model without one."""
    has_none = weights.config is not None and weights.config.init_logit_bias is None
    if has_none and "logit_bias" in weights.tensors:
        raise ValueError(
            f"{weights.witness} that its model has no logit_bias, and its weights have one, as SigLIP's do; add "
            '"init_logit_bias": 0.0 to the model_cfg of its open_clip_config.json (the weights have the value), or make a '
            "model with init_logit_bias=0.0 and load_checkpoint(...)"
        )


def _name(config: ModelConfig) -> tuple[str, bool]:
    """Return the name of a model, or its towers in words, and whether it is a name."""
    words = config.describe()
    is_known = words in MODELS
    return words + QUICK_GELU_SUFFIX * (is_known and config.quick_gelu), is_known


def _activation(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def load_weights(model: CLIP, state: dict[str, Tensor], origin: str) -> tuple[str, ...]:
    """Load weights under open_clip's names; see ``load_checkpoint``.

    A model with a bias, such as SigLIP's, keeps it if the weights have none.

    Returns:
        the names of the values that the model keeps.
    """
    own = model.state_dict()
    fitted = resize_position_embeddings(state, own)
    kept: tuple[str, ...] = ()
    if "logit_bias" in own and "logit_bias" not in fitted:
        kept = ("logit_bias",)
        fitted["logit_bias"] = own["logit_bias"]
    _check_shapes(model.config, fitted, own, origin)
    _check_numbers(fitted, own, origin)
    model.load_state_dict(fitted)
    return kept


def _check_numbers(state: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError for quantised or non-finite weights."""
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise ValueError(
                f"{name} in {origin} is {value.dtype}, and the model's {own[name].dtype}; quantised weights are not read, "
                "save them as floats"
            )
        # 8-bit floats do not support isfinite.
        wide = value if value.element_size() > 1 else value.float()
        if value.is_floating_point() and not wide.isfinite().all():
            raise ValueError(
                f"{name} in {origin} is not finite: its training failed, or the file is damaged; take an earlier checkpoint"
            )


def _check_shapes(
    config: ModelConfig, state: dict[str, Tensor], own: Mapping[str, Tensor], origin: str
) -> None:
    """Raise ValueError unless weights have a model's names and shapes; the message tells what they look like."""
    found = {name: value.shape for name, value in state.items()}
    differing = shape_differences(found, {name: value.shape for name, value in own.items()})
    if differing == ["logit_bias is unknown"]:
        raise ValueError(
            f"the weights in {origin} have a logit_bias, as SigLIP's do, and the model has none: train with --siglip, use "
            "create_model_from_pretrained(None, ...), or make a model with init_logit_bias=0.0 and load_checkpoint(...)"
        )
    if differing and all(difference.endswith(" is unknown") for difference in differing):
        raise ValueError(
            f"the weights in {origin} hold more than {config.describe()}: {', '.join(differing[:3])}; merge an adapter into "
            "the weights, and take out of the file what belongs to something else"
        )
    if differing:
        try:
            looks = f"they look like {infer_config(state).describe()}"
        except ConversionError as error:
            looks = str(error)
        rest = len(differing) - 3
        more = f", and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"the weights in {origin} do not fit {config.describe()}: {', '.join(differing[:3])}{more}; {looks}"
        )


def shape_differences(
    state: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return in words which shapes in ``state`` differ from those in ``own``, are missing, or are unknown."""
    shapes = [
        f"{name} is {list(state[name])} instead of {list(shape)}"
        for name, shape in own.items()
        if name in state and state[name] != shape
    ]
    missing = [f"{name} is missing" for name in own if name not in state]
    return shapes + missing + [f"{name} is unknown" for name in state if name not in own]


def resize_position_embeddings(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``state`` with position embeddings resized to the lengths in ``own``, as in open_clip and for ResNets too.

    Image embeddings are resized bicubically with antialiasing, text embeddings linearly. Embeddings of another width are
    left unchanged.
    """
    resized = dict(state)
    for key in POSITIONS:
        if key not in state or key not in own or state[key].shape[1:] != own[key].shape[1:]:
            continue
        old, length = state[key], own[key].shape[0]
        if old.shape[0] != length:
            if not old.shape[0]:
                raise ConversionError(f"the weights' {key} has no row")
            resize = _resize_line if key == "positional_embedding" else _resize_grid
            resized[key] = resize(old.float(), length).to(old.dtype)
    return resized


def _resize_grid(old_LD: Tensor, length: int) -> Tensor:
    """Resize a square grid of embeddings, and keep the first one, of the class token or the mean."""
    old, new = math.isqrt(old_LD.shape[0] - 1), math.isqrt(length - 1)
    if old_LD.shape[0] != old**2 + 1 or not old:
        raise ConversionError(
            f"the weights have {old_LD.shape[0]} image positions, which are not a square grid and a class token"
        )
    grid = old_LD[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old_LD[:1], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])


def _resize_line(old_LD: Tensor, length: int) -> Tensor:
    return F.interpolate(old_LD.T[None], length, mode="linear", align_corners=False)[0].T
