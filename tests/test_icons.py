"""The embedded icons: names without styles, fixed and disjoint splits, pictures with ink, one line where there are none."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from runs import PROGRAMS, leave_process_alone

from clipcore import train
from clipcore.data import DataError, icons
from clipcore.data.drawing import CANVAS, SPLITS
from clipcore.data.embedded import EMBEDDED
from clipcore.data.icons import FAMILIES, IconSource, draw, family_icons, is_unseen, split_style
from clipcore.data.prepare import Settings, source_identity
from clipcore.data.shards import ImageFormat
from clipcore.evaluate.tasks import retrieval_tasks, zero_shot_tasks
from clipcore.run.command_line import parse_command_line
from clipcore.run.parts import build_tokenizer, open_training_source
from clipcore.run.recipe import resolve

pytestmark = pytest.mark.fast

FAMILY = {family.name: family for family in FAMILIES}
TRAINED = {"material", "phosphor", "remix"}


@pytest.fixture(scope="module")
def sources() -> dict[str, IconSource]:
    return {split: IconSource(split) for split in SPLITS}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Put a folder in qtawesome's place; what was read of the real one is forgotten meanwhile."""
    monkeypatch.setattr("clipcore.data.icons.package_folder", lambda name: tmp_path)
    forget()
    (tmp_path / "fonts").mkdir()
    yield tmp_path / "fonts"
    forget()


def forget() -> None:
    """Let families be read again."""
    family_icons.cache_clear()
    icons._trained_families_names.cache_clear()


def test_size_of_the_whole(sources):
    """As qtawesome 1.4 has it; codicon has 569 names for 460 icons, one of which is blank."""
    sizes = {family.name: len(family_icons(family)) for family in FAMILIES}
    assert sizes == {
        "material": 7367,
        "phosphor": 4470,
        "remix": 2271,
        "awesome": 1402,
        "codicon": 459,
        "elusive": 304,
    }
    number = {split: len(source) for split, source in sources.items()}
    assert number == {"train": 12_655, "unseen": 1_453, "shift": 233, "seen-shift": 688}
    classes = {split: len(set(source.labels_N)) for split, source in sources.items()}
    assert classes == {"train": 6_051, "unseen": 738, "shift": 211, "seen-shift": 491}
    # In no split: new families' names that were not trained on, although the hash would have let them be.
    assert sum(sizes.values()) - sum(number.values()) == 1_244


@pytest.mark.parametrize(
    ("family", "icon", "name", "style"),
    [
        ("material", "home", "home", ""),
        ("material", "home-variant-outline", "home", "variant outline"),
        ("material", "arrow-left-bold-outline", "arrow left", "bold outline"),
        ("material", "format-bold", "format bold", ""),
        ("material", "traffic-light", "traffic light", ""),
        ("phosphor", "chart-line", "chart line", ""),
        ("phosphor", "chart-line-fill", "chart line", "filled"),
        ("remix", "line-line", "line", "outline"),
        ("remix", "bold", "bold", ""),
        ("awesome", "chart-line", "chart line", ""),
        ("codicon", "circle-filled", "circle", "filled"),
        ("elusive", "laptop-alt", "laptop", "alternate"),
    ],
)
def test_a_name_is_without_its_style(family, icon, name, style):
    assert split_style(FAMILY[family], icon) == (name, style)


def test_no_name_is_on_both_sides(sources):
    names = {split: {icon.name for icon in source.samples} for split, source in sources.items()}
    assert names["train"].isdisjoint(names["unseen"] | names["shift"])
    assert names["seen-shift"] <= names["train"]
    # Nor the words of a name in another order.
    words = {split: {tuple(sorted(n.split())) for n in names[split]} for split in names}
    assert words["train"].isdisjoint(words["unseen"] | words["shift"])


def test_families_are_trained_or_shift(sources):
    families = {split: {i.family.name for i in s.samples} for split, s in sources.items()}
    assert families["train"] == families["unseen"] == TRAINED
    assert families["shift"] == families["seen-shift"] == set(FAMILY) - TRAINED


def test_no_unseen_name_is_read_in_training(sources):
    trained, unseen = sources["train"], set(sources["unseen"].classnames)
    captions = {c for i in range(len(trained)) for c in trained.captions(i)}
    assert captions == set(icons.training_captions())
    assert captions.isdisjoint(unseen)
    assert captions.isdisjoint(sources["unseen"].captions(0))


def test_the_split_is_fixed_for_good():
    names = "home,account,star,folder,truck plus,alpha i circle,circle i alpha"
    expected = [True, False, False, False, True, True, True]
    assert [is_unseen(name) for name in names.split(",")] == expected


def test_both_kinds_of_family_are_tested_among_the_same_names(sources):
    assert sources["unseen"].classnames == sources["shift"].classnames
    assert sources["train"].classnames == sources["seen-shift"].classnames
    assert set(sources["train"].labels_N) == set(range(6_051))


def test_labels_point_at_the_names(sources):
    for source in sources.values():
        assert source.labels_N.dtype == np.int64 and source.labels_N.shape == (len(source),)
        for index in range(0, len(source), 97):
            assert source.classnames[source.labels_N[index]] == source[index].caption[-1]


def test_captions_say_family_and_style(sources):
    found = {
        f"{i.style}/{i.family.name}": sources["unseen"].captions(index)
        for index, i in enumerate(sources["unseen"].samples)
        if i.name == "home"
    }
    assert found["outline/material"] == (
        "an outline material icon of home",
        "home, outline material",
        "home",
    )
    assert {"/material", "variant outline/material", "filled/remix", "outline/remix"} <= set(found)


def test_an_icon_with_several_names_is_one_picture():
    """It is called by the first name that a trained family has too, or else by the first."""
    names = [icon.name for icon in family_icons(FAMILY["codicon"])]
    assert "add" in names and not {"plus", "gist new", "repo create"} & set(names)
    assert "folder" in names and not {"file directory", "symbol folder"} & set(names)
    for family in FAMILIES:
        characters = [icon.character for icon in family_icons(family)]
        assert len(set(characters)) == len(characters)


def test_every_icon_leaves_its_ink_on_the_canvas():
    """All of it: a canvas three times as large has no more."""
    num_cut = num_blank = 0
    for family in FAMILIES:
        font = IconSource("unseen")._font(family)
        for icon in family_icons(family)[::3]:
            picture = draw(icon.character, font)
            assert picture.shape == (CANVAS, CANVAS) and picture.dtype == np.uint8
            num_blank += int(picture.min()) > 96
            num_cut += ink(picture) != ink_unbounded(icon.character, font)
    assert (num_cut, num_blank) == (0, 0)


def ink(picture: np.ndarray) -> int:
    return int((255 - picture.astype(np.int64)).sum())


def ink_unbounded(character, font) -> int:
    """Return the ink of the same drawing with room on all sides."""
    image = Image.new("L", (3 * CANVAS, 3 * CANVAS), 255)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), character, font=font, anchor="ls")
    if (size := max(right - left, bottom - top)) > CANVAS - 2:
        font = font.font_variant(size=int(icons.FONT_SIZE * (CANVAS - 2) / size))
    pen.text((CANVAS, 2 * CANVAS), character, fill=0, font=font, anchor="ls")
    return ink(np.asarray(image))


def test_an_icon_keeps_its_place_in_its_square(sources):
    """The square of the font lies in the middle of the canvas; a dot that is low in it stays low."""
    rows = {}
    for family, name in (("material", "circle"), ("phosphor", "circle"), ("phosphor", "wifi none")):
        font = sources["train"]._font(FAMILY[family])
        assert sum(font.getmetrics()) == icons.FONT_SIZE <= CANVAS - 2
        icon = next(i for i in family_icons(FAMILY[family]) if (i.name, i.style) == (name, ""))
        inked = (draw(icon.character, font) < 128).any(axis=1).nonzero()[0]
        rows[f"{family} {name}"] = (int(inked[0]), int(inked[-1]))
    assert rows == {
        "material circle": (4, 30),
        "phosphor circle": (5, 30),
        "phosphor wifi none": (26, 28),
    }


def test_every_icon_is_in_its_font():
    """Not the sign that a font draws for what it lacks; the blank ones are just those that are left out."""
    blank = set()
    for family in FAMILIES:
        font = IconSource("unseen")._font(family)
        missing = bytes(font.getmask("\U0010ffff"))
        table = icons._read_table(family)
        for icon, character in table.items():
            drawn = font.getmask(character)
            # Font Awesome has that sign as an icon too, under this name.
            assert bytes(drawn) != missing or icon in ("notdef", "blank"), (family.name, icon)
            if drawn.getbbox() is None:
                blank.add((family.name, icon))
    assert blank == icons._BLANK == {("codicon", "blank")}


def test_few_unseen_pictures_have_a_twin_in_training(sources):
    """Under another name: a circled 0 is a circled O."""
    trained = {sources["train"][i].image.tobytes() for i in range(len(sources["train"]))}
    twins = {
        split: sum(sources[split][i].image.tobytes() in trained for i in range(len(sources[split])))
        for split in ("unseen", "shift")
    }
    assert twins == {"unseen": 3, "shift": 0}


def test_a_picture_is_the_same_every_time_and_in_every_process(sources):
    source = sources["train"]
    first, again = source[1234], pickle.loads(pickle.dumps(source))[1234]
    assert np.array_equal(first.image, again.image)
    assert (first.caption, first.key) == (again.caption, again.key)
    keys = {split: {s.key(i) for i in range(len(s))} for split, s in sources.items()}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 15_029


def test_unknown_split():
    with pytest.raises(ValueError, match="the splits of icons are train, unseen, shift"):
        IconSource("test")


def test_neither_qtawesome_nor_qt_is_imported():
    subprocess.run([sys.executable, str(PROGRAMS / "draw_icon.py")], check=True)


# The run


def test_tasks_and_source_of_a_run():
    config = resolve(parse_command_line(["--train-data", "icons"])[0])
    assert (config.model, config.epochs, config.lr, config.wd) == ("ViT-glyphs", 18, 4e-3, 0.6)
    assert (config.vocab_size, config.tokenizer, config.workers) == (2000, "train", 0)
    assert open_training_source(config).name == "icons/train"

    tasks = {task.name: task for task in zero_shot_tasks(config)}
    sizes = {name: (len(task.source), len(task.classnames)) for name, task in tasks.items()}
    assert sizes == {
        "unseen icons": (1_453, 889),
        "unseen icons in unseen families": (233, 889),
        "trained icons in unseen families": (688, 6_051),
    }
    (retrieval,) = retrieval_tasks(config)
    assert (retrieval.name, retrieval.source.name) == ("unseen icons, retrieval", "icons/unseen")
    assert not retrieval.all_captions


def test_vocabulary_is_of_the_trained_captions(tmp_path, monkeypatch):
    learnt = []
    monkeypatch.setattr(
        "clipcore.run.parts.train_tokenizer", lambda *arguments: learnt.append(arguments)
    )
    for name in EMBEDDED:
        config = resolve(parse_command_line(["--train-data", name])[0])
        build_tokenizer(config, tmp_path, False, EMBEDDED[name].open("unseen"))
    assert [size for _, size in learnt] == [3072, 2000]
    assert learnt[1][0] == icons.training_captions()


def test_shards_are_prepared_of_icons():
    """Like the embedded characters they have no files."""
    source = Settings(ImageFormat("raw", 32), shard_size=64).open("icons")
    assert source.name == "icons/train"
    assert source_identity("icons", source)["samples"] == 12_655


# What is missing or broken


def test_without_the_package_a_run_ends_in_one_line(monkeypatch, capsys, tmp_path):
    leave_process_alone(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    forget()
    line = f"--train-data icons --logs {tmp_path} --threads 1"
    try:
        assert train.main(line.split()) == 2
    finally:
        forget()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("error: the icons need qtawesome's fonts: pip install 'clipcore[icons]'")


def test_another_version_of_the_package(folder):
    with pytest.raises(DataError, match=r"has no materialdesignicons6.* pip install"):
        IconSource("train")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"home": "f0z"}', b'{"home": 5}', b"[" * 10**6])
def test_a_broken_table(folder, content):
    (folder / "materialdesignicons6-webfont-charmap-6.9.96.json").write_bytes(content)
    with pytest.raises(DataError, match="is not a table of icons: pip install") as error:
        IconSource("train")
    assert "\n" not in str(error.value)


def test_a_table_that_is_a_folder(folder):
    (folder / "materialdesignicons6-webfont-charmap-6.9.96.json").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*Is a directory"):
        IconSource("train")
