"""The ranks of a SLURM step, in the words of torch's launchers.

`srun` numbers its tasks and names its nodes; torch asks for rank, world and the first rank's
address. What is set already is left alone, so that a batch script may choose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from d2i.errors import ClusterError

_NUMBERS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_FIRST = re.compile(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^\[,]*))?")
# Jobs that share a node must not meet: a port of the job's own (ours).
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


def torch_names(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch asks for and that this task of `srun` lacks.

    Args:
        environment: The process's own.

    Returns:
        Nothing where another launcher has numbered the ranks, or where this is no task of `srun`.

    Raises:
        ClusterError: If SLURM does not say where the first rank is.
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
        "export MASTER_ADDR, the first node's name"
    )
