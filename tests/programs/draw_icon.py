"""Draw an icon, and check that neither qtawesome nor Qt is imported with it; no arguments."""

import sys

from clipcore.data.icons import IconSource

IconSource("unseen")[0]
packages = {name.split(".")[0].lower() for name in sys.modules}
assert packages.isdisjoint(("qtawesome", "qtpy", "pyqt5", "pyqt6", "pyside2", "pyside6"))
