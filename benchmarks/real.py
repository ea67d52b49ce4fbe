"""What strangers bring in: bright things, edges, damaged files and wrong numbers go through or are refused.

    make real                              # an hour on one core
    python benchmarks/real.py edges cases  # some of the measurements; the other rows stay as they are

Each function of `MEASURES` fills rows of group "real" in results/targets.json; what it saw goes to results/real.json
and the README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import faults
import fuzz
import nibabel as nib
import numpy as np
import typer
from scipy import ndimage

import mfdiff_lite as mf
from mfdiff_lite.config import TEST_ANATOMIES
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from results import RESULTS, Targets, write_json

# id: (relation, unit, sense, must, aim)
GOALS = {
    "brain_activity": ("brain activity moved by bright, absurd, offset or stripped surroundings", "%", "<=", 2.0, 1.0),
    "edges": ("|activity of the outermost voxels / that of the whole head - 1|, worst cut", "%", "<=", 3.0, 1.0),
    "cases": ("of eleven inputs that failed, dealt with rightly", "", ">=", 11, 11),
    "fuzz_inputs": ("mutated headers, streams, sidecars, weights and command lines", "", ">=", 10_000, 100_000),
    "faults": ("kills, full disk, damaged and shared caches that left something half-written or wrong", "", "<=", 0, 0),
    "fuzz_exits": ("of those, exits other than 0 or 2", "", "<=", 0, 0),
}
Rows = dict[str, float]
Notes = list[dict[str, object]]  # what was put in and what it gave, a line each


def head(slices: int, seed: int = 11, dose_reduction: float = 20) -> Scan:
    """A virtual patient of the test anatomy on the default scanner."""
    return Scanner().scan(virtual_patient(load_anatomy(TEST_ANATOMIES[0]), seed, slices=slices), dose_reduction)


def cut(scan: Scan, lpet: np.ndarray | None = None, mr: np.ndarray | None = None, where: tuple = ()) -> Scan:
    """The scan with other images, or a part of it."""
    images = (scan.lpet if lpet is None else lpet, scan.mr if mr is None else mr)
    return Scan(*(image[where] for image in images), affine=scan.affine, dose_reduction=scan.dose_reduction)


def with_ball(scan: Scan, centre: tuple[int, int, int], factor: float, level: float) -> np.ndarray:
    """A hot sphere of 10 mm radius."""
    distance = sum(
        (axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, scan.lpet.shape))], centre, strict=True)
    )
    return np.where(distance < 25, np.float32(factor * level), scan.lpet)


def brain_activity() -> tuple[Rows, Notes]:
    """Restored activity of the brain, well away from what was put beside it, against that without it."""
    scan, model = head(14), mf.load_pretrained("cpu")
    level, plain = float(scan.spet[scan.mask].mean()), model.restore(scan, 2).mean
    air = ~(scan.lpet > 0.3 * level)
    inputs = {
        f"hot sphere, {f} times the brain, {where}": (with_ball(scan, centre, f, level), None)
        for f in (5, 10, 20, 40)
        for where, centre in {"below the head": (64, 30, 3), "in the air": (10, 60, 7)}.items()
    }
    spoiled = scan.lpet.copy()
    spoiled[5, 64, 7], spoiled[64, 20, 3] = 1e9, 1e6
    inputs["two absurd voxels"] = (spoiled, None)
    inputs["10 % offset of the air"] = (np.where(air, scan.lpet + np.float32(0.1 * level), scan.lpet), None)
    inputs["stripped skull"] = (scan.lpet * scan.mask, scan.mr * scan.mask)
    brain = smooth_mask(scan.mask)
    inputs["stripped skull, smooth mask"] = (scan.lpet * brain, scan.mr * brain)
    notes = []
    for name, (lpet, mr) in inputs.items():
        changed = np.abs(lpet - scan.lpet) > 1e-6 * level
        far = scan.mask & ~near(changed) if "sphere" in name or "voxels" in name else scan.mask
        moved = 100 * (float(model.restore(cut(scan, lpet, mr), 2).mean[far].sum() / plain[far].sum()) - 1)
        notes.append({"input": name, "result": f"brain activity {moved:+.2f} %", "moved": moved})
    return {"brain_activity": max(abs(note["moved"]) for note in notes)}, notes


def smooth_mask(mask: np.ndarray) -> np.ndarray:
    """As brain extraction makes it: sulci and ventricles closed."""
    margin = ((0, 0), (0, 0), (4, 4))
    closed = ndimage.binary_closing(np.pad(mask, margin, mode="edge"), iterations=3)
    return ndimage.binary_fill_holes(closed)[..., 4:-4]


def near(where: np.ndarray) -> np.ndarray:
    """Within 14 mm of it."""
    return ndimage.distance_transform_edt(~where, 2.0) < 14


CUTS = {  # name -> (part of the field of view, axis, end)
    "left half": (np.s_[:64], 0, -1),
    "right half": (np.s_[62:], 0, 0),
    "front": (np.s_[:, 60:], 1, 0),
    "back": (np.s_[:, :60], 1, -1),
    "8 sagittal slices": (np.s_[56:64], 0, 0),
    "4 coronal slices": (np.s_[:, 62:66], 1, -1),
    "3 axial slices": (np.s_[:, :, 5:8], 2, 0),
}


def edges() -> tuple[Rows, Notes]:
    """Activity of the brain's voxels in the outermost layer of a cut, against the same voxels restored in the whole."""
    model, found = mf.load_pretrained("cpu"), {name: [] for name in CUTS}
    for seed in (11, 12, 13):
        scan = head(14, seed)
        whole = model.restore(scan, 2).mean
        for name, (where, axis, end) in CUTS.items():
            part, layer = model.restore(cut(scan, where=where), 2).mean, [slice(None)] * 3
            layer[axis] = end
            brain = scan.mask[where][tuple(layer)]
            found[name].append([part[tuple(layer)][brain].sum(), whole[where][tuple(layer)][brain].sum()])
    off = {name: 100 * (np.sum(pairs, 0)[0] / np.sum(pairs, 0)[1] - 1) for name, pairs in found.items()}
    notes = [{"input": f"field of view: {n}", "result": f"outermost voxels {v:+.1f} %"} for n, v in off.items()]
    return {"edges": max(map(abs, off.values()))}, notes


# --- the eleven cases ------------------------------------------------------------------------------------------------


class Case:
    """Files of a simulated slab, and commands on them."""

    def __init__(self, folder: Path, slices: int = 14):
        self.folder, self.scan = folder, head(slices, seed=5)
        self.level = float(self.scan.spet[self.scan.mask].mean())
        self.lpet, self.mr = self.save("lpet", self.scan.lpet), self.save("mr", self.scan.mr)

    def save(self, name: str, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path = self.folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(data, np.float32), self.scan.affine if affine is None else affine), path)
        return path

    def restore(self, lpet: object = None, mr: object = None, *more: str) -> tuple[int, str, np.ndarray | None]:
        """Exit status, what was said, and the restored image of two samples."""
        out = self.folder / "out.nii.gz"
        for path in (out, self.folder / "out.json"):
            path.unlink(missing_ok=True)
        command = ["restore", "--lpet", f"{lpet or self.lpet}", "--mr", f"{mr or self.mr}", "--out", f"{out}"]
        more = more if "--samples" in more else ("--samples", "2", *more)
        more = more if "--dose-reduction" in more else ("--dose-reduction", "20", *more)
        status, said = self.run(*command, *more)
        return status, said, nib.load(out).get_fdata(dtype=np.float32) if out.exists() else None

    def run(self, *arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "mfdiff_lite", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, done.stderr

    def refused(self, words: str, *arguments: object) -> bool:
        status, said, image = self.restore(*arguments)
        return status == 2 and words in said and image is None


def fov_edge(c: Case) -> bool:
    whole, half = c.restore()[2], c.restore(c.save("half", c.scan.lpet[:64]))[2]
    brain = c.scan.mask[63]
    return abs(half[63][brain].sum() / whole[63][brain].sum() - 1) < 0.05


def hot_organ(c: Case) -> bool:
    plain, lpet = c.restore()[2], with_ball(c.scan, (64, 30, 3), 40, c.level)
    _, said, image = c.restore(c.save("hot", lpet))
    far = c.scan.mask & ~near(lpet != c.scan.lpet)
    return "warning" in said and abs(image[far].sum() / plain[far].sum() - 1) < 0.02


def stripped(c: Case) -> bool:
    k = c.scan.mask
    image = c.restore(c.save("ss", c.scan.lpet * k), c.save("ssm", c.scan.mr * k))[2]
    return not image[~k].any() and abs(image[k].sum() / c.scan.lpet[k].sum() - 1) < 0.02


def damaged_weights(c: Case) -> bool:
    shipped = Path(mf.__file__).parent / "weights" / "stage1.safetensors"
    content, path = bytearray(shipped.read_bytes()), c.folder / "flip.safetensors"
    middle = len(content) * 3 // 4 // 4 * 4
    content[middle : middle + 4] = b"\xff" * 4
    path.write_bytes(content)
    return c.refused("expected weights saved by this package", None, None, "--weights", f"{path}")


def absurd_numbers(c: Case) -> bool:
    return c.refused("dose_reduction: expected", None, None, "--dose-reduction", "1e9") and c.refused(
        "n_samples: expected", None, None, "--samples", "100000"
    )


def wrong_mr(c: Case) -> bool:
    moved = c.scan.affine.copy()
    moved[0, 3] += 20
    wrong = {
        "shifted": c.save("shifted", c.scan.mr, moved),
        "mirrored": c.save("mirrored", c.scan.mr[::-1]),
        "constant": c.save("constant", np.full_like(c.scan.mr, 7)),
        "the PET": c.save("pet", c.scan.lpet),
    }
    return all(said_of(c.restore(None, mr), "MR") for mr in wrong.values())


def said_of(answer: tuple[int, str, object], word: str) -> bool:
    """Warned of, or refused."""
    return answer[0] in (0, 2) and any(word in line for line in answer[1].splitlines() if "mfdiff_lite:" in line)


def two_orientations(c: Case) -> bool:
    cos, sin = np.cos(0.35), np.sin(0.35)
    turn = np.array([[cos, 0, sin, 5], [0, 1, 0, -3], [-sin, 0, cos, 2], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(c.scan.lpet, c.scan.affine)
    image.set_sform(turn @ c.scan.affine, 1)
    image.set_qform(c.scan.affine, 1)
    nib.save(image, c.folder / "sq.nii.gz")
    status, said, _ = c.restore(c.folder / "sq.nii.gz")
    written = nib.load(c.folder / "out.nii.gz") if status == 0 else None
    agree = written is None or np.allclose(written.get_sform(), written.get_qform(), atol=1e-2)
    return "sform" in said and "qform" in said and agree


def mislabelled(c: Case) -> bool:
    raw = nib.Nifti1Image(c.scan.lpet, c.scan.affine).to_bytes()
    contents = {
        "raw.nii.gz": (raw, "unpacked NIfTI"),
        "packed.nii": (c.lpet.read_bytes(), "gzip data"),
        "noending": (raw, "rename it"),
        "empty.nii.gz": (b"", "an empty file"),
        "lfs.nii.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", "git-lfs pointer"),
        "page.nii.gz": (b"<html>login</html>", "web page"),
        "one.dcm": (bytes(128) + b"DICM", "DICOM"),
    }
    right = []
    for name, (content, words) in contents.items():
        (c.folder / name).write_bytes(content)
        right.append(c.refused(words, c.folder / name))
    annex = c.folder / "annex.nii.gz"
    annex.symlink_to("../.git/annex/objects/aa/bb/MD5E-s1--x.nii.gz")
    return all(right) and c.refused("git-annex", annex)


def negatives_and_nan(c: Case) -> bool:
    lpet, low = c.scan.lpet, c.scan.lpet < 0.02 * c.scan.lpet.max()
    ringing = lpet.copy()
    ringing[20:24, 20:24, 5] = -2e-3 * lpet.max()
    nan = np.where(low, np.nan, lpet)
    status, _, image = c.restore(c.save("nan", nan))
    clipped = c.restore(c.save("ringing", ringing))
    offset = c.refused("at least 0", c.save("background", np.where(low, -4.3, lpet)))
    same = status == 0 and np.array_equal(np.isnan(image), np.isnan(nan))
    return same and offset and clipped[0] == 0 and "clipped" in clipped[1]


def identical_halves(c: Case) -> bool:
    halves = ["--objective", "split", "--half-a", f"{c.lpet}", "--half-b", f"{c.lpet}"]
    out = ["--mr", f"{c.mr}", "--out", f"{c.folder / 'a.safetensors'}", "--dose-reduction", "20", "steps=2"]
    status, said = c.run("adapt", "--lpet", f"{c.lpet}", *halves, *out)
    return status == 2 and "halves" in said.lower()


def small_things(c: Case) -> bool:
    nib.save(nib.Nifti2Image(c.scan.lpet, c.scan.affine), c.folder / "n2.nii.gz")
    status, said, _ = c.restore(c.folder / "n2.nii.gz")
    address = c.refused("an address of the network", "https://example.org/l.nii.gz")
    return status == 0 and "sizeof_hdr" not in said and address


CASES: dict[str, Callable[[Case], bool]] = {
    "edge of the field of view": fov_edge,
    "hot organ": hot_organ,
    "stripped skull": stripped,
    "damaged weights": damaged_weights,
    "absurd dose and samples": absurd_numbers,
    "wrong MR": wrong_mr,
    "sform against qform": two_orientations,
    "mislabelled files and pointers": mislabelled,
    "negatives and NaN": negatives_and_nan,
    "identical halves": identical_halves,
    "NIfTI-2, an address for a file": small_things,
}


def cases() -> tuple[Rows, Notes]:
    """The eleven that failed when they were reported."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        right = {name: bool(check(case)) for name, check in CASES.items()}
    notes = [{"input": name, "result": "right" if ok else "WRONG"} for name, ok in right.items()]
    return {"cases": sum(right.values())}, notes


def fuzzed(count: int = 10_000) -> tuple[Rows, Notes]:
    """Mutated inputs, see fuzz.py."""
    found = fuzz.run(count, seed=0)
    wrong = [one for one in found if one.status not in (0, 2)]
    kinds = sorted({one.kind for one in found})
    count = {kind: [one.status for one in found if one.kind == kind] for kind in kinds}
    notes = [
        {"input": f"fuzz: {kind}", "result": f"{s.count(0)} went through, {s.count(2)} refused, {len(s)} in all"}
        for kind, s in count.items()
    ]
    return {"fuzz_inputs": len(found), "fuzz_exits": len(wrong)}, notes


def survived() -> tuple[Rows, Notes]:
    """Kills, a full disk and damaged caches, see faults.py."""
    found = faults.run()
    notes = [
        {"input": n, "result": "nothing half-written, nothing wrong" if ok else "FAILED"} for n, ok in found.items()
    ]
    return {"faults": sum(not ok for ok in found.values())}, notes


MEASURES: dict[str, Callable[..., tuple[Rows, Notes]]] = {
    "brain_activity": brain_activity,
    "edges": edges,
    "cases": cases,
    "fuzz": fuzzed,
    "faults": survived,
}


def table_block(stored: dict[str, Notes]) -> str:
    """What was put in and what it gave, in Markdown."""
    lines = [f"| {note['input']} | {note['result']} |" for name in MEASURES for note in stored.get(name, [])]
    return "\n".join(["| input or fault | what it gave |", "|---|---|", *lines, ""])


def main(
    chosen: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(MEASURES)}; default: all")] = None,
    inputs: Annotated[int, typer.Option(help="of fuzz")] = 10_000,
) -> None:
    """Measure what real inputs do, and write what was found."""
    path = RESULTS / "real.json"
    for name in chosen or MEASURES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are among what is asked for
            rows, notes = MEASURES[name](*([inputs] if name == "fuzz" else []))
        targets = Targets("real", {row: GOALS[row] for row in rows}, "make real")
        for row, value in rows.items():
            targets.add(row, value)
        print(*(f"{note['input']:60} {note['result']}" for note in notes), sep="\n")
        targets.show()
        targets.write()
        stored = json.loads(path.read_text()) if path.exists() else {}
        stored[name] = [{"input": note["input"], "result": note["result"]} for note in notes]
        write_json("real.json", stored)


if __name__ == "__main__":
    typer.run(main)
