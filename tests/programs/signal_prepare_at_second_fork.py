"""Run clipcore.data.prepare on all arguments but the first, a signal's number that it gets within its second fork."""

import itertools
import os
import sys

from clipcore.data import prepare

forks = itertools.count()
os.register_at_fork(before=lambda: next(forks) == 1 and os.kill(os.getpid(), int(sys.argv[1])))
sys.exit(prepare.main(sys.argv[2:]))
