"""Noise that clinics have: filtered, strong, correlated; and slices that come alone. Is the model above a Gaussian?

    make noise                          # half an hour; ARGS=--quick for a look

Real scans are filtered by 0 to 8 mm in three dimensions and have anything from many counts to hardly any. So the second
simulator (second_simulator.py, nothing is trained on it) scans heads of the test anatomy at all of these; correlated
noise is also laid over its SPET. The Gaussian is the best for each scan, its width chosen on the SPET itself, a bound
that no user reaches. Where it is better, is the user warned, and what does adapting to the scan get back? A single
slice of the package's own scanner is held against the best 2-D Gaussian.

Writes results/any_noise.json and the rows of group "noise" in results/targets.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Annotated, Any

import numpy as np
import typer
from scipy import ndimage
from tqdm import tqdm

from mfdiff_lite import metrics
from mfdiff_lite.baselines import gaussian, tune
from mfdiff_lite.checks import check_scan
from mfdiff_lite.config import FWHM_TO_SD, TEST_ANATOMIES
from mfdiff_lite.model import MFdiff, load_pretrained
from mfdiff_lite.scan import Scan
from mfdiff_lite.stage2 import adapt, refusal
from results import DOSE, Targets, scans, write_json
from second_simulator import second_scan

TRACERS, SEED = ("fdg", "amyloid"), 5
FILTERS = (0.0, 4.0, 6.0, 8.0)  # mm FWHM, in three dimensions
COUNTS = (200_000, 50_000, 12_500)  # prompts a slice of the LPET
LAID_OVER = (5.0, 8.0)  # mm FWHM of noise of 30 % that is laid over the SPET
SHARE = 0.3
WIDTHS = {"fwhm": np.arange(0.0, 16.1, 0.5)}
GOALS = {
    "worst": ("restored minus the best 3-D Gaussian, the worst scan of all filters and counts", "dB", ">=", -0.1, 0.3),
    "mean": ("... mean over the scans", "dB", ">=", 0.8, 1.5),
    "laid_over": (
        "restored minus the best Gaussian under correlated noise laid over the SPET, worst",
        "dB",
        ">=",
        -0.1,
        0.3,
    ),
    "losing_warned": (
        "scans on which the best Gaussian is better by more than 0.1 dB that a check warns of",
        "%",
        ">=",
        90.0,
        100.0,
    ),
    "losing_adapted": ("restored after --adapt minus the best Gaussian, mean over these scans", "dB", ">=", -0.1, 0.3),
    "single_slice": ("one slice alone, restored minus the best 2-D Gaussian", "dB", ">=", 1.5, 2.0),
}


def losing(row: dict[str, Any]) -> bool:
    """Whether a user had better taken a Gaussian."""
    return row["restored"] < row["Gaussian"] - 0.1


def after_adapting(model: MFdiff, scan: Scan) -> dict[str, Any]:
    """PSNR against the SPET [dB] after stage 2 on the LPET alone, and why that was refused."""
    adapted = adapt(model, dataclasses.replace(scan, spet=None, activity=None), device="cpu")
    return {
        "adapted": metrics.psnr(adapted.restore(scan, 4).mean, scan.spet, scan.mask),
        "refused": refusal(adapted.card),
    }


def judged(model: MFdiff, scan: Scan) -> dict[str, float]:
    """PSNR against the SPET [dB] of LPET, best Gaussian and restored image, and the Gaussian's width [mm]."""
    fwhm = tune(gaussian, [scan], **WIDTHS)["fwhm"]
    images = {"LPET": scan.lpet, "Gaussian": gaussian(scan, fwhm), "restored": model.restore(scan, 4).mean}
    return {name: metrics.psnr(image, scan.spet, scan.mask) for name, image in images.items()} | {"fwhm": float(fwhm)}


def laid_over(scan: Scan, fwhm: float, seed: int = 0) -> Scan:
    """The SPET with noise of SHARE of the activity, correlated over `fwhm` mm, in the LPET's place."""
    noise = np.random.default_rng(seed).standard_normal(scan.lpet.shape)
    noise = ndimage.gaussian_filter(noise, [fwhm * FWHM_TO_SD / v for v in scan.voxel_size], mode="wrap")
    return dataclasses.replace(scan, lpet=np.clip(scan.spet * (1 + SHARE * noise / noise.std()), 0, None))


def alone(scan: Scan) -> Scan:
    """The middle slice."""
    z = slice(scan.lpet.shape[2] // 2, scan.lpet.shape[2] // 2 + 1)
    cut = {name: getattr(scan, name)[..., z] for name in ("lpet", "mr", "spet", "mask")}
    return Scan(**cut, affine=scan.affine, dose_reduction=scan.dose_reduction, name=f"{scan.name}, one slice")


def block(found: dict) -> str:
    """PSNR [dB] against the SPET by filter and counts."""
    lines = ["| | " + " | ".join(f"{c:,} counts a slice" for c in COUNTS) + " |", "|---" * (1 + len(COUNTS)) + "|"]
    for tracer, width in itertools.product(TRACERS, FILTERS):
        cells = []
        for count in COUNTS:
            row = found["scans"][f"{tracer}, {width:g} mm, {count}"]
            cells.append(f"{row['LPET']:.1f} / {row['Gaussian']:.1f} / {row['restored']:.1f}")
        lines.append(f"| {tracer}, post-filter {width:g} mm | " + " | ".join(cells) + " |")
    for name, row in found["laid over"].items():
        lines.append(
            f"| {name} | {row['LPET']:.1f} / {row['Gaussian']:.1f} / {row['restored']:.1f} |" + " |" * (len(COUNTS) - 1)
        )
    return "\n".join(lines) + "\n"


def main(quick: Annotated[bool, typer.Option("--quick", help="fewer scans, nothing written")] = False) -> None:
    """Measure the shipped weights on noise of any kind."""
    model, anatomy = load_pretrained("cpu"), TEST_ANATOMIES[0]
    found: dict = {"weights": model.card.get("rounded_from", model.fingerprint), "scans": {}, "laid over": {}}
    cases = list(itertools.product(TRACERS[:1] if quick else TRACERS, FILTERS, COUNTS))
    for tracer, width, count in tqdm(cases, desc="filters and counts", unit="scan"):
        scan = second_scan(anatomy, SEED, tracer, DOSE, count * DOSE, width, slices=16)
        row: dict[str, Any] = judged(model, scan)
        row["warned"] = [one.name for one in check_scan(scan) if one.severity != "fine"]
        row |= after_adapting(model, scan) if losing(row) else {}
        found["scans"][f"{tracer}, {width:g} mm, {count}"] = row
        line = {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
        tqdm.write(f"{tracer} {width:g} mm {count}: {json.dumps(line)}")
    for tracer, fwhm in itertools.product(TRACERS[:1] if quick else TRACERS, LAID_OVER):
        scan = laid_over(second_scan(anatomy, SEED, tracer, DOSE, slices=16), fwhm)
        row = found["laid over"][f"{tracer}, noise of {SHARE:.0%} over {fwhm:g} mm on the SPET"] = judged(model, scan)
        tqdm.write(f"{tracer} laid over {fwhm:g} mm: {json.dumps({k: round(v, 2) for k, v in row.items()})}")
    single = [judged(model, alone(scan)) for scan in scans([anatomy], 2 if quick else 12, 5, None, first=900_000)]
    found["single"] = {key: float(np.mean([row[key] for row in single])) for key in single[0]}
    print("one slice alone", {k: round(v, 2) for k, v in found["single"].items()})

    targets = Targets("noise", GOALS, "make noise")
    gain = [row["restored"] - row["Gaussian"] for row in found["scans"].values()]
    targets.add("worst", min(gain))
    targets.add("mean", *metrics.mean_ci(gain))
    targets.add("laid_over", min(row["restored"] - row["Gaussian"] for row in found["laid over"].values()))
    below = [row for row in found["scans"].values() if losing(row)]
    warned = [bool(row["warned"]) for row in below] or [True]  # where none is lost, none goes unwarned
    targets.add("losing_warned", 100 * float(np.mean(warned)))
    targets.add("losing_adapted", *metrics.mean_ci([row["adapted"] - row["Gaussian"] for row in below] or [0.0]))
    targets.add("single_slice", *metrics.mean_ci([row["restored"] - row["Gaussian"] for row in single]))
    targets.show()
    if not quick:
        write_json("any_noise.json", found)
        targets.write()


if __name__ == "__main__":
    typer.run(main)
