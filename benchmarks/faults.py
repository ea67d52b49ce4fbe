"""Faults: killed at any moment, a full disk, read-only and damaged caches, two processes on one cache, a changed clock.

    python benchmarks/faults.py

Each function returns whether nothing was half-written and nothing wrong came out; `make real` runs them all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from safetensors.numpy import load_file

SMOKE = ("train", "--profile", "smoke", "--device", "cpu", "steps=20", "checkpoint_every=5", "validate_every=20")


class Place:
    """A folder with a simulated slab, a cache, and commands run in it."""

    def __init__(self, folder: Path):
        self.folder, self.env = folder, os.environ | {"MFDIFF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        assert self.run(*self.simulate("slab")) == 0

    def simulate(self, out: str) -> tuple[str, ...]:
        return ("simulate", "--out", out, "--slices", "5", "--seed", "3", "--force")

    def restore(self, out: str, *more: str) -> tuple[str, ...]:
        images = ("--lpet", "slab/lpet.nii.gz", "--mr", "slab/mr.nii.gz", "--dose-reduction", "20")
        return ("restore", *images, "--samples", "1", "--out", out, "--force", *more)

    def start(self, *arguments: str, limit: str = "") -> subprocess.Popen:
        command = [sys.executable, "-m", "mfdiff_lite", *arguments]
        if limit:
            command = ["bash", "-c", f'{limit}; exec "$@"', "bash", *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, **quiet)

    def run(self, *arguments: str, limit: str = "") -> int:
        return self.start(*arguments, limit=limit).wait()

    def killed(self, after: float, *arguments: str) -> None:
        """Start a command and kill it `after` seconds."""
        process = self.start(*arguments)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def whole(self) -> bool:
        """Whether every file with a final name can be read to its end."""
        for path in self.folder.rglob("[!.]*"):
            if path.name.endswith((".nii", ".nii.gz")) and not np.isfinite(nib.load(path).get_fdata()).all():
                return False
            if path.suffix == ".safetensors":
                load_file(path)
        return True

    def weights(self, run: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / run / "stage1.safetensors")


def moments(place: Place, *arguments: str) -> list[float]:
    """Six moments of a command, the last ones where it writes."""
    began = time.monotonic()
    assert place.run(*arguments) == 0
    return [share * (time.monotonic() - began) for share in (0.3, 0.6, 0.8, 0.9, 0.95, 1.0)]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[key], other[key]) for key in one)


def kill_simulate(place: Place) -> bool:
    right = nib.load(place.folder / "slab" / "lpet.nii.gz").get_fdata()
    for moment in moments(place, *place.simulate("killed")):
        place.killed(moment, *place.simulate("killed"))
        if not place.whole():
            return False
    again = place.run(*place.simulate("killed"))
    return again == 0 and np.array_equal(nib.load(place.folder / "killed" / "lpet.nii.gz").get_fdata(), right)


def kill_restore(place: Place) -> bool:
    for moment in moments(place, *place.restore("whole.nii.gz")):
        place.killed(moment, *place.restore("killed.nii.gz"))
        if not place.whole():
            return False
    right, again = place.folder / "whole.nii.gz", place.run(*place.restore("killed.nii.gz"))
    there = nib.load(place.folder / "killed.nii.gz").get_fdata()
    return again == 0 and np.array_equal(there, nib.load(right).get_fdata())


def kill_train(place: Place) -> bool:
    """Killed four times, also while the cohort is made; then resumed to the weights of an uncut run."""
    for moment in (2.0, 4.0, 6.0, 9.0):
        place.killed(moment, *SMOKE, "--out", "cut", "--resume")
        if not place.whole():
            return False
    ended = place.run(*SMOKE, "--out", "cut", "--resume"), place.run(*SMOKE, "--out", "uncut")
    return ended == (0, 0) and same(place.weights("cut"), place.weights("uncut"))


def full_disk(place: Place) -> bool:
    """No file may grow beyond 8 kB: status 2, the old result stays, nothing half-written beside it."""
    place.run(*place.restore("old.nii.gz"))
    before = (place.folder / "old.nii.gz").read_bytes()
    status = place.run(*place.restore("old.nii.gz"), limit="trap '' XFSZ; ulimit -f 8")
    left = [path.name for path in place.folder.glob(".*part*old*")]
    return status == 2 and (place.folder / "old.nii.gz").read_bytes() == before and not left


def damaged_cache(place: Place) -> bool:
    """Every array of the cohort cut in half: it is made again, and the weights are the same."""
    for path in (place.folder / "cache").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status = place.run(*SMOKE, "--out", "after-damage")
    return status == 0 and same(place.weights("after-damage"), place.weights("uncut"))


def two_processes(place: Place) -> bool:
    """Two trainings that start on one empty cache."""
    place.env |= {"MFDIFF_CACHE": str(place.folder / "shared")}
    both = [place.start(*SMOKE, "--out", name) for name in ("one", "two")]
    return [process.wait() for process in both] == [0, 0] and all(
        same(place.weights(name), place.weights("uncut")) for name in ("one", "two")
    )


def changed_clock(place: Place) -> bool:
    """Cache and checkpoint from 1980 and from 2100: dates decide nothing."""
    for number, path in enumerate([*place.folder.rglob("*.npy"), *place.folder.rglob("*.safetensors")]):
        os.utime(path, (4.1e9, 4.1e9) if number % 2 else (3.2e8, 3.2e8))
    status = place.run(*SMOKE, "--out", "cut", "--resume")
    return status == 0 and same(place.weights("cut"), place.weights("uncut"))


FAULTS: dict[str, Callable[[Place], bool]] = {
    "simulate killed at six moments": kill_simulate,
    "restore killed at six moments": kill_restore,
    "train killed at four moments, then resumed": kill_train,
    "disk full while the result is written": full_disk,
    "cache cut in half": damaged_cache,
    "two trainings on one empty cache": two_processes,
    "dates of cache and checkpoint changed": changed_clock,
}


def run() -> dict[str, bool]:
    """Name of each fault -> whether it was survived."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        return {name: bool(fault(place)) for name, fault in FAULTS.items()}


if __name__ == "__main__":
    survived = run()
    for name, right in survived.items():
        print(f"{'survived' if right else 'FAILED  '} {name}")
    sys.exit(not all(survived.values()))
