"""The processes of a run: how they meet, how they miss one that is lost, and how each of them ends.

==================  ================================================================
``distributed.py``  the ranks, and the collectives that training needs
``watchdog.py``     where each rank is, so that those left waiting can say for whom
``signals.py``      Ctrl-C, SIGTERM and their like, and a wait for data after one
``failures.py``     one line and an exit status for a command that cannot go on
==================  ================================================================
"""
