"""The embedded data: fixed, disjoint splits of characters and typefaces, pictures with ink, honest captions."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from clipcore.data import glyphs
from clipcore.data.drawing import CANVAS, SPLITS
from clipcore.data.glyphs import FACES, GlyphSource, draw, face_characters, is_unseen

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def sources() -> dict[str, GlyphSource]:
    return {split: GlyphSource(split) for split in SPLITS}


def test_size_of_the_whole(sources):
    assert len(FACES) == 12
    assert sum(map(len, sources.values())) == sum(len(face_characters(face)) for face in FACES)
    assert 46_000 < sum(map(len, sources.values())) < 48_000
    assert 600 < len(sources["unseen"].classnames) < 720


def test_no_label_leaks_from_the_evaluations_into_the_training(sources):
    trained = {character for _, character in sources["train"].samples}
    for split in ("unseen", "shift"):
        assert trained.isdisjoint(character for _, character in sources[split].samples)
    assert set(sources["train"].classnames).isdisjoint(sources["unseen"].classnames)
    families = {split: {face.family for face, _ in s.samples} for split, s in sources.items()}
    assert families["train"] == families["unseen"] == {"sans", "serif"}
    assert families["shift"] == families["seen-shift"] == {"monospaced"}
    captions = {c for i in range(0, len(sources["train"]), 97) for c in sources["train"][i].caption}
    assert not any(name in captions for name in sources["unseen"].classnames)


def test_the_vocabulary_never_sees_an_unseen_name(sources):
    captions = set(glyphs.training_captions())
    assert captions.isdisjoint(sources["unseen"].classnames)


def test_the_split_is_fixed_for_good():
    assert [is_unseen(c) for c in "+bÑ\N{SATURN}~z"] == [True, False, True, True, True, False]


def test_labels_point_at_the_names(sources):
    source = sources["unseen"]
    for index in range(0, len(source), 301):
        assert source.classnames[source.labels_N[index]] in source[index].caption


def test_both_typefaces_are_tested_among_the_same_names(sources):
    assert sources["unseen"].classnames == sources["shift"].classnames


def test_every_character_leaves_ink_and_fits(sources):
    """The characters left out by category are just those that are drawn as nothing."""
    for face in (FACES[0], FACES[7], FACES[11]):
        font = GlyphSource("unseen")._font(face)
        for character in face_characters(face):
            picture = draw(character, font)
            assert picture.shape == (CANVAS, CANVAS) and picture.min() < 160, hex(ord(character))
            edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert (edges > 250).mean() > 0.5, hex(ord(character))


def test_a_picture_is_the_same_every_time_and_in_every_process(sources):
    source = sources["train"]
    first = source[1234]
    again = pickle.loads(pickle.dumps(source))[1234]
    assert np.array_equal(first.image, again.image) and first.caption == again.caption
    assert first.key == again.key


def test_unknown_split():
    with pytest.raises(ValueError, match="train, unseen, shift, seen-shift"):
        GlyphSource("test")
