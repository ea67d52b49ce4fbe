"""Cost of the course: the notebooks, the book. (Of the viewer: benchmarks/viewer.py.)

    make course-targets              # half an hour on 2 idle cores, most of it for the book

Writes the rows of group "course" in results/targets.json.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import typer

from results import Targets

ROOT = Path(__file__).resolve().parents[1]
GOALS = {
    "notebook": ("slowest notebook at the smoke profile, alone on the machine", "s", "<=", 45.0, None),
    "book_minutes": ("make book, all notebooks at the cpu profile", "min", "<=", 20.0, None),
    "book_size": ("the book's size", "MB", "<=", 40.0, None),
}


def notebooks(targets: Targets) -> None:
    """Seconds of each at the smoke profile, one after the other."""
    spent = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        began = time.monotonic()
        command = [sys.executable, "notebooks/run.py", "--out", "runs/course-targets", path.stem]
        subprocess.run(command, cwd=ROOT, check=True)
        spent[path.stem] = time.monotonic() - began
    print({name: round(seconds) for name, seconds in spent.items()})
    targets.add("notebook", max(spent.values()))


def book(targets: Targets) -> None:
    """Minutes of `make book`, and the size of what it makes."""
    began = time.monotonic()
    subprocess.run(["make", "book"], cwd=ROOT, check=True)
    targets.add("book_minutes", (time.monotonic() - began) / 60)
    files = (ROOT / "runs" / "book" / "html").rglob("*")
    targets.add("book_size", sum(file.stat().st_size for file in files if file.is_file()) / 1e6)


def main() -> None:
    """Measure what the course costs a reader's machine."""
    targets = Targets("course", GOALS, "make course-targets")
    notebooks(targets)
    book(targets)
    targets.write()
    targets.show()


if __name__ == "__main__":
    typer.run(main)
