"""Attacks on what must not be lost: cases by the thousand, each of which ends well or is a finding.

``python -m tests.attack`` tries all of them, in some twenty minutes; the suite tries a part (tests/test_attack.py).
"""
