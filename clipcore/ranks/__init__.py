"""The processes of a run: how they start, how they notice a lost one, and how each of them ends.

==================  ================================================================
``distributed.py``  the ranks, and the collectives that training needs
``slurm.py``        the place of a process that Slurm started
``watchdog.py``     the ranks' positions, so that an error can name the lost rank
``signals.py``      Ctrl-C, SIGTERM and similar, and a wait for data after one
``failures.py``     one line and an exit status for a command that fails
==================  ================================================================
"""
