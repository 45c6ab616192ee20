"""Check that everything of the package comes from the folder SITE and loads; print "kernels:" and the kernels' names.

SITE is the only argument. PYTHONPATH names it too.
"""

import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

import clipcore
import clipcore.kernels
from clipcore import native
from clipcore.moved import MOVED

site = Path(sys.argv[1])
kernels = [name for _, name, _ in pkgutil.iter_modules(clipcore.kernels.__path__)]
modules = [importlib.import_module(f"clipcore.kernels.{name}") for name in kernels]
modules += [importlib.import_module(name) for name in MOVED]
modules += [clipcore, native, native.load()]
for module in modules:
    assert Path(module.__file__).is_relative_to(site), module
(distribution,) = importlib.metadata.distributions(name="clipcore", path=[str(site)])
for entry_point in distribution.entry_points:
    assert callable(entry_point.load())
print("kernels:", *sorted(kernels))
