"""A job's options under submitit's names, and whether this cluster has what they ask for."""

import re
import shutil
import subprocess
from typing import Any

from slurm.errors import LaunchError
from slurm.options import ClusterOptions, sbatch_option


def sbatch_parameters(
    options: ClusterOptions, name: str, nodes: int, tasks_per_node: int, gpus_per_node: int
) -> dict[str, Any]:
    """Return the options of a job by submitit's names for sbatch's."""
    fields = ("partition", "account", "qos", "time", "cpus_per_task", "mem", "constraint", "exclude")
    return {
        **{field: getattr(options, field) for field in fields},
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "gpus_per_node": gpus_per_node or None,
        "signal_delay_s": options.signal_delay,
        # the second: srun passes on what is set here, even where the site's rule is sbatch --export=NONE
        "setup": ["export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}", "export SLURM_EXPORT_ENV=ALL", *options.setup],
        "additional_parameters": {
            "requeue": True,
            **({"reservation": options.reservation} if options.reservation else {}),
            **dict(sbatch_option(text) for text in options.sbatch),
        },
    }


def slurm_prefixed(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that are set, under the names that submitit's AutoExecutor has for them."""
    return {f"slurm_{name}": value for name, value in parameters.items() if value is not None}


def check_cluster(options: ClusterOptions, nodes: int, gpus_per_node: int) -> None:
    """Raise LaunchError if there is no Slurm or no such partition, or if it has too few nodes or GPUs."""
    if not shutil.which("sbatch"):
        raise LaunchError("sbatch: not found on this machine; submit from a Slurm login node, or use --cluster local")
    done = subprocess.run(["sinfo", "--noheader", "--format=%P|%G|%D"], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"sinfo: {done.stderr.strip().splitlines()[-1]}")
    gpus: dict[str, int] = {}  # of its best nodes
    sizes: dict[str, int] = {}  # nodes
    default = None
    for line in done.stdout.splitlines():
        name, resources, number = line.split("|")
        default = name.rstrip("*") if name.endswith("*") else default
        sizes[name.rstrip("*")] = sizes.get(name.rstrip("*"), 0) + int(number)
        counts = re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", resources)
        gpus[name.rstrip("*")] = max(gpus.get(name.rstrip("*"), 0), sum(map(int, counts)))
    for partition in (options.partition or default or "").split(","):
        if partition not in gpus:
            raise LaunchError(f"partition={partition}: not on this cluster; it has {', '.join(sorted(gpus))}")
        if nodes > sizes[partition]:
            raise LaunchError(f"--nodes {nodes}: partition {partition} has {sizes[partition]}; ask for fewer")
        if gpus_per_node > gpus[partition]:
            raise LaunchError(
                f"gpus_per_node={gpus_per_node}: a node of partition {partition} has {gpus[partition]}; ask for"
                " fewer with --slurm gpus_per_node=, or for none with --cpu"
            )
