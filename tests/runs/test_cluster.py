"""Clusters that the environment names in part; what jax itself takes for a whole one is asked of jax."""

import pytest
from jax._src.clusters import SlurmCluster
from jax._src.clusters.ompi_cluster import OmpiCluster

from domino_jax.runs.cluster import GKE_TPU, OPEN_MPI, SLURM, find_gaps

VALUES = {
    **dict(zip(SLURM, ("8800", "node[003-004],other", "2", "1", "0"), strict=True)),
    **dict(zip(OPEN_MPI, ("1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "4", "3", "1"), strict=True)),
    **dict(zip(GKE_TPU, ("a,b", "1"), strict=True)),
}


def without(names, *absent):
    return {name: VALUES[name] for name in names if name not in absent}


@pytest.fixture
def environment(monkeypatch):
    """Have no variable of any cluster but those given."""

    def use(values):
        for name in VALUES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return values

    return use


def test_nothing_is_missing_where_nothing_or_all_is_there():
    assert find_gaps({}) == find_gaps({"PATH": "/bin"}) == find_gaps(VALUES) == []


@pytest.mark.parametrize("absent", SLURM)
def test_a_slurm_step_without_a_variable_is_named_where_jax_passes_it_over(environment, absent):
    environment(without(SLURM))
    assert SlurmCluster.is_env_present()
    (gap,) = find_gaps(environment(without(SLURM, absent)))
    assert not SlurmCluster.is_env_present()
    assert gap == f"Slurm is there, but {absent} is not set: start the processes with srun, which sets them all"


def test_what_slurm_says_is_what_jax_takes(environment):
    environment(without(SLURM))
    assert SlurmCluster.get_coordinator_address(None, None) == "node003:62048"
    assert SlurmCluster.get_coordinator_address(None, "29500") == "node003:29500"
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (2, 1)


@pytest.mark.parametrize("absent", OPEN_MPI[1:])
def test_an_mpi_job_without_a_variable_is_named_where_jax_fails(environment, absent):
    environment(without(OPEN_MPI))
    read = {
        "OMPI_COMM_WORLD_SIZE": OmpiCluster.get_process_count,
        "OMPI_COMM_WORLD_RANK": OmpiCluster.get_process_id,
        "OMPI_COMM_WORLD_LOCAL_RANK": OmpiCluster.get_local_process_id,
    }[absent]
    assert read() in (4, 3, 1)
    (gap,) = find_gaps(environment(without(OPEN_MPI, absent)))
    assert f"Open MPI is there, but {absent} is not set: start the processes with mpirun" in gap
    with pytest.raises(KeyError):
        read()


def test_several_missing_variables_are_named_together():
    (gap,) = find_gaps({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})
    assert "SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_LOCALID are not set" in gap
    (gap,) = find_gaps(without(GKE_TPU, "TPU_WORKER_ID") | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert "a TPU slice in GKE is there, but TPU_WORKER_ID is not set" in gap


def test_kubernetes_needs_its_package_and_numbered_pods():
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert "pip install kubernetes" in find_gaps(pod, lambda name: None)[0]
    assert "completionMode: Indexed" in find_gaps(pod, lambda name: name)[0]
    assert find_gaps(pod | {"JOB_COMPLETION_INDEX": "0"}, lambda name: name) == []


def test_an_address_alone_is_not_enough():
    (gap,) = find_gaps({"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476"})
    assert "without the number of processes: give --coordinator=10.0.0.2:8476 with the other two flags" in gap
