"""Suites of data sets, the search for their folders, and the main metric of each.

The names are CLIP_benchmark's, which datacomp uses too. Metrics are those of Radford et al. 2021, table 9, and, for sets
that are not in the paper, those of datacomp's list of tasks (mlfoundations/datacomp, tasklist.yml).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from clipcore.data import DataError, printable
from clipcore.files import mode_of, not_utf8, read_regular

_MAX_SUITE_BYTES = 1 << 20

SHIFT = ("imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "objectnet")
# Radford et al. 2021, the 27 sets of table 10.
PAPER27 = (
    "food101",
    "vtab/cifar10",
    "vtab/cifar100",
    "birdsnap",
    "sun397",
    "cars",
    "fgvc_aircraft",
    "voc2007_multilabel",
    "vtab/dtd",
    "vtab/pets",
    "vtab/caltech101",
    "vtab/flowers",
    "mnist",
    "fer2013",
    "stl10",
    "vtab/eurosat",
    "vtab/resisc45",
    "gtsrb",
    "vtab/kitti_closest_vehicle_distance",
    "country211",
    "vtab/pcam",
    "ucf101",
    "kinetics700",
    "vtab/clevr_count_all",
    "hateful_memes",
    "renderedsst2",
    "imagenet1k",
)
# CLIP_benchmark's collection of that name.
VTAB_PLUS = (
    "imagenet1k",
    *("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet"),
    *("fer2013", "voc2007", "voc2007_multilabel", "sun397", "cars", "fgvc_aircraft"),
    *("mnist", "stl10", "gtsrb", "country211", "renderedsst2"),
    "vtab/caltech101",
    "vtab/cifar10",
    "vtab/cifar100",
    "vtab/clevr_count_all",
    "vtab/clevr_closest_object_distance",
    "vtab/diabetic_retinopathy",
    "vtab/dmlab",
    "vtab/dsprites_label_orientation",
    "vtab/dsprites_label_x_position",
    "vtab/dtd",
    "vtab/eurosat",
    "vtab/kitti_closest_vehicle_distance",
    "vtab/flowers",
    "vtab/pets",
    "vtab/pcam",
    "vtab/resisc45",
    "vtab/smallnorb_label_azimuth",
    "vtab/smallnorb_label_elevation",
    "vtab/svhn",
)
# datacomp's list of tasks without FairFace and UTKFace, which are not part of its average.
DATACOMP38 = (
    "vtab/caltech101",
    "cifar10",
    "vtab/cifar100",
    "vtab/clevr_count_all",
    "vtab/clevr_closest_object_distance",
    "country211",
    "vtab/dtd",
    "vtab/eurosat",
    "fgvc_aircraft",
    "food101",
    "gtsrb",
    "imagenet1k",
    "imagenet_sketch",
    "imagenetv2",
    *("imagenet-a", "imagenet-o", "imagenet-r"),
    "vtab/kitti_closest_vehicle_distance",
    "mnist",
    "objectnet",
    "vtab/flowers",
    "vtab/pets",
    "voc2007",
    "vtab/pcam",
    "renderedsst2",
    "vtab/resisc45",
    "cars",
    "stl10",
    "sun397",
    "vtab/svhn",
    "retrieval/flickr30k",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval",
    "misc/winogavil",
    *("wilds/iwildcam", "wilds/camelyon17", "wilds/fmow"),
    *("fairness/dollar_street", "fairness/geode"),
)
SUITES = {"paper27": PAPER27, "vtab+": VTAB_PLUS, "shift": SHIFT, "datacomp38": DATACOMP38}

_METRICS = {
    **dict.fromkeys(
        ("caltech101", "fgvc_aircraft", "flowers", "flowers102", "pets"), "mean_per_class_recall"
    ),
    "hateful_memes": "roc_auc",
    "kinetics700": "mean_acc1_acc5",
    "iwildcam": "F1-macro_all",
    "fmow": "acc_worst_region",
    "dollar_street": "acc_top5_wg",
    "geode": "acc_wg",
    "winogavil": "jaccard_score_10-12",
}
# These need more of an image than its label.
NOT_COMPUTED = frozenset(
    {"F1-macro_all", "acc_worst_region", "acc_top5_wg", "acc_wg", "jaccard_score_10-12"}
)


class SplitSizes(NamedTuple):
    """The number of test images: in the set of that name on the hub, and in the paper's."""

    hub: int
    paper: int


_OTHER_SPLITS = {
    "sun397": SplitSizes(108_754, 19_850),
    "fer2013": SplitSizes(7_178, 3_574),
    "eurosat": SplitSizes(5_400, 5_000),
    "resisc45": SplitSizes(6_300, 25_200),
    "clevr_count_all": SplitSizes(15_000, 500),
    "voc2007": SplitSizes(14_976, 4_952),
}


def suite(name_or_file: str) -> tuple[str, ...]:
    """Return the names of a suite's data sets.

    Args:
        name_or_file: one of ``SUITES``, or a text file with one name per line, in which ``#`` begins a comment.

    Raises:
        DataError: there is no such suite or file, or it holds no name.
    """
    if name_or_file in SUITES:
        return SUITES[name_or_file]
    path = Path(name_or_file)
    try:
        data = read_regular(path, _MAX_SUITE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"there is no suite or file {printable(name_or_file)}; the suites are {', '.join(SUITES)}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the suite {printable(name_or_file)}: {reason}") from None
    if len(data) > _MAX_SUITE_BYTES:
        raise DataError(f"the suite {path} has more than {_MAX_SUITE_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(f"the suite {path}", error)) from None

    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    names = tuple(dict.fromkeys(line for line in lines if line))
    if not names:
        raise DataError(f"the suite {path} names no data set; write one name a line")
    return names


def locate(root: str | Path, set_name: str) -> Path | None:
    """Return the folder or file of a data set under ``root``, None if there is none.

    The candidates are the name; with a dash for its slash; with the prefix ``wds_`` and the suffix ``_test``, as on the hub;
    and all of these without the group before the slash or, for VTAB's sets, with it.
    """
    own = set_name.partition("/")[2]
    names = [set_name, own or f"vtab/{set_name}"]
    for name in names:
        for form in dict.fromkeys((name, name.replace("/", "-"))):
            for candidate in (form, f"wds_{form}", f"{form}_test", f"wds_{form}_test"):
                path = Path(root) / candidate
                if _is_there(path):
                    return path
    return None


def _is_there(path: Path) -> bool:
    try:
        return mode_of(path) is not None
    except (OSError, ValueError):  # such as a name that is too long for a file, or a link to itself
        return False


def canonical_name(set_name: str) -> str:
    """Return a set's name without the hub's prefix and suffix, and without its group: ``flowers``."""
    name = os.path.basename(set_name.rstrip("/")).lower()
    name = re.sub(r"^wds[_-]", "", name)
    name = re.sub(r"_test$", "", name)
    return re.sub(r"^(?:vtab|wilds|fairness|retrieval|misc)-", "", name)


def main_metric(set_name: str, task: str) -> str:
    """Return the name of a set's main metric; some of datacomp's are ``NOT_COMPUTED``.

    Args:
        set_name: the set's folder name, in any form that ``locate`` accepts.
        task: "classification", "multilabel" or "retrieval".
    """
    if task == "retrieval":
        return "mean_recall@1"
    name = canonical_name(set_name)
    if task == "multilabel":
        return "map11" if name.startswith("voc2007") else "mean_average_precision"
    return _METRICS.get(name, "acc1")


def zero_shot_metric(set_name: str, task: str) -> str:
    """Return ``main_metric`` if it is computed, else the accuracy."""
    metric = main_metric(set_name, task)
    return "acc1" if metric in NOT_COMPUTED else metric


def suite_notes(set_name: str, task: str) -> tuple[str, ...]:
    """Return a note on a set whose metric in datacomp is not computed; none for other sets."""
    metric = main_metric(set_name, task)
    if metric not in NOT_COMPUTED:
        return ()
    return (f"datacomp judges this set by {metric}, which is not computed; acc1 is",)


def size_notes(set_name: str, task: str, num_images: int) -> tuple[str, ...]:
    """Return a note on a test split whose size is not the paper's; none for the paper's split, and for other sets.

    Args:
        num_images: the number of images in the test split.
    """
    sizes = _OTHER_SPLITS.get(canonical_name(set_name)) if task == "classification" else None
    if sizes is None or num_images == sizes.paper:
        return ()
    if num_images == sizes.hub:
        return (f"split: datacomp ({sizes.hub:,} images; the paper's has {sizes.paper:,})",)
    return (
        f"split: {num_images:,} images; datacomp's has {sizes.hub:,}, the paper's {sizes.paper:,}",
    )
