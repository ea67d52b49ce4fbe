"""How often the checks of a scan are right: `make checks` (half an hour on one core; `--quick` for a look).

Good scans: the test anatomy on the default scanner, on every shift of `phantom.SHIFTS`, on scanners as in training, and
on the second simulator. What the truth bears out is no false alarm: some of these tracers have a contrast that no
training scan has, and "contrast" is then the right thing to say (row `warned_contrast`); everything else that is said
of a good scan is a false alarm. Bad ones: each of these with one thing wrong, see `bad`; right is only what is not said
of the good scan too. Limits were set on the other anatomies (`--tuning` measures those). Writes results/checks.json and
rows of group "real" in results/targets.json.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from mfdiff_lite.anatomy import embedded_anatomy
from mfdiff_lite.checks import Finding, Seen, findings
from mfdiff_lite.config import FWHM_TO_SD, TEST_ANATOMIES, TRAIN_ANATOMIES, VALIDATION_ANATOMIES
from mfdiff_lite.phantom import SHIFTS, virtual_patient
from mfdiff_lite.readers.register import rigid_motion
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from results import RESULTS, Targets, write_json
from second_head import TRACERS
from second_simulator import second_scan

DOSE = 20
UNLIKE, ALIKE = 1.4, 1.8  # true mean activity, grey / white: below, a contrast that training (2.0 and more, lesions and
# regions aside) never has, and it must be said; above, it must not; between, either is right
KINDS = {  # kind of bad input: what the row says
    "mr as lpet": "wrong modality: the MR given as LPET",
    "pet as mr": "wrong modality: the PET given as MR",
    "constant mr": "an MR without contrast",
    "exchanged": "LPET and MR exchanged",
    "shifted 10 mm": "MR shifted by 10 mm",
    "mirrored": "MR mirrored left-right",
    "another head": "MR of another head",
    "dose times 4": "DRF stated 4 times too high",
    "dose over 4": "DRF stated 4 times too low",
    "spet as lpet": "SPET given as LPET",
    "noise level": "noise outside training: a fiftieth of the usual counts",
    "smooth noise": "noise outside training: smooth over 12 mm, 35 % of the activity",
    "contrast": "a tracer's contrast that training never has",
    "same halves": "one file as both halves",
    "other halves": "halves that do not add up to the LPET",
}
GOALS = {f"warned_{k.replace(' ', '_')}": (f"warned or refused: {v}", "%", ">=", 90.0, 98.0) for k, v in KINDS.items()}
GOALS |= {
    "false_alarms": ("said of good scans and not so, mean of both simulators", "%", "<=", 5.0, 1.0),
    "registration_median": ("registration error after 20 mm and 15 degrees, DRF 20, median", "mm", "<=", 2.0, 1.0),
    "registration_p95": ("... 95th percentile", "mm", "<=", 4.0, 2.0),
}


def good_scans(tuning: bool, quick: bool) -> Iterator[tuple[str, Scan]]:
    """(group, scan) of every shift and of the second simulator, which takes turns with the first."""
    heads = TRAIN_ANATOMIES if tuning else TEST_ANATOMIES
    head = (VALIDATION_ANATOMIES if tuning else TEST_ANATOMIES)[0]
    for number, shift in enumerate([None, *SHIFTS][: 3 if quick else None]):
        patient = virtual_patient(embedded_anatomy(heads[number % len(heads)]), 7000 + number, shift, 24)
        yield "first", Scanner.shifted(shift).scan(patient, DOSE, halves=True)
        if number < 6:
            yield "second", second_scan(head, 7100 + number, list(TRACERS)[number % 3], DOSE, halves=True)


def on_grid_of(scan: Scan, mr: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """An MR resampled to a scan's grid, as `load_scan` has it."""
    there = resample_from_to(nib.Nifti1Image(mr, affine), (scan.lpet.shape, scan.affine), order=1)
    return np.asarray(there.dataobj, np.float32)


def moved(scan: Scan, distance: float, rng: np.random.Generator) -> Scan:
    """The MR shifted by so many mm in any direction."""
    way = rng.normal(size=3)
    affine = scan.affine.copy()
    affine[:3, 3] += distance * way / np.linalg.norm(way)
    return replace(scan, mr=on_grid_of(scan, scan.mr, affine))


def noisy(scan: Scan, rng: np.random.Generator) -> Scan:
    """Smooth strong noise on the SPET: 12 mm FWHM, 35 % of the brain's mean, growing with the root of the activity."""
    sd = [12 * FWHM_TO_SD / v for v in scan.voxel_size]
    noise = ndimage.gaussian_filter(rng.standard_normal(scan.lpet.shape), sd, mode="wrap")
    mean = scan.spet[scan.mask].mean()
    image = scan.spet + 0.35 * np.sqrt(mean * scan.spet) * noise / noise.std()
    return replace(scan, lpet=image.clip(min=0), halves=None)


def bad(group: str, scan: Scan, number: int, other: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[str, Scan]]:
    """(kind, scan with that wrong)."""
    rng = np.random.default_rng(number)
    plain = replace(scan, halves=None)
    yield "mr as lpet", replace(plain, lpet=scan.mr)
    yield "pet as mr", replace(plain, mr=scan.lpet)
    yield "constant mr", replace(plain, mr=np.full_like(scan.mr, 7))
    yield "exchanged", replace(plain, lpet=scan.mr, mr=scan.lpet)
    yield "shifted 10 mm", moved(plain, 10, rng)
    yield "mirrored", replace(plain, mr=scan.mr[::-1])
    yield "another head", replace(plain, mr=on_grid_of(scan, *other))
    yield "dose times 4", replace(plain, dose_reduction=4 * DOSE)
    yield "dose over 4", replace(plain, dose_reduction=DOSE / 4)
    yield "spet as lpet", replace(plain, lpet=scan.spet)
    if number % 3 == 0:
        yield "noise level", few_counts(group, number)
    yield "smooth noise", noisy(plain, rng)
    yield "same halves", replace(scan, halves=(scan.halves[0],) * 2)
    yield "other halves", replace(scan, halves=tuple(1.2 * half for half in scan.halves))


def few_counts(group: str, number: int) -> Scan:
    """A scan of a fiftieth of the counts, its DRF stated as that of the others."""
    if group == "second":
        return second_scan(TEST_ANATOMIES[0], 7200 + number, "fdg", DOSE, counts_per_slice=6e4)
    patient = virtual_patient(embedded_anatomy(TEST_ANATOMIES[0]), 7200 + number, slices=16)
    return Scanner(trues_per_mm3=1.0).scan(patient, DOSE)


def said(found: list[Finding]) -> list[str]:
    """Names of the findings that are not fine."""
    return [one.name for one in found if one.severity != "fine"]


def measure_checks(tuning: bool, quick: bool, minutes: float) -> dict:
    """Kind -> what was said about each scan; "good" by simulator; and the numbers behind."""
    heads = [virtual_patient(embedded_anatomy(name), 90) for name in TRAIN_ANATOMIES[: 2 if quick else 4]]
    found: dict = defaultdict(list)
    began = time.monotonic()
    for number, (group, scan) in enumerate(tqdm(good_scans(tuning, quick), desc="scans")):
        base = Seen(replace(scan, mask=None))
        good, ratio = findings(base), grey_to_white(scan)
        row = {"scan": scan.name, "grey_to_white": round(ratio, 2), "all": said(good)} | numbers(good)
        so = {"contrast"} if ratio < ALIKE else set()
        found[f"good, {group}"].append(row | {"said": [name for name in said(good) if name not in so]})
        if ratio < UNLIKE:
            found["contrast"].append(row | {"said": [name for name in said(good) if name == "contrast"]})
        head = heads[number % len(heads)]
        for kind, wrong in bad(group, scan, number, (head.mr, head.affine)):
            one = findings(seen_as(base, replace(wrong, mask=None)))
            new = [name for name in said(one) if name not in said(good)]
            found[kind].append({"scan": scan.name, "said": new} | numbers(one))
        if time.monotonic() - began > 60 * minutes:
            break
    return dict(found)


def grey_to_white(scan: Scan) -> float:
    """True mean activity of grey over white matter."""
    grey, white = (scan.activity[scan.mask & (scan.tissues == label)].mean() for label in (1, 2))
    return float(grey / white)


def seen_as(base: Seen, scan: Scan) -> Seen:
    """`Seen(scan)`, without preparing again what it shares with another scan."""
    if not np.array_equal(scan.lpet, base.scan.lpet):
        return Seen(scan)
    seen = Seen.__new__(Seen)
    same = np.array_equal(scan.mr, base.scan.mr)
    kept = ("grid", "lpet", "mask", "noise", "counts", "compared", *(("fit", "same_noise") if same else ()))
    mr = base.mr if same else base.grid.to(scan.mr)
    seen.__dict__.update({key: base.__dict__[key] for key in kept if key in base.__dict__}, scan=scan, mr=mr)
    return seen


def numbers(found: list[Finding]) -> dict[str, float]:
    """Name -> value of every finding."""
    return {one.name: float(f"{one.value:.4g}") for one in found}


def registration_errors(moves: int, distance: float, degrees: float, tuning: bool = False) -> list[float]:
    """Mean distance [mm] of the brain's voxels from where they belong, after a move and its registration; four moves of
    every patient."""
    errors, head = [], (VALIDATION_ANATOMIES if tuning else TEST_ANATOMIES)[0]
    for number in tqdm(range(moves), desc=f"registering, {distance:g} mm and {degrees:g} degrees"):
        if number % 4 == 0:
            patient = virtual_patient(embedded_anatomy(head), 7300 + number, slices=40)
            scan = Scanner().scan(patient, DOSE)
            points = nib.affines.apply_affine(scan.affine, np.argwhere(scan.mask)[::50])
        rng = np.random.default_rng([number, int(distance), int(degrees)])
        way, axis = rng.normal(size=(2, 3))
        motion, centre = np.eye(4), points.mean(0)
        motion[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
        motion[:3, 3] = centre + distance * way / np.linalg.norm(way) - motion[:3, :3] @ centre
        back, _ = rigid_motion(scan, nib.Nifti1Image(scan.mr, motion @ scan.affine))
        there = nib.affines.apply_affine(back @ motion, points)
        errors.append(float(np.linalg.norm(there - points, axis=1).mean()))
    return errors


def rates(found: dict) -> dict[str, float]:
    """Share of the scans about which anything was said, in %."""
    return {kind: 100 * float(np.mean([bool(row["said"]) for row in rows])) for kind, rows in found.items()}


def measure_registration(moves: int, quick: bool, tuning: bool) -> dict[str, list[float]]:
    """Move -> its errors."""
    errors = {}
    for distance, degrees in [(20, 15)] if quick else [(20, 15), (5, 5), (10, 10), (40, 30)]:
        count = moves if distance == 20 else max(4, moves // 5)
        errors[f"{distance} mm, {degrees} degrees"] = registration_errors(count, distance, degrees, tuning)
    for name, found in errors.items():
        print(f"{name}: median {np.median(found):.2f} mm, 95th percentile {np.quantile(found, 0.95):.2f} mm")
    return errors


def main(
    quick: Annotated[bool, typer.Option("--quick", help="few scans, nothing written")] = False,
    tuning: Annotated[bool, typer.Option("--tuning", help="anatomies that limits are set on; nothing written")] = False,
    part: Annotated[str, typer.Option(help="all, checks or registration")] = "all",
    minutes: Annotated[float, typer.Option(help="begin no further scan after so many minutes")] = float("inf"),
    moves: Annotated[int, typer.Option(help="moves of 20 mm and 15 degrees to register")] = 20,
) -> None:
    """Measure hit and false-alarm rates, and the registration's error."""
    parts = ("checks", "registration") if part == "all" else (part,)
    goals = {name: goal for name, goal in GOALS.items() if name.startswith("registration") == ("registration" in parts)}
    targets, stored = Targets("real", GOALS if part == "all" else goals, "make checks"), RESULTS / "checks.json"
    content: dict = {}
    if "checks" in parts:
        found = measure_checks(tuning, quick, minutes)
        shares = rates(found)
        for kind, share in shares.items():
            print(f"{kind:>16}  {share:5.1f} % of {len(found[kind])}")
        for kind in KINDS:
            targets.add(f"warned_{kind.replace(' ', '_')}", shares[kind])
        targets.add("false_alarms", (shares["good, first"] + shares["good, second"]) / 2)
        content |= {"rates": shares, "scans": found}
    if "registration" in parts:
        content["registration_mm"] = measure_registration(4 if quick else moves, quick, tuning)
        errors = content["registration_mm"]["20 mm, 15 degrees"]
        targets.add("registration_median", float(np.median(errors)))
        targets.add("registration_p95", float(np.quantile(errors, 0.95)))
    targets.show()
    if not (quick or tuning):
        targets.write()
        held = json.loads(stored.read_text()) if stored.exists() else {}  # the other part's
        write_json("checks.json", held | content | {"revision": targets.revision})


if __name__ == "__main__":
    typer.run(main)
