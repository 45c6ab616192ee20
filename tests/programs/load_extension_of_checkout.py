"""Print the compiled extension that the clipcore on PYTHONPATH loads, or None; takes no arguments."""

import sys

# An editable installation of another checkout would offer its own extension.
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]

from clipcore import native  # noqa: E402

print(native.load())
