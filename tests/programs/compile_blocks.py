"""Compile a small model's blocks with Inductor, run forward and backward, and print what came out of which cache as JSON.

Arguments: a number of pairs for the pass that compiles. The digest is that of a second pass, over five pairs in any case.
"""

import hashlib
import json
import sys

import torch
from torch._dynamo.utils import counters

from clipcore.run.compiled import compile_blocks
from clipcore.run.setup import make_deterministic
from clipcore.towers.factory import create_model

make_deterministic()  # as a run does: the settings are in the key of the cache
torch.manual_seed(0)
model = create_model("ViT-nano-8-32", force_vocab_size=514).train()
halves = compile_blocks(model)


def results(num_pairs: int) -> list[torch.Tensor]:
    """Return features and gradients."""
    torch.manual_seed(num_pairs)
    images = torch.randn(num_pairs, 3, 32, 32)
    tokens = torch.randint(1, 512, (num_pairs, 4 + num_pairs))
    tokens[:, -1] = 513
    model.zero_grad()
    image_BE, text_BE, scale = model(images, tokens)
    (scale * image_BE @ text_BE.T).diag().sum().backward()
    gradients = (parameter.grad for parameter in model.parameters())
    return [image_BE.detach(), text_BE.detach(), *(g for g in gradients if g is not None)]


results(int(sys.argv[1]))
digest = hashlib.sha256()
for tensor in results(5):
    digest.update(tensor.numpy().tobytes())
with torch.no_grad():
    torch.manual_seed(5)
    once_more = model.encode_image(torch.randn(5, 3, 32, 32), normalize=True)
report = {
    "graphs": halves.num_graphs,
    "digest": digest.hexdigest(),
    "is_replay_equal": torch.equal(once_more, results(5)[0]),
    **{key: counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss", "bypass")},
    **{
        f"autograd_{key}": counters["aot_autograd"][f"autograd_cache_{key}"]
        for key in ("hit", "miss", "bypass")
    },
}
print(json.dumps(report))
