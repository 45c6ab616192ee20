"""All images in a folder and below it, without their captions, for evaluations that use only images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from clipcore.data import DataError, LeftOut, Pair, printable
from clipcore.data.folders import images_below
from clipcore.data.tables import TextColumn, read_image_file
from clipcore.data.tar import IMAGE_SUFFIXES
from clipcore.data.transforms import Decoder


class PlainImages:
    """The images of a folder and its subfolders, all with one placeholder caption: see ``clipcore.data.PairSource``.

    Args:
        path: the folder; links to folders are followed.
        decoder: see ``decode_image``.
        are_shards_read: whether the caller itself reads the ``.tar`` files in the folder.

    Attributes:
        left_out: pictures of other kinds, and files of many images.
        noted: a note that all images of the folder are used.

    Raises:
        DataError: the folder does not exist, or holds no image.
    """

    def __init__(
        self, path: str, decoder: Decoder | str = "pillow", are_shards_read: bool = False
    ) -> None:
        self.name = os.path.basename(os.path.abspath(path))
        self._folder, self._decoder = path, decoder
        self.left_out, self.noted = LeftOut(), LeftOut()
        self.noted.add(
            "folder, all of whose images are taken, with and without captions", self.name
        )
        self._paths = TextColumn(images_below(path, self.left_out, are_shards_read))
        if not len(self):
            raise DataError(
                f"{path} holds no image (.{', .'.join(IMAGE_SUFFIXES)}){self.left_out.found()}"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        key = self.key(index)
        path = os.path.join(self._folder, self._paths[index])
        return Pair(read_image_file(path, key, self._decoder), self.captions(index), key)

    def captions(self, index: int) -> str:
        """Return the placeholder caption, which is the same for every image."""
        return "an image"

    def key(self, index: int) -> str:
        """Return the name of an image, within the folder."""
        return printable(self._paths[index])

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each image."""
        return (os.path.join(self._folder, self._paths[row]) for row in range(len(self)))


class ImageFiles(PlainImages):
    """Image files, and the images of folders and their subfolders, named by their paths: see ``PlainImages``.

    Args:
        paths: files and folders, in the order of the images.
        decoder: see ``decode_image``.

    Raises:
        DataError: one of them does not exist, or a folder holds no image.
    """

    def __init__(self, paths: Sequence[str], decoder: Decoder | str = "pillow") -> None:
        self.name = os.path.basename(os.path.abspath(paths[0]))
        self._folder, self._decoder = "", decoder
        self.left_out, self.noted = LeftOut(), LeftOut()
        self._paths = TextColumn(image for path in paths for image in self._images_of(path))

    def _images_of(self, path: str) -> Iterator[str]:
        if not os.path.lexists(path):
            raise DataError(f"there is no {printable(path)}")
        if not os.path.isdir(path):
            yield path
            return
        folder = PlainImages(path, self._decoder)
        self.left_out.update(folder.left_out)
        yield from folder.picture_names()
