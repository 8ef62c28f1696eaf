"""The manifests for other schedulers: KubeRay's holds together, Slurm's runs with stand-ins for its tools."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.jobs import GRACE, OUTPUT, VERSION
from pipeline.config import RunConfig, parse_config

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "configs" / "manifests"
SLURM = MANIFESTS / "slurm.sh"

FIELDS = {
    "": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished",
    "rayClusterSpec": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions "
    "upgradeStrategy workerGroupSpecs",
    "rayClusterSpec.headGroupSpec": "enableIngress headService ingressOptions labels rayStartParams resources "
    "serviceType template",
    "rayClusterSpec.workerGroupSpecs.0": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts "
    "priority rayStartParams replicas resources scaleStrategy suspend template",
}
"""What KubeRay's definition of a RayJob (ray.io/v1) knows under `spec`: other names would be dropped in silence."""

STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0") $*" in
    "scontrol show"*) printf 'node1\\nnode2\\nnode3\\n' ;;
    "python -c"*) echo -n 0123456789abcdef ;;
    "python -"*) cat > /dev/null; [ "$RAY_AUTH_MODE" = token ] && [ -s "$RAY_AUTH_TOKEN_PATH" ] ;;
    srun*) exec sleep 60 ;;
    "secateur run"*)
        trap 'exit 75' TERM
        echo begun >> "$LOG"
        [ "$WORK" = long ] || exit "$WORK"
        for _ in $(seq 600); do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def kuberay() -> dict[str, Any]:
    """The manifest's objects by kind."""
    text = (MANIFESTS / "kuberay.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def within(tree: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        tree = tree[int(part) if part.isdigit() else part]
    return tree


def settings_in(kuberay: dict[str, Any]) -> RunConfig:
    return parse_config(yaml.safe_load(kuberay["ConfigMap"]["data"]["job.yaml"]), "job.yaml")


@pytest.mark.parametrize("path", sorted(MANIFESTS.iterdir()), ids=lambda path: str(path.name))
def test_a_manifest_opens_with_its_purpose_and_its_command(path: Path) -> None:
    opening = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert re.search(r"^# Purpose:  \w", opening, re.MULTILINE)
    (command,) = re.findall(r"^# Command:  (.*)", opening, re.MULTILINE)
    assert str(path.relative_to(ROOT)) in command
    assert [name for name in re.findall(r"configs/\S+", command) if not (ROOT / name).is_file()] == []


def test_the_ray_job_has_only_fields_that_kuberay_knows(kuberay: dict[str, Any]) -> None:
    assert (kuberay["RayJob"]["apiVersion"], kuberay["ConfigMap"]["apiVersion"]) == ("ray.io/v1", "v1")
    for path, names in FIELDS.items():
        assert within(kuberay["RayJob"]["spec"], path).keys() - set(names.split()) == set(), path
    assert kuberay["RayJob"]["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode"}


def test_the_ray_job_runs_the_settings_that_are_mounted(kuberay: dict[str, Any]) -> None:
    spec = kuberay["RayJob"]["spec"]
    settings = settings_in(kuberay)
    program, command, path = spec["entrypoint"].split()
    assert (program, command, Path(path).name) == ("secateur", "run", "job.yaml")
    cluster = spec["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    for pod in (template["spec"] for template in templates):
        (container,) = pod["containers"]
        mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert volumes["settings"]["configMap"]["name"] == kuberay["ConfigMap"]["metadata"]["name"]
        assert mounts["settings"] == Path(path).parent
        assert settings.output.is_relative_to(mounts["models"])
        assert settings.model.path is not None
        assert settings.model.path.is_relative_to(mounts["models"])
    assert len({template["spec"]["containers"][0]["image"] for template in templates}) == 1


def test_the_ray_job_has_a_gpu_for_every_worker(kuberay: dict[str, Any]) -> None:
    settings = settings_in(kuberay).cluster
    assert settings is not None
    assert (settings.address, settings.replicas) == ("auto", 1)
    (group,) = kuberay["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * limits["nvidia.com/gpu"] == settings.stages
    assert limits["cpu"] >= settings.cpus


def test_the_ray_job_asks_for_a_token_and_says_what_our_commands_look_for(kuberay: dict[str, Any]) -> None:
    spec = kuberay["RayJob"]["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert spec["metadata"].keys() == {VERSION, OUTPUT, GRACE}
    assert spec["metadata"][OUTPUT] == str(settings_in(kuberay).output)
    assert spec["metadata"][GRACE] == variables["RAY_JOB_STOP_WAIT_TIME_S"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert spec["rayClusterSpec"]["rayVersion"] == pins["ray"]


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on three nodes, with stand-ins that write down how they are called."""
    for name in ("srun", "scontrol", "python", "secateur"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "4711", "JOB_NODELIST": "node[1-3]", "JOB_NUM_NODES": "3", "CPUS_PER_TASK": "16"}
    return {
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "SLURM_GPUS_ON_NODE": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "WORK": "0",
    }


def calls(allocation: dict[str, str]) -> list[str]:
    log = Path(allocation["LOG"])
    return log.read_text().splitlines() if log.exists() else []


def test_the_slurm_script_starts_ray_on_all_nodes_and_runs_the_configuration(allocation: dict[str, str]) -> None:
    done = subprocess.run(
        [SLURM, "job.yaml", "--set", "a=b"], env=allocation, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    called = calls(allocation)
    (head,) = [call for call in called if "ray start --head" in call]
    (workers,) = [call for call in called if "ray start --address=node1:24711" in call]
    assert "--nodelist=node1 " in head
    assert "--port=24711 " in head
    assert "--nodes=2 --ntasks=2 --exclude=node1 " in workers
    assert "--num-cpus=16 --num-gpus=1" in head
    assert "python - node1:24711 3" in called
    assert "secateur run job.yaml --set a=b --set cluster.address=node1:24711" in called
    assert not [call for call in called if "requeue" in call]
    assert list(Path(allocation["HOME"], ".ray").iterdir()) == []  # the token is gone


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_the_slurm_script_passes_a_stop_on_and_goes_back_into_the_queue_near_its_time_limit(
    number: int, requeued: bool, allocation: dict[str, str]
) -> None:
    with subprocess.Popen([SLURM, "job.yaml"], env={**allocation, "WORK": "long"}) as script:
        deadline = time.monotonic() + 60
        while "begun" not in calls(allocation):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        script.send_signal(number)
        assert script.wait(timeout=60) == 75
    assert ("scontrol requeue 4711" in calls(allocation)) == requeued


def test_the_slurm_script_hides_its_token_and_not_the_models(allocation: dict[str, str]) -> None:
    script = SLURM.read_text()
    start = script.index("mkdir -p")
    written = script[start : script.index("# Ray's files")] + 'touch "$HOME/model"\n'
    command = ["bash", "-c", "umask 022\n" + written]
    subprocess.run(command, env=allocation, capture_output=True, timeout=60, check=True)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path(allocation["HOME"]).rglob("*")}
    assert modes["slurm-4711.token"] == "0o600"
    assert modes["model"] == "0o644"


def test_the_slurm_script_gives_the_exit_status_of_a_run_that_fails(allocation: dict[str, str]) -> None:
    done = subprocess.run([SLURM, "job.yaml"], env={**allocation, "WORK": "3"}, timeout=60, check=False)
    assert done.returncode == 3
    assert not [call for call in calls(allocation) if "requeue" in call]


def test_the_slurm_script_without_a_configuration_says_how_it_is_used(allocation: dict[str, str]) -> None:
    done = subprocess.run([SLURM], env=allocation, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "CONFIG [--set KEY=VALUE" in done.stderr
