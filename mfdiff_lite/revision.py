"""Which code this is: a fact of the build or of its own checkout, never of the folder that the package lies in."""

import subprocess
from pathlib import Path


def code_revision() -> str:
    """The git revision of this code, "+" if it was changed, or "unknown".

    A wheel and an sdist carry the revision that they were built from (setup.py). Without one, git is asked, and only in
    this package's own checkout: a copy inside another repository is not that repository's revision.
    """
    try:
        from ._revision import REVISION

        return str(REVISION)
    except ImportError:
        pass
    root = Path(__file__).resolve().parents[1]
    # Both folders are named, so that git neither climbs to a repository around nor follows a caller's GIT_DIR.
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty=+"]
    try:
        if 'name = "mfdiff_lite"' not in (root / "pyproject.toml").read_text(encoding="utf-8"):
            return "unknown"
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
