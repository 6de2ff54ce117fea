"""Torch's rank variables for the tasks of a SLURM step.

`srun` numbers its tasks and names its nodes; torch needs the rank, the world size and the first
rank's host and port. Variables that are already set stay, so that a batch script may choose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from d2i.errors import ClusterError

_NUMBERS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_FIRST = re.compile(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^\[,]*))?")
# Jobs that share a node must not use the same port: it depends on the job id (our default range).
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


def torchrun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch needs and that this task of `srun` lacks.

    Args:
        environment: The variables of this process.

    Returns:
        Empty if another launcher has numbered the ranks, or outside of `srun`.

    Raises:
        ClusterError: If SLURM does not name the host of the first rank.
    """
    if "RANK" in environment or not {*_NUMBERS.values()} <= {*environment}:
        return {}
    wanted = {name: environment[theirs] for name, theirs in _NUMBERS.items()}
    if "MASTER_ADDR" not in environment:
        wanted["MASTER_ADDR"] = first_node(environment)
    if "MASTER_PORT" not in environment:
        job = int(environment.get("SLURM_JOB_ID", "0"))
        wanted["MASTER_PORT"] = str(_FIRST_PORT + job % _NUM_PORTS)
    return wanted


def first_node(environment: Mapping[str, str]) -> str:
    """Return the first host of SLURM's list, such as `gpu07` of `gpu[07-09,12],login1`.

    Raises:
        ClusterError: If there is no list.
    """
    for name in _LISTS:
        if found := _FIRST.match(environment.get(name, "")):
            return "".join(part for part in found.groups() if part)
    raise ClusterError(
        f"SLURM names no node: {_LISTS[0]} is not set; expected it in every task of srun; "
        "export MASTER_ADDR=HOST, the first node's name"
    )
