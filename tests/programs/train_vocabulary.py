"""Train a tokenizer of SIZE ids, the only argument, on a JSON list of captions from standard input; print its digest."""

import json
import sys

from clipcore.tokenizer import train_tokenizer

print(train_tokenizer(json.load(sys.stdin), int(sys.argv[1])).sha256)
