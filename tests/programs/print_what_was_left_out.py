"""Print what the installed clipcore was built without."""

from clipcore import native

print(native.left_out())
