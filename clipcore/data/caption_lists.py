"""Captions in text files, the layout of Flickr8k and Flickr30k: ``.txt`` and ``.token``.

The first line distinguishes two forms. ``captions.txt`` is a table with a header, such as ``image,caption``. In
``Flickr8k.token.txt`` each line is ``image.jpg#0``, a tab and a caption, without a header; the number counts the captions of
the image. Image paths are relative to the file's folder, or to the one folder beside the file that holds the images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from clipcore.data import DataError, LeftOut, printable
from clipcore.data.remote import is_remote
from clipcore.data.tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MISCOUNTED,
    PROBED_ROWS,
    ColumnError,
    CsvSource,
    TextColumn,
    first_line,
    names_image,
    text_lines,
)
from clipcore.data.transforms import Decoder

CAPTION_LIST_SUFFIXES = (".txt", ".token")
_NUMBERED = re.compile(r"([^\t]+)#[0-9]{1,9}\t(.*)", re.DOTALL)


def open_caption_list(
    path: str,
    img_key: str | None,
    caption_key: str | None,
    separator: str | None,
    decoder: Decoder | str,
    quotes: bool = True,
    folder: str | None = None,
) -> CsvSource:
    """Return the pairs of a text file.

    Args:
        img_key, caption_key, separator, quotes: see ``CsvSource``, for a file with a header; a column that is not named is
            found by the usual names.
        decoder: see ``decode_image``.
        folder: see ``CsvSource``.

    Raises:
        DataError: the file has neither form, or cannot be read.
    """
    line = first_line(path)
    if not line:
        raise ColumnError(
            f"{path} is empty; write a header such as image,caption and the captions, or lines of 'image.jpg#0', a tab and "
            "a caption"
        )
    match = _NUMBERED.fullmatch(line)
    if match is not None and names_image(match[1]):
        if img_key is not None or caption_key is not None:
            raise NamedColumnsError(
                f"{path} has lines of image#number and no columns to name; leave --csv-img-key and --csv-caption-key out"
            )
        return NumberedCaptions(path, decoder, folder)
    try:
        return CaptionTable(path, img_key, caption_key, separator, decoder, quotes, folder)
    except ColumnError:
        images, captions = _image_names(img_key), _caption_names(caption_key)
        raise ColumnError(
            f"{path} is not a table of captions: its first line is neither a header with a column of images "
            f"({', '.join(map(printable, images))}) and one of captions ({', '.join(map(printable, captions))}), nor "
            "'image.jpg#0', a tab and a caption; write one of them"
        ) from None


class NamedColumnsError(DataError):
    """The user names columns, but the file has none."""


def _image_names(key: str | None) -> Sequence[str]:
    """Return the accepted names of the image column, in lower case as in ``CaptionTable``'s header."""
    return (*IMAGE_COLUMNS, "image_name") if key is None else (_plain(key),)


def _caption_names(key: str | None) -> Sequence[str]:
    """Return the accepted names of the caption column, as ``_image_names`` does."""
    return (*CAPTION_COLUMNS, "comment") if key is None else (_plain(key),)


def _plain(name: str) -> str:
    return name.strip().casefold()


class CaptionTable(CsvSource):
    """A table of captions with a header line, whose case and outer spaces are ignored: see ``CsvSource``.

    If a table has two columns and the captions are last, commas without quotation marks are part of the caption.

    Attributes:
        noted: as of ``CsvSource``; also the images' folder if it is not the table's, and the captions with such commas.
    """

    def _column_candidates(
        self, img_key: str | None, caption_key: str | None
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Return the accepted names of the image and caption columns."""
        return _image_names(img_key), _caption_names(caption_key)

    def _header(self, cells: list[str]) -> list[str]:
        """Return the names of the columns, given the cells of the header line."""
        return list(map(_plain, cells))

    def _row(
        self, row: list[str], line: int, num_columns: int, image_column: int, caption_column: int
    ) -> tuple[str, str]:
        """Return image and caption of a row; raise DataError as ``CsvSource`` does."""
        is_last = num_columns == 2 and caption_column == 1
        # A field that holds a comma was in quotation marks, so the fields after it are other columns.
        is_open = self._separator == "," and not any("," in field for field in row)
        if is_last and is_open and any(row[num_columns:]):
            self.noted.add(
                "caption with commas and no quotation marks, taken whole", f"line {line}"
            )
            row = [row[0], ",".join(row[1:])]
        return super()._row(row, line, num_columns, image_column, caption_column)

    def _check_images(self, column: str) -> None:
        """Raise DataError if the first images are missing, and no single folder beside the table holds them."""
        names = [self._cells[2 * row] for row in range(min(len(self), PROBED_ROWS))]
        # Flickr8k's layout: captions.txt beside Images/, Flickr8k.token.txt beside Flicker8k_Dataset/.
        folders = _folders_with(self._folder, [name for name in names if name])
        if len(folders) == 1:
            self._folder = folders[0]
            reason = "table whose images are read from a folder beside it"
            self.noted.add(reason, os.path.basename(folders[0]))
        super()._check_images(column)


def _folders_with(path: str, names: Sequence[str]) -> list[str]:
    """Return the subfolders that hold any of these files; none if a file is in the folder itself or its path is absolute."""
    if is_remote(path) or any(map(is_remote, names)):
        return []
    if any(os.path.isabs(name) or os.path.exists(os.path.join(path, name)) for name in names):
        return []
    try:
        with os.scandir(path or ".") as entries:
            # The folder may be the current one, whose name is empty.
            beside = sorted(os.path.join(path, e.name) for e in entries if e.name[0] != ".")
    except OSError:
        return []
    return [
        folder
        for folder in beside
        if any(os.path.exists(os.path.join(folder, name)) for name in names)
    ]


class NumberedCaptions(CaptionTable):
    """Lines of ``image.jpg#0``, a tab and a caption: see ``clipcore.data.PairSource``.

    Lines of another form are bad samples.

    Args:
        path: the file, UTF-8.
        decoder: see ``decode_image``.
        folder: see ``CsvSource``.

    Attributes:
        left_out: lines that are bad samples because of their form.

    Raises:
        DataError: the file cannot be read, or none of the first images exists.
    """

    def __init__(
        self, path: str, decoder: Decoder | str = "pillow", folder: str | None = None
    ) -> None:
        self.name = os.path.basename(path)
        self.left_out, self.noted = LeftOut(), LeftOut()
        self._table, self._decoder = path, decoder
        self._folder = os.path.dirname(path) if folder is None else folder
        self._cells = TextColumn(cell for cells in self._rows_of(path) for cell in cells)
        if not len(self):
            raise DataError(f"{path} has no lines")
        self._check_images("image#number")

    def _rows_of(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield image and caption of each line that is not empty."""
        for number, line in enumerate(text_lines(path), 1):
            if line.isspace():
                continue
            match = _NUMBERED.fullmatch(line)
            if match is not None:
                yield match[1].rstrip(), match[2]
                continue
            self.left_out.add("line without an image#number before a tab", f"line {number}")
            yield "", f"{MISCOUNTED}no image#number before a tab (line {number})"
