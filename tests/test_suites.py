"""Suites of data sets, where they lie, what judges them, and ImageNet's prompts against open_clip's."""

from __future__ import annotations

import importlib.util
import os
import runpy
from pathlib import Path

import pytest

from clipcore.data import DataError
from clipcore.evaluate import tasks
from clipcore.evaluate.prompts import IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from clipcore.evaluate.suites import (
    NOT_COMPUTED,
    SUITES,
    canonical_name,
    locate,
    main_metric,
    size_notes,
    suite,
    suite_notes,
    zero_shot_metric,
)

pytestmark = pytest.mark.fast


def test_suites_have_as_many_sets_as_their_names_say():
    numbers = {name: len(suite(name)) for name in SUITES}
    assert numbers == {"paper27": 27, "vtab+": 36, "shift": 5, "datacomp38": 38}
    for names in SUITES.values():
        assert len(set(names)) == len(names)
    # As many as CLIP_benchmark lists under that group.
    assert sum(name.startswith("vtab/") for name in suite("vtab+")) == 19
    assert set(suite("shift")) < set(suite("vtab+")) & set(suite("datacomp38"))


def test_a_suite_may_be_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeffmnist\n# a comment\n\nvtab/dtd # textures\nmnist\r\n")
    assert suite(str(path)) == ("mnist", "vtab/dtd")


def test_what_is_no_suite(tmp_path):
    path = tmp_path / "names.txt"
    cases: list[tuple[bytes, str]] = [
        (b"# nothing\n", "names no data set; write one name a line"),
        (b"caf\xe9\n", "is not UTF-8"),
        (b"a\n" * (1 << 20), "has more than 1,048,576 bytes"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            suite(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"cannot read the suite .*Not a regular file"):
        suite(str(path))
    for name in ("paper26", "a\0b", "x" * 5000, ""):
        with pytest.raises(DataError, match=r"the suites are paper27, vtab\+, shift|cannot read"):
            suite(name)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "wds_mnist"),
        ("mnist", "mnist_test"),
        ("mnist", "wds_mnist_test"),
        ("vtab/dtd", "vtab/dtd"),
        ("vtab/dtd", "vtab-dtd"),
        ("vtab/dtd", "wds_vtab-dtd"),
        ("vtab/dtd", "wds_vtab-dtd_test"),
        ("vtab/dtd", "dtd"),
        ("cifar10", "wds_vtab-cifar10_test"),
        ("vtab/cifar10", "wds_cifar10_test"),
        ("wilds/fmow", "wds_wilds-fmow_test"),
    ],
)
def test_folders_are_found_as_the_hub_calls_them(tmp_path, name, folder):
    assert locate(tmp_path, name) is None
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    assert locate(tmp_path, name) == tmp_path / folder


def test_the_own_name_wins_and_names_that_no_file_has_are_none(tmp_path):
    for name in ("wds_dtd", "vtab-dtd", "dtd"):
        (tmp_path / name).mkdir()
    assert locate(tmp_path, "vtab/dtd") == tmp_path / "vtab-dtd"
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "a\0b", "x" * 5000):
        assert locate(tmp_path, name) is None


@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("mnist", "classification", "acc1"),
        ("my own set", "classification", "acc1"),
        ("vtab/caltech101", "classification", "mean_per_class_recall"),
        ("wds_vtab-flowers_test", "classification", "mean_per_class_recall"),
        ("wds_fgvc_aircraft", "classification", "mean_per_class_recall"),
        ("vtab-pets", "classification", "mean_per_class_recall"),
        ("voc2007_multilabel", "multilabel", "map11"),
        ("wds_voc2007", "classification", "acc1"),
        ("coco", "multilabel", "mean_average_precision"),
        ("hateful_memes", "classification", "roc_auc"),
        ("kinetics700", "classification", "mean_acc1_acc5"),
        ("retrieval/flickr30k", "retrieval", "mean_recall@1"),
        ("wilds/iwildcam", "classification", "F1-macro_all"),
        ("wds_wilds-fmow_test", "classification", "acc_worst_region"),
        ("fairness/dollar_street", "classification", "acc_top5_wg"),
        ("fairness/geode", "classification", "acc_wg"),
        ("misc/winogavil", "classification", "jaccard_score_10-12"),
    ],
)
def test_the_metric_of_each_set(name, task, metric):
    assert main_metric(name, task) == metric
    computed = "acc1" if metric in NOT_COMPUTED else metric
    assert zero_shot_metric(name, task) == computed
    assert any("is not computed" in note for note in suite_notes(name, task)) == (
        metric in NOT_COMPUTED
    )


def test_sets_of_another_split_than_the_papers_are_told():
    names = {name for suite_names in SUITES.values() for name in suite_names}
    others = {canonical_name(name) for name in names if size_notes(name, "classification", 1)}
    assert others == {*("sun397", "fer2013", "eurosat", "resisc45", "clevr_count_all", "voc2007")}
    assert size_notes("voc2007_multilabel", "multilabel", 14_976) == ()
    # By its images: the name alone is that of both.
    for name in ("wds_vtab-resisc45_test", "vtab/resisc45", "resisc45"):
        assert size_notes(name, "classification", 6300) == (
            "split: datacomp (6,300 images; the paper's has 25,200)",
        )
        assert size_notes(name, "classification", 25_200) == ()
        assert size_notes(name, "classification", 31_500) == (
            "split: 31,500 images; datacomp's has 6,300, the paper's 25,200",
        )


def test_prompts_are_open_clips():
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    # The file alone: the package around it needs a torchvision that loads.
    file = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    theirs = runpy.run_path(str(file))
    for ours, name in (
        (IMAGENET_TEMPLATES, "OPENAI_IMAGENET_TEMPLATES"),
        (SIMPLE_IMAGENET_TEMPLATES, "SIMPLE_IMAGENET_TEMPLATES"),
    ):
        assert [template.format("newt") for template in ours] == [f("newt") for f in theirs[name]]
    assert len(IMAGENET_TEMPLATES) == 80
    assert tasks.SIMPLE_IMAGENET_TEMPLATES is SIMPLE_IMAGENET_TEMPLATES
