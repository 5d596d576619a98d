"""The published packages can be built, installed into an empty environment, and used."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest

from tests.compiling import xla_flags
from tests.make import REPOSITORY, write_pair_tar

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
FOLDERS = ("diht_jax", "data_prep", "configs")
INSTALLED_AS = {"configs": "diht_jax/recipes/configs"}
# Every Python process of the environment records which project files it has imported.
RECORDER = """
import atexit, os, sys

def write():
    ours = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in {names!r}]
    with open(os.environ["IMPORTED"], "a") as file:
        file.writelines(f"{{m.__file__}}\\n" for m in ours if getattr(m, "__file__", None))

atexit.register(write)
"""
# A recipe in a user's folder `configs`, derived from one of this project.
OWN_RECIPE = """
from configs import common, demo

def get_config(arg=""):
    config = demo.get_config(arg)
    assert common.parse_arg(arg).debug
    config.data.batch_size = 12
    return config
"""

CAPTIONS = [f"a brown dog is chasing a small cat in garden {i}" for i in range(24)]
COMMANDS = (
    "data_prep.filter --config=prep/cat --config.input=pairs.tar --config.output=kept "
    "--config.text_spotting=False --config.num_workers=0",
    "diht_jax.train --config configs/mine.py:debug=True --config.data.train=kept --workdir=run "
    "--config.model.overrides.vision_layers=1 --config.model.overrides.text_layers=1 "
    "--config.model.overrides.vocab_size=700",
)


def sources() -> set[str]:
    """Returns the files that belong in the packages, by their paths in the repository."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for folder in FOLDERS
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def build(folder: pathlib.Path, target: str, output: pathlib.Path) -> pathlib.Path:
    """Builds like `python -m build --no-isolation`; returns the one file that it makes."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (path,) = output.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in (*FOLDERS, "LICENSES"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for path in REPOSITORY.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    return build(folder, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, to show that the sdist is complete as well."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return build(unpacked, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The Python of an environment with the wheel and with this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel))
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A .pth file adds a folder but does not process that folder's own .pth files. Python therefore
    # does not find this checkout, which may be installed there as a link.
    (site_packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (site_packages / "sitecustomize.py").write_text(RECORDER.format(names=(*FOLDERS, "__main__")))
    return python


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    """Starts a module of the installed package in an empty folder; returns its output."""
    folder = tmp_path_factory.mktemp("elsewhere")
    imported = folder / "imported.txt"
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(), "IMPORTED": str(imported)}

    def start(command: str) -> str:
        done = subprocess.run(
            [str(environment), "-m", *command.split()],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    start.folder = folder
    return start


def test_the_wheel_has_every_file_and_its_licences(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
        fields = email.message_from_bytes(file.read(f"{metadata}/METADATA"))
    expected = set()
    for path in sources():
        folder, _, rest = path.partition("/")
        expected.add(f"{INSTALLED_AS.get(folder, folder)}/{rest}")
    assert {name for name in names if not name.startswith(metadata)} == expected
    assert {"diht_jax/py.typed", "data_prep/py.typed"} <= expected
    licences = {path.name for path in (REPOSITORY / "LICENSES").iterdir()}
    assert licences and {f"{metadata}/licenses/LICENSES/{name}" for name in licences} <= names
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= names
    assert set(fields.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_the_installed_package_runs_from_any_folder(run, environment):
    assert run("diht_jax --version") == f"diht_jax {PROJECT['version']}\n"
    (run.folder / "configs").mkdir()
    (run.folder / "configs" / "mine.py").write_text(OWN_RECIPE)
    write_pair_tar(run.folder / "pairs.tar", CAPTIONS)
    for command in COMMANDS:
        run(command)
    assert (run.folder / "run" / "metrics.jsonl").is_file()
    imported = (run.folder / "imported.txt").read_text().splitlines()
    own = str(run.folder / "configs")
    root = str(environment.parents[1])
    assert [path for path in imported if not path.startswith((root, own))] == []
    used = {"train.py", "filter.py", "demo.py", "common.py"}
    assert used <= {pathlib.Path(path).name for path in imported}
