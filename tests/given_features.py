"""Features and images that tests of evaluations make up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from clipcore.data import BadSample, Pair
from clipcore.evaluate.datasets import Split
from clipcore.evaluate.features import SplitFeatures


class GivenSource:
    """Pictures in memory; those that are None cannot be read.

    Attributes:
        num_read: how often each of them was read.
    """

    def __init__(
        self,
        pictures: Sequence[np.ndarray | None],
        name: str = "given",
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.name = name
        self._pictures = list(pictures)
        self._captions = captions

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Pair:
        picture = self._pictures[index]
        if picture is None:
            raise BadSample("unreadable image", f"{self.name}/{index}")
        return Pair(picture, "a picture", f"{self.name}/{index}")

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of a picture; raise BadSample where it has none."""
        if self._captions is None or not self._captions[index]:
            raise BadSample("empty caption", f"{self.name}/{index}")
        return self._captions[index]


class GivenFeatures(SplitFeatures):
    """Features that need no model: the projection changes nothing but their length.

    Attributes:
        most_rows: the most that were asked for at once.
    """

    def __init__(
        self,
        features_NW: Tensor,
        source: GivenSource | None = None,
        labels_N: Sequence[int] | None = None,
        groups: Mapping[str, list[str]] | None = None,
        rows_N: Sequence[int] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        rows = np.arange(len(features_NW)) if rows_N is None else np.array(rows_N)
        num_rows = int(rows.max()) + 1
        labels = None if labels_N is None else np.array(labels_N)
        split = Split(
            name="test",
            source=source,
            labels_N=labels,
            fingerprint=lambda: "",
            keys=lambda: list(keys or (f"image {row}" for row in range(num_rows))),
            groups=groups or {},
        )
        super().__init__(split, features_NW.numpy(), rows)
        self.most_rows = 0

    def blocks(
        self, projected: bool = True, unit: bool = True, rows: int = 4096
    ) -> Iterator[Tensor]:
        """Yield the features, of unit length where that is asked for."""
        for part in torch.from_numpy(self.pooled_NW).split(rows):
            self.most_rows = max(self.most_rows, len(part))
            yield torch.nn.functional.normalize(part, dim=1) if unit else part
