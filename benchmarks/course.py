"""Cost of the course: the slice explorer, the notebooks, the book.

    make course-targets              # half an hour on 2 idle cores, most of it for the book
    python benchmarks/course.py --explorer    # the explorer alone; nothing is written
    make course-targets ARGS=--assignments    # what the assignments' checks are worth: minutes

The explorer turns four volumes of 128^3 with noise in them (the hardest to compress): kernel time of one tick of the
slider, memory after many of them, and, if Chromium is there, from key press to pixels. The assignments: which wrong
solutions of notebooks/assignments/mutants.py lose points, and which right ones keep them all. Writes the rows of group
"course" in results/targets.json.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mfdiff_lite.look import PLANES, SliceExplorer, explore
from results import Targets

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("LPET", "SPET", "MR", "restored")
GOALS = {
    "tick": ("kernel time of a tick of the explorer, four volumes of 128^3, slowest plane", "ms", "<=", 25.0, None),
    "memory": ("memory that 1000 ticks leave behind", "MiB", "<=", 1.0, 0.0),
    "key_to_pixels": ("from key press to pixels in Chromium, same volumes, median", "ms", "<=", 100.0, None),
    "notebook": ("slowest notebook at the smoke profile, alone on the machine", "s", "<=", 45.0, None),
    "book_minutes": ("make book, all notebooks at the cpu profile", "min", "<=", 20.0, None),
    "book_size": ("the book's size", "MB", "<=", 40.0, None),
}
CHECKS = {
    "mutants": ("wrong solutions that the assignments' checks are tried on", "", ">=", 20.0, 30.0),
    "mutants_caught": ("wrong solutions that lose points", "%", ">=", 95.0, 100.0),
    "unusual_full": ("right but unusual solutions that score full", "%", ">=", 100.0, None),
}


def volumes(size: int) -> dict[str, np.ndarray]:
    """A noisy ball that fills the volume, in every pane with noise of its own."""
    radius = np.sqrt(sum((axis - (size - 1) / 2) ** 2 for axis in np.ogrid[:size, :size, :size]))
    ball = (radius < 0.47 * size).astype(np.float32)
    draws = (np.random.default_rng(seed).gamma(2, 3, ball.shape) for seed in range(len(NAMES)))
    return {name: ball * noise.astype(np.float32) for name, noise in zip(NAMES, draws, strict=True)}


def ticks(view: SliceExplorer, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of CPU and of wall time of each of `count` steps of the slider, up and down its range."""
    slider, spent = view.slice, []
    there = range(slider.min, slider.max + 1)
    slider.value = slider.max
    for target in itertools.islice(itertools.cycle([*there[-2::-1], *there[1:]]), count):
        began = time.process_time(), time.perf_counter()
        slider.value = target
        spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return 1000 * np.transpose(spent)


def resident() -> float:
    """MiB of memory that this process holds (Linux only; NaN elsewhere)."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / 2**20


def explorer(targets: Targets, size: int = 128, count: int = 1000) -> None:
    """Milliseconds per tick, and the growth of memory."""
    view, slowest = explore(volumes(size)), 0.0
    for plane in PLANES:
        view.plane.value = plane
        cpu, wall = ticks(view, max(20, count // 10))
        print(f"{plane:9} {np.median(cpu):6.1f} ms of CPU per tick, {np.median(wall):6.1f} ms of wall time (medians)")
        slowest = max(slowest, float(np.median(cpu)))
    targets.add("tick", slowest)
    before = resident()
    ticks(view, count)
    targets.add("memory", resident() - before)


def browser(targets: Targets) -> None:
    """What a browser test wrote down."""
    told = ROOT / "runs" / "browser" / "speed.json"
    told.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_browser.py", "-k", "written_down"]
    subprocess.run(command, cwd=ROOT, check=True)
    if not told.exists():
        raise typer.BadParameter("expected Chromium and Playwright, found none (apt-get install chromium)")
    targets.add("key_to_pixels", json.loads(told.read_text())["key_to_pixels_ms"])


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


def assignments() -> None:
    """Every wrong and every unusual solution through all checks of its assignment."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "notebooks" / "assignments" / "mutants.py")
    sys.modules["mutants"] = mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    wrong, right = mutants.measure()
    print(*(f"full marks for a wrong solution: {name}" for name, failed in wrong.items() if not failed), sep="\n")
    print(*(f"points lost by a right solution: {name}" for name, failed in right.items() if failed), sep="\n")
    targets = Targets("course", CHECKS, "make course-targets ARGS=--assignments")
    targets.add("mutants", len(wrong))
    targets.add("mutants_caught", 100 * np.mean([bool(failed) for failed in wrong.values()]))
    targets.add("unusual_full", 100 * np.mean([not failed for failed in right.values()]))
    targets.write()
    targets.show()


def main(
    only_explorer: Annotated[bool, typer.Option("--explorer", help="the explorer alone; nothing is written")] = False,
    only_assignments: Annotated[bool, typer.Option("--assignments", help="the assignments' checks alone")] = False,
) -> None:
    """Measure what the course costs a reader's machine, and what its checks are worth."""
    if not only_explorer:
        assignments()
    if only_assignments:
        return
    targets = Targets("course", GOALS, "make course-targets")
    explorer(targets)
    if not only_explorer:
        browser(targets)
        notebooks(targets)
        book(targets)
        targets.write()
    targets.show()


if __name__ == "__main__":
    typer.run(main)
