"""What keeps a run going, and its checkpoints whole.

    manifest.py      checksums in every checkpoint: a torn or changed one is not used
    newest.py        the newest checkpoint that is whole, here or in the second place
    second_place.py  copies of finished checkpoints elsewhere; copies.py and copy_worker.py make them behind the run's
                     back, fetching.py brings them back
    retention.py     which checkpoints stay
    watchdog.py      a run that hangs says where, and ends with exit code 5
    loss_guard.py    a loss that is not finite or jumps: warn, skip the step, or go back and try again
    rollback.py      what a run does about what the guard found
    stragglers.py    the rank that holds the others up
    replicas.py      ranks that should hold the same weights, compared
    fault_points.py  the places at which tests kill a process

Open `loss_guard.py` first. How checkpoints are written: `pretrain/checkpoint.py`, `parallel/background_write.py`.
What each failure looks like to the person at the screen: docs/recovery.md.
"""
