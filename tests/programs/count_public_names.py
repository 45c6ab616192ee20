"""Import clipcore, check that torch is not imported with it, and print the number of its public names; no arguments."""

import sys

import clipcore

assert "torch" not in sys.modules
print(len(clipcore.__all__))
