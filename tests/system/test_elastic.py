"""Runs whose nodes come and go: `jaxpar train --elastic`, and the JobSet that uses it."""

import re
import signal
import subprocess
import time
from pathlib import Path

import kubernetes_validate
import numpy as np
import pytest
import yaml
from runs import QUICKSTART, ROOT, SMALL, losses, metrics, start_ranks, train_command

from jaxpar import ConfigError, load_config
from jaxpar.config import elastic
from jaxpar.run import runtime
from jaxpar.run.member import NotEnough

STEPS = 12
# Two nodes of four devices: tensor parallelism 2, dp 4. On one node dp is 2; on three it would be 6, which does not divide 16.
RUN = [
    *SMALL,
    "runner.max_steps=12",
    "runner.save_interval=4",
    "cluster.num_nodes=2",
    "cluster.num_gpus_per_node=4",
    "actor.global_batch_size=16",
    "actor.micro_batch_size=2",
    "actor.model.tensor_model_parallel_size=2",
    "actor.model.pipeline_model_parallel_size=1",
    "actor.model.context_parallel_size=1",
    "actor.model.sequence_parallel=False",
]


def config(*changes):
    return load_config(QUICKSTART, [*RUN, *changes])


@pytest.mark.parametrize(
    "changes, nodes, line",
    [
        ([], 2, "elastic: 2 of 2 nodes, dp 4; global_batch_size stays 16"),
        ([], 1, "elastic: 1 of 2 nodes, dp 2; global_batch_size stays 16"),
        (["actor.micro_batch_size=4"], 4, "elastic: 4 of 4 nodes, dp 8, micro_batch_size 4 → 2; global_batch_size stays 16"),
        (["actor.micro_batch_size=6", "actor.global_batch_size=18", "cluster.num_nodes=3"], 3,
         "elastic: 3 of 3 nodes, dp 6, micro_batch_size 6 → 3; global_batch_size stays 18"),
    ],
)  # fmt: skip
def test_dp_follows_the_nodes(changes, nodes, line):
    old = config(*changes)
    assert elastic.changes(old, elastic.for_nodes(old, nodes), nodes) == line


def test_nodes_without_a_layout_are_left_out():
    assert elastic.usable_nodes(config(), 3, 1) == 2
    with pytest.raises(ConfigError, match=r"on 3 of the nodes: actor.global_batch_size: 16 .* dp = 1 \* 6 = 6"):
        elastic.usable_nodes(config(), 3, 3)
    with pytest.raises(ConfigError, match=r"on 1 of the nodes: .* = 8 does not divide 4 devices"):
        elastic.usable_nodes(config("actor.model.pipeline_model_parallel_size=4"), 1, 1)
    with pytest.raises(ConfigError, match="--elastic 2: only 1 of the nodes"):
        elastic.usable_nodes(config(), 1, 2)


@pytest.fixture
def alone(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_number_of_nodes_without_a_layout_is_no_mistake_if_fewer_have_one(alone):
    """As under Slurm, whose script says how many it was given: three nodes have no layout, one has."""
    fitted, line = runtime.start_elastic(config("cluster.num_nodes=3"), 1)
    assert fitted.cluster.num_nodes == 1 and line == "elastic: 1 of 3 nodes, dp 2; global_batch_size stays 16"
    with pytest.raises(NotEnough, match="--elastic 2: only 1 of the nodes are there"):
        runtime.start_elastic(config(), 2)


def test_a_model_for_which_no_number_of_nodes_is_enough_is_a_mistake(alone):
    with pytest.raises(ConfigError, match=r"on 2 of the nodes: .* 2 \* 3 \* 1 = 6 does not divide 8 devices") as caught:
        runtime.start_elastic(
            config("actor.model.pipeline_model_parallel_size=3", "actor.model.num_hidden_layers=6"), 1
        )
    assert not isinstance(caught.value, NotEnough)


def output(process, timeout=240):
    return process.communicate(timeout=timeout)[0]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (folder / "quickstart/metrics.jsonl").exists() and len(losses(folder)) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_the_node_that_is_left(tmp_path):
    undisturbed = start_ranks([train_command(tmp_path / "undisturbed", *RUN)] * 2)
    assert [output(process) and process.returncode for process in undisturbed] == [0, 0]
    command = [*train_command(tmp_path, *RUN), "--elastic", "1"]

    ranks = start_ranks([command] * 2)
    wait_for_step(ranks[0], tmp_path, 6)
    ranks[1].send_signal(signal.SIGKILL)
    assert "process 1" in output(ranks[0]) and ranks[0].returncode == 75
    trained = len(losses(tmp_path))
    assert trained < STEPS, "the run had ended before the kill"

    alone = start_ranks([command], JAX_NUM_PROCESSES="2", JAXPAR_START_TIMEOUT="5")  # the scheduler has no second node
    text = output(alone[0])
    assert alone[0].returncode == 0, text
    assert "elastic: 1 of 2 nodes, dp 2; global_batch_size stays 16" in text
    assert "cluster.num_nodes 2 → 1" in text  # what the resume says
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(tmp_path), losses(tmp_path / "undisturbed"), rtol=1e-5)


@pytest.mark.slow
def test_a_node_that_is_not_needed_waits_for_the_end(tmp_path):
    ranks = start_ranks([[*train_command(tmp_path, *RUN, "runner.max_steps=2"), "--elastic", "1"]] * 3)
    texts = [output(process) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0], texts
    assert "elastic: 2 of 3 nodes, dp 4" in texts[0]
    assert "this node was not needed" in texts[2]
    assert len(losses(tmp_path)) == 2


def test_too_few_nodes_are_not_a_mistake_but_another_try(tmp_path):
    process = start_ranks(
        [[*train_command(tmp_path, *RUN), "--elastic", "2"]], JAX_NUM_PROCESSES="2", JAXPAR_START_TIMEOUT="2"
    )[0]
    text = output(process)
    assert process.returncode == 75, text
    assert "--elastic 2: only 1 of the nodes" in text and "did not connect: 1" in text


# What jobset.yaml has beside the Job, as JobSet v1alpha2 has it: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
FIELDS = {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
    "failurePolicy": {"maxRestarts": int, "rules": list},
    "replicatedJobs": list,
}
RULE = {"name": str, "action": str, "onJobFailureReasons": list}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
JOBSET = yaml.safe_load((ROOT / "tpu_gpu_scripts/jobset.yaml").read_text())


def test_the_job_of_the_jobset_is_one_that_kubernetes_takes():
    (node,) = JOBSET["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": node["template"]["spec"]}
    kubernetes_validate.validate(job, "1.37", strict=True)


def assert_fields(given, known):
    assert given.keys() <= known.keys()
    for key, value in given.items():
        if isinstance(known[key], dict):
            assert_fields(value, known[key])
        else:
            assert isinstance(value, known[key]), key


def test_the_fields_around_the_job_are_those_of_jobset():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert_fields(JOBSET["spec"], FIELDS)
    (rule,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert_fields(rule, RULE)
    assert rule["name"] and rule["action"] in ACTIONS and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert [job.keys() for job in JOBSET["spec"]["replicatedJobs"]] == [{"name", "template"}]


def test_the_jobset_says_its_number_of_nodes_and_its_names_once():
    (node,) = JOBSET["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(variables["NODES"])
    name = JOBSET["metadata"]["name"]
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{node['name']}-0-0.{name}:")
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


@pytest.mark.slow
def test_the_command_of_the_jobset_trains(tmp_path):
    """As two processes, with the variables that Kubernetes would give them."""
    (node,) = JOBSET["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    variables = {v["name"]: v["value"] for v in container["env"] if "value" in v}
    command = [*container["command"], *container["args"]]
    expanded = [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in command]
    small = [word for word in RUN if not word.startswith("cluster.")]
    program, sub, _, *arguments = [word.replace("/results", str(tmp_path)) for word in expanded]
    assert (program, sub) == ("jaxpar", "train")
    train = train_command(tmp_path)[:3]
    ranks = start_ranks(
        [[*train, *small, "runner.max_steps=2", *arguments, "cluster.num_gpus_per_node=4"]] * 2, JAXPAR_SECRET="secret"
    )
    texts = [output(process) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], texts
    assert len(losses(tmp_path)) == 2
