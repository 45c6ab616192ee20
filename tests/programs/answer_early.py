"""Run ``python -m clipcore.train`` with arguments; print as JSON its exit status, and whether it imported torch."""

from __future__ import annotations

import json
import runpy
import sys

if __name__ == "__main__":
    sys.argv = ["clipcore.train", *sys.argv[1:]]
    status: object = None
    try:
        runpy.run_module("clipcore.train", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    print(json.dumps({"status": status, "torch": "torch" in sys.modules}))
