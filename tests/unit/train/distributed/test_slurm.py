"""Ranks and nodes from the environment variables of SLURM."""

from __future__ import annotations

import pytest

from d2i.errors import ClusterError
from d2i.train.distributed.slurm import first_node, torchrun_environment

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[07-09,12],login1",
}


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack-2-gpu[001-128]-ib0,x", "rack-2-gpu001-ib0"),
        ("a.example.org,b.example.org", "a.example.org"),
    ],
)
def test_first_node_is_parsed_from_nodelist(names: str, first: str) -> None:
    assert first_node({"SLURM_JOB_NODELIST": names}) == first


def test_srun_task_becomes_torch_rank() -> None:
    assert torchrun_environment(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24567",
    }


def test_master_address_of_batch_script_is_kept() -> None:
    found = torchrun_environment(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"})
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_step_nodelist_overrides_job_nodelist() -> None:
    assert (
        torchrun_environment(TASK | {"SLURM_STEP_NODELIST": "gpu[08-09]"})["MASTER_ADDR"] == "gpu08"
    )


@pytest.mark.parametrize("names", [TASK | {"RANK": "0"}, {"SLURM_JOB_ID": "1"}, {}])
def test_variables_of_other_launchers_are_not_overridden(names: dict[str, str]) -> None:
    """Batch scripts, shells of an allocation and torchrun under srun set some of these too."""
    assert torchrun_environment(names) == {}


def test_missing_nodelist_raises_cluster_error() -> None:
    with pytest.raises(ClusterError, match="export MASTER_ADDR"):
        torchrun_environment(
            {name: value for name, value in TASK.items() if "NODELIST" not in name}
        )
