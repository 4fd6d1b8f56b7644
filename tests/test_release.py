"""The release: wheel and source archive hold all that the program reads, and work from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("trace_tasks", "trace_bench", "trainers", "judges")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the source archive of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
    ]
    subprocess.run([*pip, str(sdist)], cwd=out, check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command in an empty folder where only the wheel is there beside the libraries."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty folder ü")
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)

    def run(*command: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(site), "TRACE_CACHE": str(empty / "cache"), "TRACE_DATA": "demo"}
        done = subprocess.run(
            [sys.executable, *command], cwd=empty, env=env, capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        return done.stdout

    run.site = site
    return run


def test_the_wheel_has_every_file_of_the_packages(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert set(tracked.splitlines()) <= set(zipfile.ZipFile(wheel).namelist())


def test_the_installed_package_finds_its_own_files(installed):
    where = "import trace_tasks, trace_bench, trainers, judges as j; print(j.__file__, trainers.__file__)"
    assert installed("-c", where).count(str(installed.site)) == 2, "the wheel, and not the checkout, is tried"
    assert installed("-m", "trace_bench.cli", "tasks-path").strip() == str(installed.site / "trace_tasks")
    assert "--ewc_lambda" in installed("-m", "trainers.ewc", "--help")
    assert "Complete." in installed("-m", "trace_bench.cli", "data", "demo")
    study = installed.site / "trainers" / "configs" / "studies" / "replay.yaml"
    assert "train replay" in installed("-m", "trace_bench.cli", "study", str(study), "--dry-run")
