"""What the environment says of the cluster that a process was started in, where it does not say enough.

In: environment variables. Out: a sentence for each cluster that is there in part, and what to do. jax finds the
processes of a run from the same variables; it passes over a cluster of which one is missing, or fails with its name
alone. Reads nothing else and joins nothing.

Source: jax's `ClusterEnv` classes and `jax.distributed.initialize`, which reads `JAX_COORDINATOR_ADDRESS`.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = (
    "OMPI_MCA_orte_hnp_uri",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
)
GKE_TPU = ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
_KNOWN = (
    ("Slurm", SLURM, "start the processes with srun, which sets them all"),
    ("Open MPI", OPEN_MPI, "start the processes with mpirun; from Open MPI 5 on give the three flags instead"),
    ("a TPU slice in GKE", GKE_TPU, "ask for google.com/tpu in the pod, which sets both"),
)
_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_KUBERNETES, _KUBERNETES_NUMBER = "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"


def find_gaps(environment: Mapping[str, str], has_package: Callable[[str], object] = find_spec) -> list[str]:
    """Return what is missing of every cluster that `environment` names in part, and of a coordinator that it names.

    Kubernetes counts where no TPU slice is named: it needs the package `kubernetes` (`has_package`) and a job whose
    pods are numbered.
    """
    gaps = []
    for name, needed, advice in _KNOWN:
        absent = [variable for variable in needed if variable not in environment]
        if absent and len(absent) < len(needed):
            gaps.append(f"{name} is there, but {', '.join(absent)} {'are' if absent[1:] else 'is'} not set: {advice}")
    if _KUBERNETES in environment and not any(variable in environment for variable in GKE_TPU):
        if not has_package("kubernetes"):
            gaps.append("Kubernetes is there, but not the package that asks it: pip install kubernetes")
        elif _KUBERNETES_NUMBER not in environment:
            gaps.append(
                f"Kubernetes is there, but {_KUBERNETES_NUMBER} is not set: give the job completionMode: Indexed"
            )
    if _COORDINATOR in environment:
        gaps.append(
            f"{_COORDINATOR} is {environment[_COORDINATOR]!r}, without the number of processes: give "
            f"--coordinator={environment[_COORDINATOR]} with the other two flags"
        )
    return gaps
