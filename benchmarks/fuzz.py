"""Mutated headers, gz streams, sidecars, weights and command lines: every one ends with exit status 0 or 2.

    make fuzz                                  # 10,000 of them, some minutes
    python benchmarks/fuzz.py --count 100000

All run in one process through `mfdiff_lite.__main__.app`, on a tiny head; what is read wrongly is refused before any
restoring. Input number i is made from its number and the seed alone, so a fault can be repeated (--first i --count 1).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import nibabel as nib
import numpy as np
import typer
from tqdm import tqdm

from mfdiff_lite.__main__ import app
from mfdiff_lite.config import load_profile
from mfdiff_lite.model import MFdiff, save_model
from mfdiff_lite.readers.frames import short_frame_scan

SHAPE = (24, 26, 12)
SLOW = 20.0  # seconds that no input may take


class Outcome(NamedTuple):
    """One input: its number, its kind, the exit status (1: an internal fault, also of a reader), and what was said."""

    number: int
    kind: str
    status: int
    said: str


class Bench:
    """A tiny head as files, small weights, and what can be done to them."""

    def __init__(self, folder: Path):
        self.folder, rng = folder, np.random.default_rng(0)
        grid = np.meshgrid(*(np.linspace(-1.25, 1.25, n) for n in SHAPE), indexing="ij")
        head = (4 * (sum(g**2 for g in grid) < 1) * rng.gamma(20, 0.05, SHAPE)).astype(np.float32)
        self.nii = nib.Nifti1Image(head, np.diag([2.0, 2, 2, 1])).to_bytes()
        self.good = {name: self.put(f"{name}.nii.gz", gzip.compress(self.nii, 1)) for name in ("lpet", "mr", "spet")}
        frames = nib.Nifti1Image(np.stack([head] * 4, -1), np.diag([2.0, 2, 2, 1]))
        self.dynamic = self.put("dyn_pet.nii", frames.to_bytes())
        self.sidecar = {"FrameDuration": [60] * 4, "Units": "Bq/mL", "FrameTimesStart": [0, 60, 120, 180]}
        small = load_profile("smoke", fusion_widths=(8,), denoiser_widths=(), context=1)
        save_model(MFdiff.from_profile(small), folder / "w.safetensors", {"steps": 0})
        self.weights = (folder / "w.safetensors").read_bytes()

    def put(self, name: str, content: bytes) -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def command(self, *arguments: str) -> tuple[int, str]:
        """Exit status and stderr of a command line, in this process."""
        out, err = io.StringIO(), io.StringIO()
        for made in ("out.nii.gz", "std.nii.gz", "out.html", "table.json"):
            (self.folder / made).unlink(missing_ok=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app(list(arguments), standalone_mode=True)
                status = 0
            except SystemExit as stop:
                status = int(stop.code or 0)
        return status, err.getvalue()

    def evaluated(self, name: str) -> tuple[int, str]:
        """A file as LPET, read and judged without a network."""
        rest = ("--spet", str(self.good["spet"]), "--restored", str(self.good["mr"]))
        return self.command("evaluate", "--lpet", str(self.folder / name), *rest)

    def restored(self, *more: str) -> tuple[int, str]:
        given = {
            "--lpet": self.good["lpet"],
            "--out": self.folder / "out.nii.gz",
            "--weights": self.folder / "w.safetensors",
        }
        given |= {"--dose-reduction": 20, "--samples": 1, "--device": "cpu"}
        given |= dict(zip(more[::2], more[1::2], strict=True))
        return self.command("restore", *(str(part) for pair in given.items() for part in pair))


def mutated(content: bytes, rng: np.random.Generator, first: int = 0, last: int | None = None) -> bytes:
    """Some bytes of [first, last) replaced, or a piece cut off, doubled or put in."""
    data, last = bytearray(content), min(last or len(content), len(content))
    kind = rng.integers(6)
    place = int(rng.integers(first, last))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        return bytes(data[:place] + rng.bytes(int(rng.integers(1, 9))) + data[place:])
    if kind == 2:
        return bytes(data[:place] + data[place + int(rng.integers(1, 9)) :])
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(first, last))
        extreme = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\x80\x00\x00", b"\x80\x00\x00\x00", rng.bytes(4)]
        piece = extreme[rng.integers(len(extreme))][: int(rng.integers(1, 5))]
        data[place : place + len(piece)] = piece
    return bytes(data)


def header(bench: Bench, rng: np.random.Generator) -> tuple[int, str]:
    bench.put("bad.nii", mutated(bench.nii, rng, 0, 352))
    return bench.evaluated("bad.nii")


def stream(bench: Bench, rng: np.random.Generator) -> tuple[int, str]:
    bench.put("bad.nii.gz", mutated(bench.good["lpet"].read_bytes(), rng))
    return bench.evaluated("bad.nii.gz")


def values(bench: Bench, rng: np.random.Generator) -> tuple[int, str]:
    bench.put("bad.nii", mutated(bench.nii, rng, 352))
    return bench.evaluated("bad.nii")


def sidecar(bench: Bench, rng: np.random.Generator) -> tuple[int, str]:
    """Sidecars of a dynamic PET, through the reader: nothing but OSError and ValueError may come out."""
    content = dict(bench.sidecar)
    if rng.random() < 0.5:
        strange = [None, -1, 0, 1e300, "60", [], [60] * 3, [None] * 4, {"a": 1}, [60, 60, "x", 60], True, [1e400] * 4]
        content[str(rng.choice(list(content)))] = strange[rng.integers(len(strange))]
    text = json.dumps(content).encode()
    bench.put("dyn_pet.json", mutated(text, rng) if rng.random() < 0.7 else text)
    try:
        short_frame_scan(bench.dynamic, None, frames=range(4), low=2)
    except (OSError, ValueError) as error:
        return 2, str(error)
    except Exception as error:  # what the command line would call an internal fault
        return 1, repr(error)
    return 0, ""


def weights(bench: Bench, rng: np.random.Generator) -> tuple[int, str]:
    length = 8 + int.from_bytes(bench.weights[:8], "little")
    last = length if rng.random() < 0.7 else None
    bench.put("bad.safetensors", mutated(bench.weights, rng, 0, last))
    return bench.restored("--weights", str(bench.folder / "bad.safetensors"))


STRANGE = (
    "",
    "-1",
    "0",
    "1e9",
    "nan",
    "inf",
    "-inf",
    "x",
    "1e400",
    "9" * 30,
    "0.5",
    "/",
    ".",
    "..",
    "\u2603",
    "a=b",
    "-",
)
OPTIONS = ("--samples", "--steps", "--fidelity", "--seed", "--dose-reduction", "--device", "--lpet", "--mr", "--std")
OPTIONS += ("--out", "--weights", "--report", "--nothing")


def line(bench: Bench, rng: np.random.Generator) -> tuple[int, str]:
    """Command lines of every command with strange values; those that would work for long are asked for nothing."""
    value = str(rng.choice(STRANGE))
    kind = rng.integers(4)
    if kind == 0:
        command = str(rng.choice(["train", "adapt", "simulate", "evaluate", "restore", "info!", "--nothing"]))
        refused = {"train": ["batch=0"], "simulate": ["--slices", "0"]}  # what would work would take minutes
        return bench.command(command, str(rng.choice(OPTIONS)), value, *refused.get(command, []))
    if kind == 1:
        key = str(rng.choice(["steps", "batch", "slab", "widths", "crop", "dose_range", "seed", "nothing", "patience"]))
        command = [["train", "--profile", "smoke"], ["adapt", "--lpet", str(bench.good["lpet"])]][rng.integers(2)]
        # "batch=0" comes last and is refused, so that nothing is trained
        return bench.command(*command, "--out", str(bench.folder / "run.safetensors"), f"{key}={value}", "batch=0")
    return bench.restored(*(part for one in rng.choice(OPTIONS, 2, replace=False) for part in (str(one), value)))


KINDS: dict[str, tuple[float, Callable[[Bench, np.random.Generator], tuple[int, str]]]] = {
    "headers": (0.35, header),
    "gz streams": (0.2, stream),
    "voxel values": (0.05, values),
    "sidecars": (0.15, sidecar),
    "weights": (0.1, weights),
    "command lines": (0.15, line),
}


def run(count: int, seed: int = 0, first: int = 0) -> list[Outcome]:
    """The outcomes of inputs `first` to `first + count`."""
    names, shares = list(KINDS), [share for share, _ in KINDS.values()]
    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
            bench = Bench(Path(folder))
            for number in tqdm(range(first, first + count), desc="fuzz", unit="input", disable=None):
                rng = np.random.default_rng([seed, number])
                kind = str(rng.choice(names, p=shares))
                began = time.monotonic()
                try:
                    status, said = KINDS[kind][1](bench, rng)
                except BaseException as error:  # whatever leaves the command line
                    status, said = 1, repr(error)
                    if isinstance(error, KeyboardInterrupt):
                        raise
                if time.monotonic() - began > SLOW:
                    status, said = 3, f"took {time.monotonic() - began:.0f} s: {said}"
                found.append(Outcome(number, kind, status, said))
    return found


def main(
    count: Annotated[int, typer.Option(help="inputs")] = 10_000,
    seed: Annotated[int, typer.Option(help="of the mutations")] = 0,
    first: Annotated[int, typer.Option(help="number of the first input")] = 0,
) -> None:
    """Exit 1, with the inputs, if any of them ended otherwise than with 0 or 2."""
    found = run(count, seed, first)
    wrong = [one for one in found if one.status not in (0, 2)]
    for one in wrong[:50]:
        print(f"{one.number} {one.kind}: exit {one.status}: {' '.join(one.said.split())[-300:]}")
    went = sum(one.status == 0 for one in found)
    print(f"{len(found)} inputs: {went} went through, {len(found) - went - len(wrong)} refused, {len(wrong)} faults")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
