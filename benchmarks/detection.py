"""Did the filter remove the lesion? Known lesions, present or absent on the same background, and observers that look.

    make detection                      # about half an hour; ARGS=--quick for a look

PET-only lesions of four sizes, hot and cold, around the threshold of the low-dose image, are put into virtual patients
of the test anatomy. Each patient is scanned twice, with them and without, with independent noise, and restored. A
channelised Hotelling observer (and one that does not prewhiten, as a check) sees the axial slice through the lesion's
middle in both, and says which one holds it (`metrics.forced_choice`). The same on plain images of other doses gives the
equivalent dose of a method: the dose of plain images with which the observer does as well; and so does the PSNR against
the truth, for comparison.

The filters were tuned on validation patients (`make evidence`), the lesions' contrasts chosen on the validation anatomy
(`--anatomy ahba-15496`, writes nothing), where the AUC of the LPET is 0.5 to 0.9.

Writes results/detection.json, results/detection.png and the rows of group "detect" in results/targets.json.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer
from tqdm import tqdm

from mfdiff_lite import metrics
from mfdiff_lite.baselines import gaussian, kernel_em
from mfdiff_lite.config import TEST_ANATOMIES
from mfdiff_lite.model import MFdiff, load_pretrained
from mfdiff_lite.phantom import Randomisation, VirtualPatient, ellipsoid, free_place, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from results import DOSE, RESULTS, Targets, write_json

CONTRASTS = {6: 1.0, 8: 0.6, 10: 0.4, 15: 0.2}  # mm across -> |activity / background - 1|
DOSES = (1, 2, 4, 8, 20)  # dose-reduction factors of the plain images
SIDE = 13  # pixels of a patch
APART = 20.0  # mm between lesions at least: no patch shows two
K = 2  # samples of a restoration
PLAIN, OURS = f"LPET (DRF {DOSE})", f"mean of {K}"
GOALS = {
    "auc_lpet": ("AUC at 8 mm: restored minus the LPET", "", ">=", 0.0, None),
    "auc_gaussian": ("... minus the tuned Gaussian", "", ">=", 0.0, None),
    "auc_kernel_em": ("... minus kernel EM", "", ">=", 0.0, None),
    "equivalent_dose": (
        "dose of plain images with the AUC of the restored, all sizes, over the LPET's",
        "x",
        ">=",
        2.0,
        None,
    ),
}


@dataclasses.dataclass(frozen=True)
class Signal:
    """A lesion that may be there: centre [voxel], mm across, hot or cold."""

    centre: tuple[int, int, int]
    across: int
    hot: bool


def with_and_without(anatomy: str, seed: int, slices: int) -> tuple[VirtualPatient, VirtualPatient, list[Signal]]:
    """A patient without any lesion, the same one with signals in its activity alone, and the signals."""
    healthy = virtual_patient(
        load_anatomy(anatomy), seed, slices=slices, randomisation=Randomisation(lesions_per_100ml=(0.0, 0.0))
    )
    rng, activity = np.random.default_rng([seed, 61]), healthy.activity.copy()
    margin = SIDE // 2
    inner = healthy.mask.copy()
    inner[..., :2], inner[..., -2:] = False, False
    places, taken, signals = np.argwhere(inner), [], []
    for number in rng.permutation(64):
        across, hot = list(CONTRASTS)[number % 4], bool(number // 4 % 2)
        centre = free_place(places, taken, across / 2 + APART - 6, rng)
        if centre is None or (centre[:2] < margin).any():
            continue
        near, inside = ellipsoid(activity.shape, centre, across / 2, (1.0, 1.0, 1.0))
        activity[near] *= 1 + (CONTRASTS[across] if hot else -min(CONTRASTS[across], 1.0)) * inside
        taken.append((centre, across / 2))
        signals.append(Signal(tuple(int(c) for c in centre), across, hot))
    return healthy, dataclasses.replace(healthy, activity=activity), signals


def images_of(model: MFdiff, patient: VirtualPatient, seed: int, tuned: dict) -> dict[str, np.ndarray]:
    """Name -> image: plain ones at every dose, and what each method makes of the LPET."""
    scanner = Scanner()
    standard = scanner.acquire(patient.activity, patient.attenuation, seed)
    low = standard.thin(DOSE, seed + 1)
    lpet = scanner.reconstruct(low)
    scan = Scan(lpet, patient.mr, mask=patient.mask, affine=patient.affine, dose_reduction=DOSE, sinogram=low)
    restored = model.restore(scan, K, seed=seed)
    images = {PLAIN: lpet, "Gaussian": gaussian(scan, **tuned["gaussian"])}
    images |= {"kernel EM": kernel_em(scan, **tuned["kernel_em"]), "coarse": restored.coarse}
    images |= {"one sample": restored.samples[0], OURS: restored.mean}
    doses = {f"DRF {d}": scanner.reconstruct(standard.thin(d, seed + 2) if d > 1 else standard) for d in DOSES[:-1]}
    return images | {"SPET" if name == "DRF 1" else name: image for name, image in doses.items()}


def patches(image: np.ndarray, signals: list[Signal]) -> np.ndarray:
    """(n, SIDE^2): the axial slice round the middle of each signal; beyond the image its edge."""
    margin = SIDE // 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    cut = [padded[x : x + SIDE, y : y + SIDE, z].ravel() for x, y, z in (one.centre for one in signals)]
    return np.array(cut).reshape(len(cut), SIDE**2)


def collect(
    model: MFdiff, anatomy: str, count: int, slices: int, tuned: dict
) -> tuple[dict, dict, list[Signal], np.ndarray]:
    """Of each image the differences (n, SIDE^2) and the PSNR against the truth of each patient; the signals, and the
    patient of each."""
    found: dict[str, list[np.ndarray]] = {}
    psnr: dict[str, list[float]] = {}
    signals, patients = [], []
    for seed in tqdm(range(980_000, 980_000 + count), desc="patients", unit="patient"):
        absent, present, some = with_and_without(anatomy, seed, slices)
        pair = [images_of(model, patient, 10 * seed + i, tuned) for i, patient in enumerate((absent, present))]
        for name, image in pair[1].items():
            found.setdefault(name, []).append(patches(image, some) - patches(pair[0][name], some))
            psnr.setdefault(name, []).append(metrics.psnr(image, present.activity, present.mask))
        signals += some
        patients += [seed] * len(some)
    return {name: np.concatenate(parts) for name, parts in found.items()}, psnr, signals, np.array(patients)


def observed(differences: np.ndarray, signals: list[Signal], patients: np.ndarray, across: list[int]) -> dict:
    """{"right": {patient: share} over the sizes in `across`}: each size and polarity has its own template."""
    shares: dict[str, dict[int, list[float]]] = {"hotelling": {}, "not prewhitening": {}}
    for size in across:
        for hot in (True, False):
            chosen = np.array([one.across == size and one.hot == hot for one in signals])
            if len(np.unique(patients[chosen])) < 2:
                continue
            seen = {"hotelling": differences[chosen] @ metrics.channels(SIDE), "not prewhitening": differences[chosen]}
            for kind, values in seen.items():
                for patient, right in zip(
                    patients[chosen], metrics.forced_choice(values, patients[chosen], kind == "hotelling"), strict=True
                ):
                    shares[kind].setdefault(int(patient), []).append(float(right))
    return {kind: {str(p): float(np.mean(r)) for p, r in rows.items()} for kind, rows in shares.items()}


def equivalent_dose(value: float, curve: dict[int, float]) -> float:
    """Dose of plain images with this AUC, or PSNR, over that of the LPET; the curve is interpolated in log dose and not
    extrapolated."""
    doses = np.array(sorted(curve))[::-1]  # from the lowest dose on
    rising = np.maximum.accumulate([curve[d] for d in doses])
    return float(np.exp(np.interp(value, rising, np.log(DOSE / doses))))


def equivalent_doses(values: dict[str, float]) -> tuple[dict[int, float], dict[str, float]]:
    """The curve of the plain images over the dose-reduction factor, and the equivalent dose of every image."""
    curve = {d: values[{1: "SPET", DOSE: PLAIN}.get(d, f"DRF {d}")] for d in DOSES}
    return curve, {name: equivalent_dose(value, curve) for name, value in values.items()}


def report(found: dict, targets: Targets) -> None:
    """The rows of results/targets.json."""
    small = found["by_size"]["8"]["hotelling"]
    for name, goal in ((PLAIN, "auc_lpet"), ("Gaussian", "auc_gaussian"), ("kernel EM", "auc_kernel_em")):
        targets.add(
            goal, *metrics.mean_ci([small[OURS]["patients"][p] - v for p, v in small[name]["patients"].items()])
        )
    targets.add("equivalent_dose", found["equivalent_dose"][OURS])


def picture(found: dict) -> None:
    """AUC against dose: plain images as a curve, methods as points at the LPET's dose."""
    figure, axes = plt.subplots(figsize=(7, 4.6), facecolor="white", layout="constrained")
    rows, curve = found["by_size"]["all"]["hotelling"], {int(d): auc for d, auc in found["curve"].items()}
    doses = sorted(curve)
    axes.plot([100 / d for d in doses], [curve[d] for d in doses], "o-", color="0.4", label="plain images")
    for index, name in enumerate(n for n in rows if not n.startswith(("DRF", "SPET", "LPET"))):
        mean, (low, high) = rows[name]["mean"], rows[name]["ci95"]
        place = 100 / DOSE * 1.06 ** (index - 2)
        axes.errorbar(place, mean, [[mean - low], [high - mean]], fmt="s", capsize=3, label=name)
    axes.set(xscale="log", xlabel="dose [% of standard]", ylabel="area under the ROC curve")
    axes.set_xticks([100 / d for d in doses], [f"{100 / d:g}" for d in doses])
    axes.set_title(f"Known PET-only lesions at threshold, {found['setting']['signals']} of them")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "detection.png", dpi=100)


def table_block(found: dict) -> str:
    """AUC by size and method, and the equivalent dose."""
    sizes = [*map(str, CONTRASTS), "all"]
    heads = [f"{size} mm" if size != "all" else "all sizes" for size in sizes]
    last = "not prewhitening | equivalent dose | equivalent dose by PSNR against the truth"
    lines = [f"| AUC of the Hotelling observer | {' | '.join(heads)} | {last} |"]
    lines.append("|---" * (4 + len(sizes)) + "|")
    for name, dose in found["equivalent_dose"].items():
        cells = [_cell(found["by_size"][size]["hotelling"][name]) for size in sizes]
        cells.append(_cell(found["by_size"]["all"]["not prewhitening"][name]))
        cells += [f"{dose:.1f} x", f"{found['equivalent_dose_by_psnr'][name]:.1f} x"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> str:
    return f"{row['mean']:.2f} [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]"


def main(
    patients: Annotated[int, typer.Option(help="each scanned twice")] = 30,
    slices: Annotated[int, typer.Option(help="axial slices of each")] = 20,
    anatomy: Annotated[str, typer.Option(help="another one than the test anatomy writes nothing")] = TEST_ANATOMIES[0],
    quick: Annotated[bool, typer.Option("--quick", help="4 patients, nothing written")] = False,
) -> None:
    """Measure what known lesions at threshold are worth after restoring."""
    tuned = json.loads((RESULTS / "evidence.json").read_text())["setting"]["tuned"]  # on validation patients
    model, count = load_pretrained("cpu"), 4 if quick else patients
    differences, psnr, signals, owners = collect(model, anatomy, count, slices, tuned)
    by_size: dict[str, dict] = {}
    for size in (*CONTRASTS, "all"):
        across = list(CONTRASTS) if size == "all" else [size]
        each = {name: observed(values, signals, owners, across) for name, values in differences.items()}
        by_size[str(size)] = {
            kind: {
                name: {"patients": rows[kind]}
                | dict(zip(("mean", "ci95"), metrics.mean_ci(list(rows[kind].values())), strict=True))
                for name, rows in each.items()
            }
            for kind in ("hotelling", "not prewhitening")
        }
    curve, dose = equivalent_doses({name: row["mean"] for name, row in by_size["all"]["hotelling"].items()})
    against_truth = {name: float(np.mean(values)) for name, values in psnr.items()}
    found = {
        "setting": {"dose_reduction": DOSE, "patients": count, "slices": slices, "samples": K, "signals": len(signals)},
        "contrasts": CONTRASTS,
        "by_size": by_size,
        "curve": curve,
        "equivalent_dose": dose,
        "psnr_against_truth": against_truth,
        "equivalent_dose_by_psnr": equivalent_doses(against_truth)[1],
    }
    found["setting"]["weights"] = model.card.get("rounded_from", model.fingerprint)
    print(table_block(found))
    targets = Targets("detect", GOALS, "make detection")
    report(found, targets)
    targets.show()
    if quick or anatomy != TEST_ANATOMIES[0]:
        return
    write_json("detection.json", found)
    targets.write()
    picture(found)


if __name__ == "__main__":
    typer.run(main)
