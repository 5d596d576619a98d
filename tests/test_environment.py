"""`.ci/environment.sh` installs what is missing and nothing else, the project itself included."""

import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# In place of Python: writes its arguments down.
RECORDER = '#!/bin/sh\necho "$@" >> calls\n'


@pytest.fixture
def checkout(tmp_path):
    """A folder with the set-up's files, and an environment whose Python only records its calls."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / ".ci", folder / ".ci")
    make_environment(folder)
    return folder


def make_environment(folder: pathlib.Path) -> None:
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)


DEMO = "source .ci/environment.sh"
TESTS = f"requirements=(requirements.txt requirements-dev.txt); {DEMO}"


def source_script(
    folder: pathlib.Path, script: str = DEMO, **environment: str
) -> subprocess.CompletedProcess:
    """Sources the script as run_demo.sh does, or as run_tests.sh does."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {script}; echo $python"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


def set_up(folder: pathlib.Path, script: str = DEMO) -> list[str]:
    """The calls of the environment's Python since the last time."""
    done = source_script(folder, script, PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def test_everything_is_installed_once(checkout):
    requirements, project = set_up(checkout)
    assert requirements.endswith("-rrequirements.txt")
    assert project.endswith("--no-deps --no-build-isolation -e .")
    assert set_up(checkout) == []


def test_tests_get_what_the_demo_needs_and_more(checkout):
    for start in (TESTS, DEMO):
        shutil.rmtree(checkout / ".venv", ignore_errors=True)
        make_environment(checkout)
        set_up(checkout, start)
        assert set_up(checkout) == []
        both = set_up(checkout, TESTS)
        if start == DEMO:
            # Both are named again, so that versions of the one hold for the other.
            assert [call.split()[-2:] for call in both] == [
                ["-rrequirements.txt", "-rrequirements-dev.txt"]
            ]
        else:
            assert both == []
    (checkout / "requirements-dev.txt").write_text("changed")
    assert set_up(checkout) == []
    assert len(set_up(checkout, TESTS)) == 1
    scripts = {name: (REPOSITORY / name).read_text() for name in ("run_tests.sh", "run_demo.sh")}
    assert (
        "\nrequirements=(requirements.txt requirements-dev.txt)\nsource" in scripts["run_tests.sh"]
    )
    assert "requirements=" not in scripts["run_demo.sh"]


def test_changes_are_installed(checkout):
    set_up(checkout)
    (checkout / "pyproject.toml").write_text("changed")
    assert [call.split()[-1] for call in set_up(checkout)] == ["."]
    (checkout / "requirements.txt").write_text("changed")
    assert [call.split()[-1] for call in set_up(checkout)] == ["-rrequirements.txt"]


def write_command(path: pathlib.Path, script: str) -> pathlib.Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_another_python_than_that_of_the_environment_is_an_error(checkout, tmp_path):
    set_up(checkout)
    (checkout / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    for version, status in (("3.11", 0), ("3.13", 1)):
        python = write_command(tmp_path / "bin" / "some_python", f"echo {version}")
        done = source_script(checkout, PYTHON=str(python))
        assert done.returncode == status, done.stderr
    assert f".venv has Python 3.11, and PYTHON={python} is 3.13; rm -r .venv" in done.stderr


def test_what_installs_the_project_is_among_the_requirements():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    wanted = (REPOSITORY / "pyproject.toml").read_text().partition("requires = [")[2]
    assert wanted.partition("]")[0].strip('"') in lines
    # The tests' file has nothing twice.
    others = (REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    assert not {line for line in lines if line and line[0] != "#"} & set(others)
