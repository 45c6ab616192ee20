"""Pretend that torch has the version VERSION, the only argument; print what loading the extension then says."""

import sys

import torch

torch.__version__ = sys.argv[1]

from clipcore import native  # noqa: E402

try:
    native.load()
except ImportError as error:
    print(error)
