"""Passes as a chain of SLURM job arrays, each waiting for the one before.

datatrove writes a pass as `executor.pik` and `launch_script.slurm` in its logging folder and submits the script; the
pickle is made and read by datatrove on the user's own file system.
"""

import os
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.utils.logging import logger

from data_scheduler.prep.config import SlurmExecutor
from data_scheduler.prep.plan import Pass
from headrace.errors import ConfigError


class _Job(SlurmPipelineExecutor):
    """Gives each task its own blocks: datatrove's would carry their counts on to the job's next task."""

    pipeline: list[Any]

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        pipeline = self.pipeline
        self.pipeline = deepcopy(pipeline)
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            self.pipeline = pipeline


def submit_passes(passes: list[Pass], executor: SlurmExecutor) -> None:
    """Submit the passes' unfinished tasks. Raises ConfigError when there is no sbatch, or it refuses a job."""
    if shutil.which("sbatch") is None:
        raise ConfigError("executor: there is no sbatch on this machine; start this where jobs are submitted")
    logger.remove()
    job: _Job | None = None
    for one in passes:
        job = _Job(
            one.pipeline,
            one.tasks,
            executor.time,
            executor.partition,
            cpus_per_task=executor.cpus_per_task,
            mem_per_cpu_gb=executor.mem_per_cpu_gb,
            workers=executor.workers or -1,
            job_name=f"prep-{one.name}",
            qos=executor.qos,
            # The nodes find this environment's programs; datatrove starts its own by name.
            env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH",
            sbatch_args=executor.sbatch_args,
            depends=job,
            logging_dir=one.logs,
            tasks_per_job=executor.tasks_per_job,
        )
    assert job is not None
    try:
        job.run()
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"sbatch refused a job with exit code {error.returncode}; its message is above") from None
