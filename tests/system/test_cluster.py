"""The scripts in tpu_gpu_scripts/ under real launchers on this machine: Slurm, Open MPI and OpenSSH, with two processes
of four simulated devices each. Only gcloud has a stand-in. Missing tools are installed with apt-get, as root.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpar import ConfigError, load_config
from jaxpar.run import rendezvous, runtime
from jaxpar.run.member import Outcome

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_gpu_scripts"
QUICKSTART = ROOT / "configs/quickstart.yaml"
STEPS = 40
RUN = [
    QUICKSTART,
    f"runner.max_steps={STEPS}",
    "runner.seq_length=32",
    "actor.model.hidden_size=32",
    "actor.model.intermediate_size=48",
    "actor.model.num_hidden_layers=2",
    "actor.model.pipeline_model_parallel_size=1",
    "actor.model.tensor_model_parallel_size=1",
    "actor.model.sequence_parallel=False",
    "actor.model.context_parallel_size=1",
    "cluster.num_gpus_per_node=8",
]
PACKAGES = {
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "mpirun": "openmpi-bin",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "shellcheck": "shellcheck",
}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """Returns a function that skips the test if a tool is missing and could not be installed."""
    why = "install it"
    if packages := [package for tool, package in PACKAGES.items() if not shutil.which(tool, path=PATH)]:
        if os.geteuid() == 0 and shutil.which("apt-get"):
            quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
            subprocess.run(["apt-get", "update"], **quiet)
            apt = subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *packages], **quiet)
            why = f"apt-get install: {(apt.stderr.strip() or 'done').splitlines()[-1]}"
        else:
            why = f"not root with apt-get, so not installed: {' '.join(packages)}"

    def check(*tools: str) -> None:
        if missing := [tool for tool in tools if not shutil.which(tool, path=PATH)]:
            pytest.skip(f"{' and '.join(missing)} not found ({why})")

    return check


def environment(**more: str | Path) -> dict[str, str]:
    """This process's environment without the variables of launchers, so that a process knows of no others."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_C", "JAX_NUM", "JAX_PROC", "JAXPAR_S", "SLURM", "OMPI"))
    }
    return {**kept, "PATH": PATH, "JAXPAR_ENV": sys.prefix, "JAXPAR_START_TIMEOUT": "60", **more}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def rows(folder: Path) -> list[dict]:
    path = folder / "quickstart/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def assert_whole(folder: Path, expected: list[float]) -> None:
    """Checks that every step occurs once, as if nothing had interrupted the run."""
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in rows(folder)], expected, rtol=0, atol=1e-5)


def assert_secret_is_kept(folder: Path) -> None:
    """The processes of the run have the secret that their script has drawn; it stands on no command line."""
    own, lines = [], []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            lines.append((process / "cmdline").read_bytes())
            if (
                b"train" in lines[-1].split(b"\0")
                and b"python" in lines[-1].split(b"\0")[0]
                and os.fsencode(folder) in lines[-1]
            ):
                own.append(dict(one.partition(b"=")[::2] for one in (process / "environ").read_bytes().split(b"\0")))
    (secret,) = {variables[b"JAXPAR_SECRET"] for variables in own}
    assert {one.get(b"JAX_PROCESS_ID", one.get(b"SLURM_PROCID")) for one in own} == {b"0", b"1"}
    assert re.fullmatch(rb"[0-9a-f]{64}", secret)
    assert not any(secret in line for line in lines)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    """The losses of the same command without a script: one process that is never interrupted."""
    folder = tmp_path_factory.mktemp("direct")
    command = [Path(sys.prefix) / "bin/jaxpar", "train", *RUN, f"runner.output_dir={folder}"]
    subprocess.run(command, env=environment(), check=True, timeout=180)
    return [row["loss"] for row in rows(folder)]


# --- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(need, tmp_path) -> Iterator[Callable[..., str]]:
    """Starts Slurm on this host, with 8 GPUs that are /dev/null, and gives a function that runs its commands."""
    need("sbatch", "munged")
    if os.geteuid():
        pytest.skip("slurmctld, slurmd and munged are started as root")
    host, conf = socket.gethostname().split(".")[0], tmp_path / "slurm.conf"
    for folder in ("state", "spool"):
        (tmp_path / folder).mkdir()
    for index in range(8):
        os.mknod(tmp_path / f"gpu{index}", 0o020666, os.makedev(1, 3))
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    (tmp_path / "gres.conf").write_text(f"Name=gpu File={tmp_path}/gpu[0-7]\n")
    # A requeued job starts after cred_expire (5 s is the minimum). The intervals make it start then without delay.
    conf.write_text(f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmUser=root
        SlurmctldPort={free_port()}
        SlurmdPort={free_port()}
        AuthType=auth/munge
        CredType=cred/munge
        AuthInfo=socket={tmp_path}/munge.socket,cred_expire=5
        StateSaveLocation={tmp_path}/state
        SlurmdSpoolDir={tmp_path}/spool
        SlurmctldPidFile={tmp_path}/slurmctld.pid
        SlurmdPidFile={tmp_path}/slurmd.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        SchedulerParameters=bf_interval=1,sched_interval=2
        MpiDefault=none
        ReturnToService=2
        KillWait=60
        GresTypes=gpu
        NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} Gres=gpu:8 State=UNKNOWN
        PartitionName=all Nodes=ALL Default=YES State=UP
    """)
    variables = environment(SLURM_CONF=conf)

    def command(*words: object) -> str:
        result = subprocess.run([*map(str, words)], env=variables, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout

    munge = [f"--{name}={tmp_path}/munge.{name[:4]}" for name in ("pid-file", "seed-file", "log-file")]
    munge += [f"--key-file={key}", f"--socket={tmp_path}/munge.socket"]
    daemons = []
    try:
        for words in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            output = (tmp_path / f"{words[0]}.log").open("w")
            daemons.append(subprocess.Popen(words, env=variables, stdout=output, stderr=output, start_new_session=True))
            if words[0] == "munged":
                until((tmp_path / "munge.socket").exists, (tmp_path / "munged.log").read_text, 10)
        logs = lambda: "".join(path.read_text() for path in tmp_path.glob("slurm*.log"))  # noqa: E731
        sinfo = ["sinfo", "--noheader", "--format=%T"]
        until(lambda: subprocess.run(sinfo, env=variables, capture_output=True).stdout == b"idle\n", logs, 30)
        yield command
        if command("squeue", "--noheader"):
            command("scancel", "--user=root")
            until(lambda: not command("squeue", "--noheader"), logs, 90)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.mark.slow
@pytest.mark.alone
def test_a_slurm_job_goes_on_after_the_end_of_its_time_and_after_a_preemption(slurm, expected, tmp_path):
    log, folder = tmp_path / "job.log", tmp_path / "results"
    job = slurm(
        *["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={log}"],
        *[SCRIPTS / "slurm.sbatch", *RUN, f"runner.output_dir={folder}"],
    ).strip()
    text = lambda: log.read_text() if log.exists() else slurm("scontrol", "show", "job", job)  # noqa: E731
    until(lambda: len(rows(folder)) >= 5, text)
    assert_secret_is_kept(folder)
    slurm("scancel", "--signal=USR1", job)  # what Slurm does with --signal=USR1@600
    until(lambda: "start 2 of job" in text(), text)
    first = rows(folder)[-1]["step"]
    assert f"saved and stopped after step {first} of {STEPS}" in text()
    until(lambda: len(rows(folder)) >= first + 5, text)
    slurm("scontrol", "requeue", job)  # what a preemption does
    until(lambda: "start 3 of job" in text(), text)
    second = rows(folder)[-1]["step"]
    assert f"saved and stopped after step {second} of {STEPS}" in text()
    until(lambda: f"done: step {STEPS}" in text(), text)
    until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), text, 30)
    assert "Restarts=2" in slurm("scontrol", "show", "job", job)
    assert re.findall(r"resumed from .*global_step_(\d+)", text()) == [str(first), str(second)]
    assert f"watch: tail -F {log};" in text()
    assert "dp 8  pp 1  tp 1  sp 1  cp 1  = 8 devices" in text()
    assert_whole(folder, expected)


# --- Open MPI and ssh -------------------------------------------------------------------------------------------------


def stop_and_go_on(script: Path, folder: Path, variables: dict[str, str], arguments: list, code: int) -> str:
    """Starts a script, stops it with SIGTERM and starts it again. Returns the first output and all logs."""
    os.symlink(ROOT / "configs", folder / "configs")
    words = [script, *arguments, f"runner.output_dir={folder / 'results'}"]
    with (folder / "output").open("w") as output:
        first = subprocess.Popen(words, cwd=folder, env=variables, stdout=output, stderr=output)
    text = lambda: "".join(path.read_text() for path in [folder / "output", *folder.glob("jaxpar-*/*.log")])  # noqa: E731
    try:
        until(lambda: len(rows(folder / "results")) >= 5 or first.poll() is not None, text)
        assert_secret_is_kept(folder / "results")
    finally:
        first.send_signal(signal.SIGTERM)
        status = first.wait(60)
    assert status == code, text()
    done = rows(folder / "results")[-1]["step"]
    assert f"saved and stopped after step {done} of {STEPS}" in (folder / "output").read_text()
    second = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=180)
    assert second.returncode == 0, text()
    assert f"resumed from {folder}/results/quickstart/checkpoints/global_step_{done}" in text()
    return text()


@pytest.mark.slow
@pytest.mark.alone
def test_mpi(need, expected, tmp_path):
    need("mpirun")
    variables = environment(JAXPAR_HOSTS="localhost", JAXPAR_PER_NODE="2", JAXPAR_PORT=str(free_port()))
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    variables |= {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    stop_and_go_on(SCRIPTS / "mpi.sh", tmp_path, variables, RUN, 128 + signal.SIGUSR1)
    assert_whole(tmp_path / "results", expected)


@pytest.fixture
def sshd(need, tmp_path) -> Iterator[str]:
    """Starts an ssh server that accepts this user with a temporary key. Gives the ssh command that connects to it."""
    need("ssh", "sshd")
    server, port = shutil.which("sshd", path=PATH), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", tmp_path / name], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = [
        *["Port=" + str(port), "ListenAddress=127.0.0.1", f"HostKey={tmp_path}/host", "PidFile=none", "UsePAM=no"],
        *[f"AuthorizedKeysFile={tmp_path}/user.pub", "StrictModes=no", "PermitRootLogin=yes"],
    ]
    words = [server, "-D", "-e", "-f", "/dev/null", *[f"-o{option}" for option in options]]
    with (tmp_path / "sshd.log").open("w") as log:
        process = subprocess.Popen(words, stderr=log)
    client = f"ssh -F none -p {port} -i {tmp_path}/user -o BatchMode=yes -o StrictHostKeyChecking=no"
    client += " -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    try:
        reach = [*client.split(), "localhost", "true"]
        until(lambda: subprocess.run(reach, capture_output=True).returncode == 0, (tmp_path / "sshd.log").read_text, 10)
        yield client
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.slow
@pytest.mark.alone
def test_ssh(sshd, expected, tmp_path):
    variables = environment(JAXPAR_HOSTS="localhost 127.0.0.1", JAXPAR_PORT=str(free_port()), JAXPAR_SSH=sshd)
    arguments = [*RUN, "cluster.num_gpus_per_node=4"]  # on each of two nodes
    stop_and_go_on(SCRIPTS / "ssh.sh", tmp_path, variables, arguments, 128 + signal.SIGTERM)
    assert_whole(tmp_path / "results", expected)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_tpu_pod_with_a_stand_in_for_gcloud(tmp_path):
    for name, script in {
        "bin/gcloud": 'printf "%s\\n" "$@" >gcloud.txt; for last; do :; done; exec bash -c "${last#--command=}"',
        "jaxpar/.venv/bin/jaxpar": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(PATH=f"{tmp_path}/bin:{PATH}", JAXPAR_ENV=".venv", JAXPAR_TPU="pod", JAXPAR_NODES="4")
    words = [SCRIPTS / "tpu_pod.sh", "my.yaml", "data.train_data_paths=['a b']"]
    result = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    asked = (tmp_path / "gcloud.txt").read_text().splitlines()
    assert asked[:7] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-central1-a", "--worker=all"]
    log = tmp_path / "jaxpar/jaxpar.log"
    until(lambda: log.exists() and log.read_text().count("\n") == 5, log.read_text, 10)
    assert log.read_text().splitlines() == [
        *["train", "my.yaml", "cluster.num_nodes=4", "runner.resume_dir=auto", "data.train_data_paths=['a b']"],
    ]
    assert (tmp_path / "jaxpar/jaxpar.pid").read_text().strip().isdecimal()
    assert "watch: gcloud compute tpus tpu-vm ssh pod" in result.stdout


def test_shellcheck(need):
    need("shellcheck")
    result = subprocess.run(["shellcheck", *SCRIPTS.glob("*.s*")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_says_so(process, tmp_path):
    address = f"localhost:{free_port()}"
    variables = environment(
        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="3", JAX_PROCESS_ID=str(process), JAXPAR_START_TIMEOUT="3"
    )
    words = [Path(sys.prefix) / "bin/jaxpar", "train", *RUN, f"runner.output_dir={tmp_path}"]
    result = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    expected = {
        0: f"error: process 0 of 3 waited 3 s at {address}, but 2 did not connect: 1, 2. Check ",
        1: f"error: process 1 of 3 waited 3 s for the coordinator, process 0 at {address}: Connection refused. Check ",
    }
    # If XLA's CUDA plugin is installed, it reports on standard error that it found no driver.
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(expected[process])
    assert "JAXPAR_START_TIMEOUT" in error
    assert "Traceback" not in result.stderr


ONE_STEP = {
    **{"SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    **{"SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"},
}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
MPIRUN = {
    **{"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "16"},
    **{"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
}


@pytest.mark.parametrize(
    ("variables", "place", "local_devices"),
    [
        (VARIABLES, ("node0:1234", 2, 1), []),  # all
        (VARIABLES | {"JAX_LOCAL_DEVICE_IDS": "1"}, ("node0:1234", 2, 1), None),  # jax chooses
        (ONE_STEP, ("node03:61444", 2, 1), []),
        (ONE_STEP | {"SLURM_STEP_NUM_NODES": "1"}, ("node03:61444", 2, 1), None),
        (ONE_STEP | {"JAX_COORDINATOR_PORT": "5"}, ("node03:5", 2, 1), []),
        (ONE_STEP | {"JAX_COORDINATOR_ADDRESS": "node03-ib:5"}, ("node03-ib:5", 2, 1), []),
        (ONE_STEP | MPIRUN, ("10.0.0.1:61441", 16, 9), None),
        (ONE_STEP | VARIABLES, ("node0:1234", 2, 1), []),
    ],
)
def test_where_a_process_stands(monkeypatch, variables, place, local_devices):
    called = []
    monkeypatch.setattr(os, "environ", environment(**variables))
    monkeypatch.setattr(rendezvous, "meet", lambda member, *_: Outcome("met", member.num_processes, member.process_id))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: called.append(arguments))
    assert rendezvous.join() == place[1]
    assert called == [(*place, local_devices)]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        ONE_STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {k: v for k, v in ONE_STEP.items() if "STEP" not in k},  # the job's script itself
        VARIABLES | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_process_that_is_alone_joins_nothing(monkeypatch, variables):
    monkeypatch.setattr(os, "environ", environment(**variables))
    monkeypatch.setattr(jax.distributed, "initialize", None)
    assert rendezvous.join() == 1


class Stranger(socketserver.TCPServer):
    """Another program on the coordinator's port."""

    def finish_request(self, request, _address):
        request.recv(100)
        request.sendall(b"HTTP/1.0 400 \xff\r\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "node0"}, "node0 is not host:port"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2, but JAX_NUM_PROCESSES is 2"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: 'two' is not a whole number"),
        ({"JAXPAR_START_TIMEOUT": "5m"}, "JAXPAR_START_TIMEOUT: '5m' is not a whole number"),
        ({"JAX_PROCESS_ID": None, "JAX_NUM_PROCESSES": None}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID not set"),
        ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "localhost:{taken}"}, "Address already in use"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:{taken}"}, "the program that listens there is not jaxpar"),
    ],
)
def test_a_mistake_in_the_variables_is_one_clear_error(monkeypatch, change, words):
    with Stranger(("localhost", 0), None) as stranger:
        threading.Thread(target=stranger.serve_forever, args=[0.05]).start()
        given = {**VARIABLES, "JAXPAR_START_TIMEOUT": "1", **change}
        taken = str(stranger.server_address[1])
        given = {k: v.replace("{taken}", taken) for k, v in given.items() if v is not None}
        monkeypatch.setattr(os, "environ", environment(**given))
        try:
            with pytest.raises(ConfigError) as caught:
                runtime.start(load_config(QUICKSTART))
        finally:
            stranger.shutdown()
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1
