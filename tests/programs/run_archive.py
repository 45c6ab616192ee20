"""Run a TorchScript archive where clipcore was never imported: run_archive.py ARCHIVE INPUTS OUTPUTS."""

import json
import sys

import torch

archive, inputs, outputs = sys.argv[1:]
with torch.no_grad():
    torch.save(torch.jit.load(archive)(torch.load(inputs)), outputs)
print(json.dumps({"clipcore": "clipcore" in sys.modules}))
