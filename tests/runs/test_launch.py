"""How real processes find each other: what a cluster's variables say, and what is told where they do not."""

import os
import socket
import subprocess
import sys

import pytest

from domino_jax.run_config import DataConfig, DraftSettings, RunConfig, TargetSource, TrainConfig
from domino_jax.runs.cluster import OPEN_MPI, SLURM
from domino_jax.runs.errors import EXIT_MISTAKE
from tests.runs.many_processes import Processes, ask_cluster, find_free_port, give_address


def make_config(material, output_dir):
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4),
        data=DataConfig(str(material / "train.jsonl"), max_length=48, batch_size=8),
        train=TrainConfig(num_steps=3, log_every=1),
    )


def in_slurm(count, port):
    """Return the variables that `srun` gives to each process of a step on this machine."""
    job_id = port - (65535 - 2**12 + 1)  # from which jax takes the port
    return [
        dict(zip(SLURM, map(str, (job_id, "127.0.0.1,other", count, number, 0)), strict=True))
        for number in range(count)
    ]


def in_open_mpi(count, port):
    """Return the variables of `mpirun`."""
    uri = f"{(port - (65535 - 2**12 + 1)) * 2**12}.0;tcp://127.0.0.1,10.0.0.1:34911"
    return [dict(zip(OPEN_MPI, map(str, (uri, count, number, 0)), strict=True)) for number in range(count)]


def find_cluster_port():
    """Return a free port of those that jax takes for a Slurm or MPI job."""
    for port in range(65535 - 2**12 + 1, 65536):
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def start_together(repository, material, tmp_path, environments, last=(), flags=ask_cluster):
    """Start one training in as many processes as environments, and return their statuses and what they said."""
    run = Processes(
        repository,
        make_config(material, tmp_path / "out"),
        len(environments),
        environments=environments,
        last=last,
        flags=flags,
    )
    try:
        return run.statuses(), run.texts()
    finally:
        run.files.close()


OTHER_SETTINGS = ["--config.optimizer.learning_rate=0.5"]


@pytest.mark.parametrize("cluster", [in_slurm, in_open_mpi])
def test_the_processes_of_a_cluster_meet(repository, material, tmp_path, cluster):
    """They have compared their settings, so they have met: with others the last one stops all before the first step."""
    environments = cluster(2, find_cluster_port())
    statuses, texts = start_together(repository, material, tmp_path, environments, OTHER_SETTINGS)
    assert statuses == [EXIT_MISTAKE] * 2, texts
    assert "2 processes, 2 devices" in texts[0] and "2 processes" not in texts[1]
    assert "error: process 1: process 1 differs from process 0" in texts[0] and "now 0.5" in texts[1]


@pytest.mark.slow
def test_a_training_under_slurm_ends_as_one(repository, material, tmp_path):
    statuses, texts = start_together(repository, material, tmp_path, in_slurm(2, find_cluster_port()))
    assert statuses == [0, 0], texts
    assert "saved step 3" in texts[0] and "saved" not in texts[1]
    assert (tmp_path / "out" / "run" / "draft" / "model.safetensors").exists()


def test_the_flags_come_before_the_clusters_variables(repository, material, tmp_path):
    """A step of two tasks whose processes are told to be two runs of one process each."""
    environments = in_slurm(2, find_cluster_port())[1:]
    statuses, texts = start_together(
        repository, material, tmp_path, environments, ["--config.target.path=/nowhere"], give_address
    )
    assert statuses == [EXIT_MISTAKE] and "1 processes, 1 devices" in texts[0], texts
    assert "/nowhere" in texts[0]


def slow(*values, id):
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


@pytest.mark.parametrize(
    ("environment", "messages"),
    [
        slow({}, ["no TPU slice, Slurm step, Open MPI or Kubernetes job was found. Mend that, or give"], id="none"),
        pytest.param(
            {name: value for name, value in in_slurm(2, 61441)[0].items() if name in SLURM[:3]},
            ["Slurm is there, but SLURM_PROCID, SLURM_LOCALID are not set: start the processes with srun"],
            id="sbatch without srun",
        ),
        slow(in_slurm(2, 61441)[0] | {"SLURM_NTASKS": "two"}, ["invalid literal for int()", "'two'"], id="no number"),
        slow(in_slurm(2, 61441)[0] | {"SLURM_PROCID": "2"}, ["Got process_id=2, num_processes=2"], id="out of range"),
        pytest.param(
            {name: value for name, value in in_open_mpi(2, 61441)[0].items() if name != "OMPI_COMM_WORLD_SIZE"},
            ["'OMPI_COMM_WORLD_SIZE'", "Open MPI is there, but OMPI_COMM_WORLD_SIZE is not set"],
            id="half of MPI",
        ),
        slow(
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"},
            ["Number of processes must be defined", "127.0.0.1:1 with the"],
            id="address alone",
        ),
    ],
)
def test_a_cluster_that_says_too_little_is_one_sentence(repository, material, tmp_path, environment, messages):
    statuses, texts = start_together(repository, material, tmp_path, [environment])
    assert statuses == [EXIT_MISTAKE], texts
    line = texts[0].splitlines()[-1]
    assert line.startswith("error: the cluster does not say which processes belong to this run (--distributed; ")
    assert all(message in line for message in messages), line
    assert line.endswith("port of process 0), --num-processes and its own --process-id")
    assert "Traceback" not in texts[0]


IMPATIENT = """
import sys
from domino_jax.runs import launch
launch._JOIN_TIMEOUT_S = 2
extras = {"distributed": not sys.argv[1], "coordinator": sys.argv[1]}
extras |= {"num-processes": 2 if sys.argv[1] else 0, "process-id": int(sys.argv[2])}
sys.exit(launch.run_processes(extras, None, lambda: print("ran")))
"""


def call_impatient(repository, address, number, environment=None):
    finished = subprocess.run(
        [sys.executable, "-c", IMPATIENT, address, str(number)],
        env=os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == EXIT_MISTAKE and "ran" not in finished.stdout, finished.stderr
    return finished.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_others_do_not_come_says_so(repository, number):
    address = f"127.0.0.1:{find_free_port()}"
    line = call_impatient(repository, address, number)
    assert f"error: process {number} of 2 could not join the others at {address} within 2 s; start all" in line


def test_a_process_of_a_cluster_whose_others_do_not_come_says_so(repository):
    environment = in_slurm(2, find_cluster_port())[1]
    line = call_impatient(repository, "", -1, environment)
    assert "error: this process could not join the others that the cluster names (--distributed) within 2 s" in line


def test_a_port_in_use_is_named(repository):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        line = call_impatient(repository, f"127.0.0.1:{port}", 0)
    assert f"error: process 0 cannot listen at port {port} (" in line and "in use" in line
    assert "port 70000" in call_impatient(repository, "127.0.0.1:70000", 0)
