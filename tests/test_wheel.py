"""What users install: sdist and wheel are built, the wheel is installed far from the checkout, and used."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from test_revision import ROOT, git, repository

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("git"), reason="git is missing")]

BESIDE = (  # what may lie in a working copy and is no part of it
    *(".git", ".venv", "runs", "build", "dist", "downloads", "*.egg-info", "_revision.py", "PKG-INFO", "setup.cfg"),
    *("__pycache__", ".*_cache", ".ipynb_checkpoints"),
)
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
USE = """
import json
import mfdiff_lite as mf
from mfdiff_lite.revision import code_revision

scan = mf.Scanner().scan(mf.virtual_patient(mf.load_anatomy("icbm152"), seed=7, slices=2), dose_reduction=20)
restored = mf.load_pretrained("cpu").restore(scan, n_samples=1, steps=2)
facts = {"file": mf.__file__, "anatomies": mf.list_anatomies(), "revision": code_revision()}
print(json.dumps(facts | {"shape": restored.mean.shape, "finite": bool((restored.mean >= 0).all())}))
"""


def outside(command: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a folder without this checkout on its path (the network guard stays there)."""
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not Path(p, "mfdiff_lite").exists()]
    hidden = ("PYTEST_", "GIT_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    env |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(kind: str, source: Path, out: Path) -> Path:
    """Build with the setuptools of this environment: an isolated build would download it."""
    done = outside([sys.executable, "-c", BUILD, f"build_{kind}", out], source)
    complaints = re.findall(r".*(?:Warning|is absent from).*", done.stderr)
    assert not complaints, done.stderr
    return next(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkout of its own, so that nothing is left behind in this one; and its revision."""
    folder = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*BESIDE))
    return folder, repository(folder)


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """The sdist, unpacked where git knows nothing of it."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", source[0], folder)) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in an environment of its own, which borrows the requirements from this one; around it, a foreign git
    repository. Its Python, its scripts, its site-packages."""
    folder = tmp_path_factory.mktemp("foreign")
    repository(folder)
    venv.create(folder / "venv", symlinks=os.name != "nt", with_pip=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(outside([python, "-c", where], folder).stdout.strip())
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    options = ["--no-deps", "--no-index", "--no-compile", "--ignore-installed", "--quiet"]
    outside([python, "-m", "pip", "install", *options, wheel], folder)
    return python, scripts, site


def test_building_leaves_the_checkout_as_it_was(source, sdist):
    folder, revision = source
    assert git(folder, "describe", "--always", "--dirty=+") == revision
    assert not (folder / "mfdiff_lite/_revision.py").exists()


def test_sdist_is_the_repository(source, sdist):
    stored = set(git(source[0], "ls-files").splitlines())
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert stored <= packed, f"MANIFEST.in leaves out: {sorted(stored - packed)}"
    added = {name for name in packed - stored if ".egg-info/" not in name}
    assert added == {"PKG-INFO", "setup.cfg", "mfdiff_lite/_revision.py"}


def test_tests_run_from_the_sdist(sdist):
    chosen = ["tests/test_no_network.py", "tests/test_packaging.py", "-k", "guard or module or citation or workflow"]
    done = outside([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen], sdist)
    assert " passed" in done.stdout


def test_metadata(installed, wheel, source):
    _, _, site = installed
    (folder,) = site.glob("mfdiff_lite-*.dist-info")
    metadata = Distribution.at(folder).metadata
    assert metadata["Description-Content-Type"] == "text/markdown" and "# mfdiff_lite" in metadata.get_payload()
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} == set(links)
    assert "CC-BY-4.0" in metadata["License-Expression"]
    listed = metadata.get_all("License-File")
    assert {"LICENSE", "NOTICE", "LICENSES/BSD-3-Clause.txt", "mfdiff_lite/anatomies/NOTICE.md"} <= set(listed)
    assert all((folder / "licenses" / name).is_file() for name in listed)
    assert f"-{metadata['Version']}-py3-none-any" in wheel.name


def test_wheel_holds_the_package_and_nothing_else(installed, source):
    _, _, site = installed
    names = git(source[0], "ls-files", "mfdiff_lite").splitlines()
    shipped = {p.relative_to(site).as_posix() for p in (site / "mfdiff_lite").rglob("*") if p.is_file()}
    assert {name for name in shipped if "__pycache__" not in name} == {*names, "mfdiff_lite/_revision.py"}
    assert "mfdiff_lite/py.typed" in shipped
    assert {path.name for path in site.glob("mfdiff*")} == {"mfdiff_lite", next(site.glob("mfdiff_lite-*")).name}


def test_library_works(installed, source):
    python, _, site = installed
    facts = json.loads(outside([python, "-c", USE], site.parent).stdout.splitlines()[-1])
    assert Path(facts["file"]).is_relative_to(site.resolve())
    assert facts["revision"] == source[1], "the revision of the build, not of the repository around it"
    assert len(facts["anatomies"]) == 7 and facts["shape"][-1] == 2 and facts["finite"]


def test_command_works(installed):
    _, scripts, site = installed
    name = scripts / ("mfdiff.exe" if os.name == "nt" else "mfdiff")
    assert "restore" in outside([name, "--help"], site).stdout
    assert "environment: complete" in outside([name, "info"], site.parent).stdout
