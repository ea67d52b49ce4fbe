"""The revision is a fact of the build or of the package's own checkout, whatever folder the package lies in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is missing")


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, with nobody's settings but these."""
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path) -> str:
    """Make a git repository of a folder; the hash of its only commit."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--no-verify", "--allow-empty", "--message", "all")
    return git(folder, "describe", "--always")


def copy_package(folder: Path) -> Path:
    """The package's own files that matter here, in a folder."""
    (folder / "mfdiff_lite").mkdir(parents=True)
    for name in ("__init__.py", "revision.py"):
        shutil.copy(ROOT / "mfdiff_lite" / name, folder / "mfdiff_lite")
    return folder / "mfdiff_lite"


def revision(folder: Path, **environment: str) -> str:
    """What the package in a folder says of itself."""
    code = "import mfdiff_lite.revision as it; print(it.__file__, it.code_revision())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, found = done.stdout.split()
    assert Path(path).is_relative_to(folder.resolve()), "another copy of the package answered"
    return found


@pytest.mark.parametrize("inside", [".", "venv/lib/site-packages"])
def test_a_foreign_repository_is_not_its_own(tmp_path, inside):
    package = copy_package(tmp_path / inside)
    foreign = repository(tmp_path)
    assert revision(package.parent) == "unknown" != foreign
    assert revision(package.parent, GIT_DIR=str(tmp_path / ".git")) == "unknown", "a git hook sets GIT_DIR"


def test_a_foreign_project_is_not_its_own(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "analysis"\n', encoding="utf-8")
    copy_package(tmp_path)
    repository(tmp_path)
    assert revision(tmp_path) == "unknown"


def test_its_own_checkout(tmp_path):
    package = copy_package(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    hash_ = repository(tmp_path)
    assert revision(tmp_path) == hash_
    with (package / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert revision(tmp_path) == hash_ + "+"
    shutil.rmtree(tmp_path / ".git")
    assert revision(tmp_path) == "unknown"


def test_the_note_of_the_build_comes_first(tmp_path):
    package = copy_package(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    repository(tmp_path)
    (package / "_revision.py").write_text('REVISION = "abc1234"\n', encoding="utf-8")
    assert revision(tmp_path) == "abc1234"
