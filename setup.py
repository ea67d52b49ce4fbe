"""All settings are in pyproject.toml; here is what it cannot say: a build notes the revision that it was made from."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mfdiff_lite.revision import code_revision  # noqa: E402 - imports nothing but the standard library


def note_revision(package: Path) -> None:
    """Write _revision.py into a build's copy of the package, never into the sources."""
    revision, path = code_revision(), package / "_revision.py"
    path.unlink(missing_ok=True)  # in an sdist it may be a hard link to the sources' file
    text = f'"""What this build was made from; setup.py wrote it."""\n\nREVISION = "{revision}"\n'
    path.write_text(text, encoding="utf-8")


class BuildPy(build_py):
    """The wheel's copy of the package."""

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install is the checkout, whose revision changes
            note_revision(Path(self.build_lib, "mfdiff_lite"))


class Sdist(sdist):
    """The sdist's copy; a wheel made from it finds the revision there."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        note_revision(Path(base_dir, "mfdiff_lite"))


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
