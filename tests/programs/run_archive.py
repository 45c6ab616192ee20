"""Run TorchScript archives where clipcore was never imported: run_archive.py FOLDER...

A folder holds model.pt and inputs.pt, and is given outputs.pt.
"""

import json
import sys
from pathlib import Path

import torch

with torch.no_grad():
    for folder in map(Path, sys.argv[1:]):
        traced, inputs = torch.jit.load(folder / "model.pt"), torch.load(folder / "inputs.pt")
        torch.save(traced(inputs), folder / "outputs.pt")
print(json.dumps({"clipcore": "clipcore" in sys.modules}))
