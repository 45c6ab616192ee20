"""Print torch's settings of precision as a user left them, after an import and a model, and after a run: JSON lines."""

from __future__ import annotations

import json
import sys

import torch

PRODUCTS = torch.backends.cuda.matmul


def print_settings() -> None:
    found: dict[str, object] = {
        "bf16 sums": PRODUCTS.allow_bf16_reduced_precision_reduction,
        "fp16 sums": PRODUCTS.allow_fp16_reduced_precision_reduction,
        "fp16 accumulation": PRODUCTS.allow_fp16_accumulation,
    }
    found["matmul"] = torch.get_float32_matmul_precision()
    found["cudnn"] = torch.backends.cudnn.allow_tf32
    found["convolutions"] = torch.backends.cudnn.conv.fp32_precision
    found["products"] = PRODUCTS.fp32_precision
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    print(json.dumps(found), flush=True)


# Everything that loses precision is allowed.
PRODUCTS.allow_fp16_accumulation = True
torch.set_float32_matmul_precision("high")
print_settings()

import clipcore  # noqa: E402
import clipcore.evaluate  # noqa: E402
import clipcore.train  # noqa: E402

model = clipcore.create_model("RN-nano-32")
model.encode_image(torch.zeros(2, 3, 32, 32))
print_settings()

status = clipcore.train.main(sys.argv[1:])
print_settings()
sys.exit(status)
