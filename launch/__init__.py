"""How a run gets onto machines: processes on this one, or a job on a SLURM cluster.

    headrace launch local recipes/quickstart.yaml --nproc 4            4 processes here, restarted when they crash
    headrace launch slurm recipes/wonton_6.7b.yaml --nodes 16 --gpus-per-node 8 --dry-run

In: a run's configuration and a number of processes. Out: `headrace train` running in that many processes with RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, and run again when its exit code says that this helps:

    0 done    2 user error, 3 data error: stop    4 recoverable, 5 watchdog, killed by a signal, node lost: run again

A run that fails again and again without a new checkpoint in between is given up. Open `slurm.py` first, then the
template `templates/slurm.sh.j2`: the job script it becomes is meant to be read.
"""
