"""Zero-shot classification: prompts with class names make a classifier without examples.

Legend: B images, C classes, T templates, E embedding size, K best classes.

Source: Radford et al. 2021, sections 3.1.2 to 3.1.4: the embeddings of all prompts of a class are normalised, averaged
and normalised again. The average has no cost once it is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.data.loader import trim_tokens
from clipcore.kernels.similarity_topk import similarity_topk
from clipcore.ranks.distributed import gather_rows
from clipcore.towers.model import CLIP

Template = str | Callable[[str], str]


@torch.no_grad()
def build_zero_shot_classifier(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[Template],
    num_classes_per_batch: int | None = 10,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """Return the class-embedding matrix, with one unit column per class (open_clip's name and arguments).

    Args:
        classnames: one name per class, or several, whose prompts are averaged together.
        templates: strings with ``{}`` (or ``{c}``) for the class name, or functions of the class name.
        num_classes_per_batch: classes whose prompts are encoded at once; ``None`` for all.

    Returns:
        [E, C], in the dtype of the text features, so that ``image_features @ classifier`` are cosines.

    Raises:
        ValueError: there are no class names or no templates, or a template has no place for the name.
    """
    for what, given in (("class names", classnames), ("templates", templates)):
        if isinstance(given, str):
            raise ValueError(
                f"{what} are a list of texts, got the text {given!r}; put it into a list"
            )
    # A name may be empty, for example from a folder's name without letters; a class without any name is an error.
    has_nameless = any(not isinstance(names, str) and not names for names in classnames)
    if not classnames or not templates or has_nameless:
        raise ValueError("a zero-shot classifier needs at least one class name and one template")
    size = num_classes_per_batch or len(classnames)
    starts: Iterable[int] = range(0, len(classnames), size)
    if use_tqdm:
        from tqdm import tqdm

        starts = tqdm(starts, unit_scale=size)
    columns = []
    for start in starts:
        classes = [
            [names] if isinstance(names, str) else list(names)
            for names in classnames[start : start + size]
        ]
        prompts = [
            _fill(template, name) for names in classes for name in names for template in templates
        ]
        tokens = tokenizer(prompts)
        # Not for another package's model, of which nothing is known.
        tokens = trim_tokens(tokens) if getattr(model, "ignores_padding", False) else tokens
        features = model.encode_text(tokens.to(device), normalize=True)
        counts = [len(names) * len(templates) for names in classes]
        if len(set(counts)) == 1:
            mean_CE = features.unflatten(0, (len(classes), counts[0])).mean(1)
        else:
            mean_CE = torch.stack([part.mean(0) for part in features.split(counts)])
        columns.append(F.normalize(mean_CE, dim=-1).T)
    return torch.cat(columns, 1)


def _fill(template: Template, name: str) -> str:
    if callable(template):
        return template(name)
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} where the class name goes")
    return template.replace("{}", name).replace("{c}", name)


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIP, classifier_EC: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Return the share of images whose class is the best (``acc1``) and among the best five (``acc5``).

    Args:
        batches: this rank's (images [B, 3, H, W], labels [B]); ranks may have different numbers of batches.

    Returns:
        ``acc1``, ``acc5``, ``mean_per_class_recall``, ``num_images``, the same on every rank.
    """
    num_best = min(5, classifier_EC.shape[1])
    hits = [torch.zeros(0, 3, dtype=torch.long, device=classifier_EC.device)]
    for images, labels_B in batches:
        features_BE = model.encode_image(images, normalize=True)
        best_BK = best_classes(features_BE, classifier_EC, num_best)
        labels_B = labels_B.to(best_BK.device)
        right_BK = best_BK == labels_B[:, None]
        hits.append(torch.stack([labels_B, right_BK[:, 0].long(), right_BK.any(1).long()], 1))
    label_N, first_N, fifth_N = gather_rows(torch.cat(hits)).unbind(1)
    return accuracies(label_N, first_N.bool(), fifth_N.bool())


def best_classes(features_BE: Tensor, classifier_EC: Tensor, num_best: int = 5) -> Tensor:
    """Return the nearest classes of unit features, int64 [B, K], best first; the lower index wins a tie."""
    _, best_BK = similarity_topk(features_BE, classifier_EC.T, num_best)
    return best_BK


def accuracies(labels_N: Tensor, is_best_N: Tensor, is_among_5_N: Tensor) -> dict[str, float]:
    """Return the accuracies of images, given whether their class is the best, and among the best five.

    Args:
        labels_N: class indices.

    Returns:
        ``acc1``, ``acc5``, ``mean_per_class_recall`` over the classes that occur, ``num_images``.

    Raises:
        ValueError: there are no images.
    """
    if not len(labels_N):
        raise ValueError("there are no images to classify")
    # Integer counts, because sums of weights would depend on the order in which a GPU adds them.
    num_classes = int(labels_N.max()) + 1
    count_C = torch.bincount(labels_N, minlength=num_classes)
    right_C = torch.bincount(labels_N[is_best_N], minlength=num_classes)
    occurs_C = count_C > 0
    recall = (right_C[occurs_C].double() / count_C[occurs_C]).mean()
    return {
        "acc1": is_best_N.double().mean().item(),
        "acc5": is_among_5_N.double().mean().item(),
        "mean_per_class_recall": recall.item(),
        "num_images": float(len(labels_N)),
    }


@torch.no_grad()
def classify(
    model: CLIP, images: Tensor, classifier_EC: Tensor, num_best: int = 5
) -> tuple[Tensor, Tensor]:
    """Return the most probable classes of each image: probabilities [B, K] and class indices [B, K], best first.

    The probability is the softmax over all classes of the cosine times the model's logit scale.
    """
    features_BE = model.encode_image(images, normalize=True)
    logits_BC = model.logit_scale.exp() * features_BE @ classifier_EC
    best = logits_BC.float().softmax(-1).topk(min(num_best, logits_BC.shape[1]))
    return best.values, best.indices
