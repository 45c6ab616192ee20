"""Find out what a file or folder of weights says about its model: the command ``python -m clipcore.inspect``.

``inspection_arguments.py`` has its flags and its exit status.
"""

from __future__ import annotations

from clipcore.inspection_arguments import build_parser
from clipcore.terminal import answer_early, complain, printable, steady_output

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import collections
import dataclasses
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD
from clipcore.ranks.failures import end_with
from clipcore.tokenizer import (
    BYTE_VOCAB_SIZE,
    OPENAI_VOCAB_SIZE,
    VocabularyError,
    find_openai_vocabulary,
    open_vocabulary,
    vocabulary_beside,
)
from clipcore.towers.architectures import (
    MODELS,
    QUICK_GELU_SUFFIX,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from clipcore.towers.convert import ConversionError, infer_config, to_open_clip_names
from clipcore.towers.factory import made_of_weights
from clipcore.towers.loading import activation_name
from clipcore.towers.weights import Weights, read_weights


@dataclass(frozen=True)
class Inspection:
    """What a file or folder of weights says about its model.

    Attributes:
        path: the file or folder, as given.
        config: the architecture, described beside the weights or inferred from their shapes.
        name: of the architecture, as ``create_model`` takes it; None if it has no name.
        described_by: the source of the description, as the beginning of a sentence; empty if the shapes alone tell.
        activation: in words, with its source.
        images: the preprocessing that is stated, as arguments of ``ImageTransform``.
        vocabulary: in words.
        parameters: the number of numbers in the image tower, the text tower, and beside them.
        dtypes: the number of numbers of each dtype.
        logit_scale: the cosine's factor, ``exp`` of the weights' value; None without one.
        logit_bias: None without one.
        fault: what keeps the weights from loading; empty if they load.
        call: Python that loads them; empty if they do not load.
    """

    path: str
    config: ModelConfig
    name: str | None
    described_by: str
    activation: str
    images: dict[str, Any]
    vocabulary: str
    parameters: dict[str, int]
    dtypes: dict[str, int]
    logit_scale: float | None
    logit_bias: float | None
    fault: str
    call: str

    def to_dict(self) -> dict[str, Any]:
        """Return the same as a dict for JSON; the architecture has open_clip's layout."""
        return dataclasses.asdict(self) | {"config": self.config.to_dict()}

    def lines(self) -> list[tuple[str, str]]:
        """Return the same in words: (title, text) of each line."""
        named = self.name or self.config.short_name
        origin = self.described_by or "inferred from the shapes"
        lines = [
            ("weights", self.path),
            ("model", f"{named} ({origin.removesuffix(' says')})"),
            ("image tower", _image_tower(self.config.vision)),
            ("text tower", _text_tower(self.config.text)),
            ("features", str(self.config.embed_dim)),
            ("activation", self.activation),
            ("preprocessing", _preprocessing(self.images, self.config)),
            ("vocabulary", self.vocabulary),
            ("parameters", _parameters(self.parameters, self.dtypes)),
            ("logits", _logits(self.logit_scale, self.logit_bias)),
        ]
        if self.fault:
            return [*lines, ("does not load", self.fault)]
        return [*lines, ("missing", "nothing"), *_under("load it by", self.call.splitlines())]


def _under(title: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return lines of which only the first shows the title."""
    return [("" if i else title, text) for i, text in enumerate(texts)]


def inspect_weights(path: str | os.PathLike[str]) -> Inspection:
    """Return what a file or folder of weights says about its model.

    Args:
        path: what ``create_model_from_pretrained`` takes: weights of OpenAI, open_clip or transformers, or a run.

    Raises:
        CheckpointError: there is no such file, it holds no weights, is damaged, or would run code.
        ConversionError: the weights are not a CLIP's, or the description beside them is damaged or of another model.
    """
    path = os.fspath(path)
    weights = read_weights(path)
    try:
        state = to_open_clip_names(weights.tensors)
        config = infer_config(state) if weights.config is None else weights.config
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error

    # The call that is shown makes the same model, so that what it shows is so.
    fault = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an assumed activation, which has a line of its own
            config = made_of_weights(Path(path)).config
    except ValueError as error:
        fault = str(error)

    vocabulary, tokens = _vocabulary(vocabulary_beside(path), config.text)
    return Inspection(
        path=path,
        config=config,
        name=_name(config),
        described_by=weights.witness if weights.config is not None else "",
        activation=_activation(config, weights),
        images=weights.images,
        vocabulary=tokens,
        parameters=_count(state),
        dtypes=_dtypes(state),
        logit_scale=_number(state, "logit_scale", math.exp),
        logit_bias=_number(state, "logit_bias", float),
        fault=fault,
        call="" if fault else _call(path, config, weights, vocabulary),
    )


def _name(config: ModelConfig) -> str | None:
    """Return the name by which ``create_model`` makes an architecture, or None."""
    name = config.describe()
    if name not in MODELS:
        return None
    return name + (QUICK_GELU_SUFFIX if config.quick_gelu else "")


def _activation(config: ModelConfig, weights: Weights) -> str:
    activation = activation_name(config.quick_gelu)
    tanh = [t for t, c in (("image", config.vision), ("text", config.text)) if c.gelu_tanh]
    if tanh:
        activation += f" by its tanh approximation ({' and '.join(tanh)})"
    if weights.quick_gelu is not None:
        return f"{activation} ({weights.witness.removesuffix(' says').removesuffix(':')})"
    reason = "as in OpenAI's models of this shape" if config.quick_gelu else "as in open_clip's"
    return f"{activation} (assumed, {reason}: nothing states it)"


def _vocabulary(path: Path | None, text: TextConfig) -> tuple[Path | None, str]:
    """Return the file beside the weights if it is the model's vocabulary, and the vocabulary in words."""
    vocab_size = text.vocab_size
    tokens = f"{vocab_size:,} tokens"
    if path is not None:
        try:
            own_size = open_vocabulary(path, text).vocab_size
        except (VocabularyError, OSError) as error:
            return None, f"{tokens}; those beside the weights cannot be read: {error}"
        if own_size != vocab_size:
            return None, f"{tokens}; {path} has {own_size:,}, and is another model's"
        return path, f"{tokens}, {path}"
    if vocab_size == BYTE_VOCAB_SIZE:
        return None, f"{tokens}, one for each byte"
    if vocab_size != OPENAI_VOCAB_SIZE:
        told = "and no file of them here: give the one of its training as bpe_path"
        if text.hf_tokenizer_name is not None:
            told = f"those of {text.hf_tokenizer_name}: give its tokenizer.json as bpe_path"
        return None, f"{tokens}, {told}"
    try:
        find_openai_vocabulary()
    except VocabularyError:
        brings = 'pip install "clipcore[openai-vocab]" brings it'
        return None, f"{tokens}, OpenAI's by their number; {brings}"
    return None, f"{tokens}, OpenAI's by their number"


def _image_tower(vision: VisionConfig) -> str:
    if isinstance(vision.layers, tuple):
        kind = (
            f"ResNet of {'-'.join(map(str, vision.layers))} blocks, stem of {vision.width} channels"
        )
    else:
        layers = f"{vision.layers} layer" + ("s" if vision.layers > 1 else "")
        kind = f"ViT of {layers}, width {vision.width}, patches of {vision.patch_size}"
    pools = {"tok": "", "avg": ", mean of the patches", "map": ", attention pooling"}
    return f"{kind}, {vision.heads} heads, {vision.image_size} pixels{pools[vision.pool_type]}"


def _text_tower(text: TextConfig) -> str:
    layers = f"{text.layers} layer" + ("s" if text.layers > 1 else "")
    shape = f"{layers}, width {text.width}, {text.heads} heads, {text.context_length} tokens a row"
    return f"{shape}, every token sees all" if text.no_causal_mask else shape


def _preprocessing(stated: Mapping[str, Any], config: ModelConfig) -> str:
    images = {**config.usual_images, **stated}
    mean, std = images.get("mean", OPENAI_MEAN), images.get("std", OPENAI_STD)
    resize = images.get("resize_mode", "shortest")
    if (interpolation := images.get("interpolation", "bicubic")) != "bicubic":
        resize += f" ({interpolation})"
    if resize.startswith("longest"):
        resize += f", padded with {images.get('fill_color', 0)}"
    usual = "usual for such towers" if config.usual_images else "OpenAI's"
    origin = "stated" if stated else f"{usual}: nothing states another"
    size = config.vision.image_size
    return f"{size} pixels, resize {resize}, mean {_short(mean)}, std {_short(std)} ({origin})"


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def _count(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the parameters of each part; running statistics of a ResNet are none."""
    parts = {"image": 0, "text": 0, "other": 0}
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        part = "image" if name.startswith("visual.") else "text"
        if name in ("logit_scale", "logit_bias"):
            part = "other"
        parts[part] += value.numel()
    return parts


def _dtypes(state: Mapping[str, Tensor]) -> dict[str, int]:
    numbers: collections.Counter[str] = collections.Counter()
    for value in state.values():
        numbers[str(value.dtype).removeprefix("torch.")] += value.numel()
    return dict(numbers.most_common())


def _parameters(parts: Mapping[str, int], dtypes: Mapping[str, int]) -> str:
    total = sum(parts.values())
    kinds = " and ".join(dtypes)
    return f"{total:,} (image {parts['image']:,}, text {parts['text']:,}), {kinds}"


def _number(
    state: Mapping[str, Tensor], name: str, convert: Callable[[float], float]
) -> float | None:
    """Return a scalar of the weights, None if it is missing or none."""
    if name not in state or state[name].numel() != 1:
        return None
    try:
        value = convert(float(state[name]))
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _logits(scale: float | None, bias: float | None) -> str:
    text = "no factor" if scale is None else f"cosine times {scale:.4g}"
    return text if bias is None else f"{text}, plus {bias:.4g} (SigLIP)"


def _call(path: str, config: ModelConfig, weights: Weights, vocabulary: Path | None) -> str:
    """Return Python that loads the weights as they are described, and their tokenizer if its vocabulary is known."""
    # None takes the description, or the shapes of a model that no name makes, such as one with a bias.
    name = _name(config)
    has_bias = config.init_logit_bias is not None
    model = None if weights.config is not None or has_bias else name
    loaded = f"clipcore.create_model_from_pretrained({model!r}, {path!r})"
    lines = ["import clipcore", f"model, preprocess = {loaded}"]

    text = config.text
    if vocabulary is not None:
        length = f"context_length={text.context_length}, bpe_path={str(vocabulary)!r}"
        lines.append(f"tokenizer = clipcore.get_tokenizer({length})")
    elif text.vocab_size in (BYTE_VOCAB_SIZE, OPENAI_VOCAB_SIZE) and name is not None:
        lines.append(f"tokenizer = clipcore.get_tokenizer({name!r})")
    elif text.vocab_size == OPENAI_VOCAB_SIZE:
        lines.append(f"tokenizer = clipcore.get_tokenizer(context_length={text.context_length})")
    return "\n".join(lines)


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a file that cannot be read is one line on standard error, and the others are shown."""
    parsed = build_parser().parse_args(arguments)
    status, num_shown = 0, 0
    for path in parsed.weights:
        try:
            found = inspect_weights(Path(path))
        except KeyboardInterrupt:
            complain("clipcore.inspect", "stopped")
            return 128 + signal.SIGINT
        except Exception as error:
            ended = end_with("clipcore.inspect", error, "inspect it on a larger machine")
            status = max(status, ended)
            continue
        if parsed.json:
            print(json.dumps(found.to_dict()))
        else:
            if num_shown:
                print()
            for title, text in found.lines():
                print(f"{title:13}  {printable(text)}")
        num_shown += 1
        if found.fault:
            status = max(status, 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
