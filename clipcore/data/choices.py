"""What command lines offer about data. It imports nothing, so that ``--help`` does not wait for the libraries of reading."""

from __future__ import annotations

# Kinds of data that ``open_source`` reads; ``auto`` decides by the suffixes.
DATASET_TYPES = ("auto", "webdataset", "csv", "jsonl", "parquet", "folder", "synthetic")
# open_clip's names of the columns of a csv table, which are tried before the usual ones.
DEFAULT_IMAGE_KEY = "filepath"
DEFAULT_CAPTION_KEY = "title"
# The embedded data sets.
GLYPHS, ICONS = "glyphs", "icons"
# Libraries that decode a JPEG.
DECODERS = ("pillow", "simplejpeg")
# Fewer samples than these are judged like so many, by the share of them that may be unreadable.
JUDGED_ROWS = 512
# What ``prepare`` writes.
PREPARED_FORMATS = ("jpeg", "raw")
# Samples of its shards: about 1 GB of raw pixels of 341 x 256, or 100 MB of JPEGs, which is a large read for a disk and
# still small for each of many processes.
SHARD_SIZE = 4096
