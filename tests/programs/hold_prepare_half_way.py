"""Run clipcore.data.prepare on all arguments but the first, and let its processes wait at the 19th image until it ends them.

The first argument is a folder. A process that waits makes a file there that is named after its id. The main process
makes one for each shard that it has noted as finished, with the shard's name.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from clipcore.data import prepare
from clipcore.data.resample import Picture
from clipcore.data.shards import ImageFormat, ShardReport

NUM_IMAGES, LIMIT_S = 18, 300

folder = Path(sys.argv[1])
context = multiprocessing.get_context("fork")  # as prepare has it: the processes share both
num_begun, is_stopping = context.Value("q", 0), context.Event()
encode, add, shutdown = ImageFormat.encode, prepare.Manifest.add, ProcessPoolExecutor.shutdown


def encode_or_wait(self: ImageFormat, image: Picture) -> bytes:
    with num_begun.get_lock():
        num_begun.value += 1
        number = num_begun.value
    if number > NUM_IMAGES:
        (folder / str(os.getpid())).touch()
        assert is_stopping.wait(LIMIT_S), f"nobody stopped this within {LIMIT_S} s"
    return encode(self, image)


def add_and_tell(self: prepare.Manifest, name: str, report: ShardReport) -> None:
    add(self, name, report)
    (folder / name).touch()


def stop_and_shut_down(self: ProcessPoolExecutor, *arguments: bool, **settings: bool) -> None:
    is_stopping.set()
    shutdown(self, *arguments, **settings)


ImageFormat.encode = encode_or_wait
prepare.Manifest.add = add_and_tell
ProcessPoolExecutor.shutdown = stop_and_shut_down
sys.exit(prepare.main(sys.argv[2:]))
