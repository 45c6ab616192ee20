"""Captions in text files, as Flickr8k and Flickr30k come: ``.txt`` and ``.token``.

Two forms are told apart by the first line. ``captions.txt`` is a table with a header, such as ``image,caption``. In
``Flickr8k.token.txt`` each line is ``image.jpg#0``, a tab and a caption, without a header; the number counts the captions of
the image. Images lie beside the file, or where the paths lead from its folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from clipcore.data import DataError, LeftOut, printable
from clipcore.data.tables import (
    MISCOUNTED,
    ColumnError,
    CsvSource,
    TextColumn,
    caption_columns,
    check_images_exist,
    first_line,
    image_columns,
    names_image,
    text_lines,
)
from clipcore.data.transforms import Decoder

CAPTION_LIST_SUFFIXES = (".txt", ".token")
_NUMBERED = re.compile(r"([^\t]+)#[0-9]{1,9}\t(.*)", re.DOTALL)
_PROBED_ROWS = 16


def open_caption_list(
    path: str,
    img_key: str | None,
    caption_key: str | None,
    separator: str | None,
    decoder: Decoder | str,
    quotes: bool = True,
) -> CsvSource:
    """Return the pairs of a text file.

    Args:
        img_key, caption_key, separator, quotes: as of ``CsvSource``, for a file with a header; a column that is not named is
            the first of the usual names.
        decoder: see ``decode_image``.

    Raises:
        DataError: the file is in neither form, or cannot be read.
    """
    match = _NUMBERED.fullmatch(first_line(path))
    if match is not None and names_image(match[1]):
        return NumberedCaptions(path, decoder)
    try:
        return CsvSource(path, img_key, caption_key, separator, decoder, quotes)
    except ColumnError:
        images, captions = image_columns(img_key), caption_columns(caption_key)
        raise ColumnError(
            f"{path} is no table of captions: its first line is neither a header with a column of images "
            f"({', '.join(map(printable, images))}) and one of captions ({', '.join(map(printable, captions))}), nor "
            "'image.jpg#0', a tab and a caption; write one of them"
        ) from None


class NumberedCaptions(CsvSource):
    """Lines of ``image.jpg#0``, a tab and a caption: see ``clipcore.data.PairSource``.

    Lines of another form are bad samples.

    Args:
        path: the file, UTF-8.
        decoder: see ``decode_image``.

    Attributes:
        left_out: lines that are bad samples for their form.

    Raises:
        DataError: the file cannot be read, or none of the first images is there.
    """

    def __init__(self, path: str, decoder: Decoder | str = "pillow") -> None:
        self.name = os.path.basename(path)
        self.left_out, self.noted = LeftOut(), LeftOut()
        self._folder, self._decoder = os.path.dirname(path), decoder
        self._cells = TextColumn(cell for cells in self._rows_of(path) for cell in cells)
        if not len(self):
            raise DataError(f"{path} has no lines")
        paths = [self._path(row) for row in range(min(len(self), _PROBED_ROWS))]
        check_images_exist(path, "image#number", paths)

    def _rows_of(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield image and caption of each line that is not empty."""
        for number, line in enumerate(text_lines(path), 1):
            if line.isspace():
                continue
            match = _NUMBERED.fullmatch(line)
            if match is not None:
                yield match[1], match[2]
                continue
            self.left_out.add("line without an image#number before a tab", f"line {number}")
            yield "", f"{MISCOUNTED}no image#number before a tab (line {number})"
