"""Lock the run in FOLDER, the only argument; print "held", and hold it until a line comes or standard input ends."""

import sys

from clipcore.checkpoint import run_lock

with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
