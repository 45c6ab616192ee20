"""Import every module that has moved under its earlier name and under its present one, in the order HOW.

HOW is "earlier" (first the earlier name), "present" (first the present one), or "from" (`from clipcore import` the earlier).
"""

import importlib
import sys

import clipcore
from clipcore.moved import MOVED

how = sys.argv[1]
assert "torch" not in sys.modules and not MOVED.keys() & sys.modules.keys()
for earlier, present in MOVED.items():
    if how == "from":
        names: dict[str, object] = {}
        exec(f"from clipcore import {earlier.partition('.')[2]} as module", names)
        module = names["module"]
    else:
        first = importlib.import_module(earlier if how == "earlier" else present)
        module = importlib.import_module(earlier)
        assert first is module, earlier
    assert module is importlib.import_module(present) is sys.modules[earlier], earlier
    assert module is getattr(clipcore, earlier.partition(".")[2]), earlier
    assert module.__name__ == module.__spec__.name == present, earlier
print(len(MOVED))
