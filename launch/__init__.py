"""How a run gets onto machines, and stays there: processes on this one, over ssh, on SLURM, on Kubernetes.

    headrace launch local recipes/quickstart.yaml --nproc 4            4 processes here, restarted when they crash
    headrace launch slurm recipes/wonton_6.7b.yaml --nodes 16 --gpus-per-node 8 --dry-run
    headrace launch status runs/mill                                   what became of it

In: a run's configuration and a number of processes. Out: `headrace train` running in that many processes with RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, and run again when its exit code says that this helps:

    0 done    2 user error, 3 data error: stop    4 recoverable, 5 watchdog, a signal, a lost node: run again

A run that fails again and again, without a new checkpoint or after the very same step, is given up. That rule is in
`attempts.py`, one for all launchers; open it first. Then the template `templates/slurm.sh.j2`: the job script that it
becomes is meant to be read. On nodes it calls `in_job.py` for decisions, and `node_check.py` on every one of them.
"""
