"""Kill the rank that writes the second shard of the checkpoint of step 12, in the middle of that file.

Used as sitecustomize.py. The environment's KILL_MARK is a file that is made at the kill; where it exists, nobody is killed.
"""

import os
import signal

mark = os.environ["KILL_MARK"]
write = os.write


def write_or_die(descriptor: int, data: bytes) -> int:
    """Write as os.write does, or write nine bytes and die."""
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    is_the_one = "model-00002-of-00002" in path and "step_00000012" in path
    if is_the_one and not os.path.exists(mark):
        open(mark, "w").close()
        write(descriptor, data[:9])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, data)


os.write = write_or_die
