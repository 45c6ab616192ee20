"""Run a command with arguments; print as JSON its exit status, and which slow libraries it imported.

The command is a module, or "module:function" as the installed scripts name it.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys

SLOW = ("torch", "numpy", "PIL", "tqdm", "matplotlib", "triton")

if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    sys.argv = [module, *sys.argv[2:]]
    status: object = None
    try:
        if function:
            status = getattr(importlib.import_module(module), function)()
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    print(json.dumps({"status": status, "slow": [name for name in SLOW if name in sys.modules]}))
