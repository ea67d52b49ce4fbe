"""The evidence beyond one table: classical baselines, an MR audit, lesions by size, uncertainty and texture.

    make evidence                       # about half an hour; ARGS=--quick for a look

Filters are tuned, and the recalibration of the SD is fitted, on validation patients; test patients are touched once.
Writes results/evidence.json, results/audit.png, results/reliability.png and the rows of group "evidence" in
results/targets.json. Rows that need trained baselines are measured by `make ablations`.
"""

from __future__ import annotations

from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer
from scipy import ndimage
from scipy.stats import wilcoxon
from tqdm import tqdm

from mfdiff_lite import metrics
from mfdiff_lite.baselines import gaussian, kernel_em, mr_guided, non_local_means, tune
from mfdiff_lite.config import TEST_ANATOMIES, VALIDATION_ANATOMIES
from mfdiff_lite.evaluation import audit_mr, evaluate, mr_conditions, summarise
from mfdiff_lite.look import panel
from mfdiff_lite.model import START, STEPS, MFdiff, Restoration, load_pretrained
from mfdiff_lite.scan import Scan
from results import DOSE, RESULTS, SLICES, Targets, as_table, paired, scans, write_json

OURS, K = "restored, mean of 8", 8
LEVELS = (0.5, 0.8, 0.9)
SIZES = {"large": (10.0, 15.0), "small": (6.0, 10.0)}  # mm across
GRIDS = {
    gaussian: {"fwhm": np.arange(3.0, 7.01, 0.5)},
    non_local_means: {"strength": (0.03, 0.06, 0.12), "fwhm": (3.0, 4.0)},
    mr_guided: {"fwhm": (4.5, 6.0, 8.0), "contrast": (0.3, 0.6, 1.0)},
    kernel_em: {"fwhm": (3.0, 4.0), "contrast": (0.5, 1.0)},
}
SAMPLERS = {
    f"as shipped: DPM-Solver++, {STEPS} steps from {START:g} T, K = 8": {},
    "K = 2": {"n_samples": 2},
    "K = 32": {"n_samples": 32},
    "2 steps": {"steps": 2},
    "4 steps": {"steps": 4},
    "12 steps": {"steps": 12},
    "from 0.3 T": {"start": 0.3},
    "from 0.5 T": {"start": 0.5},
    "from 0.8 T": {"start": 0.8},
    "from pure noise, 12 steps": {"start": 1.0, "steps": 12},
    "DDIM": {"method": "ddim"},
}
GOALS = {
    "gain_over_lpet": ("PSNR of the K=8 mean over the LPET", "dB", ">=", 5.0, 7.0),
    "gain_over_gaussian": ("... over the tuned Gaussian", "dB", ">=", 1.5, 2.5),
    "gain_over_mr_guided": ("... over the tuned MR-guided filter", "dB", ">=", 1.0, 2.0),
    "bias_grey": ("|bias of grey matter|", "%", "<=", 3.0, 1.5),
    "bias_white": ("|bias of white matter|", "%", "<=", 3.0, 1.5),
    "contrast_large": ("PET-only lesions 10 to 15 mm across: contrast kept (SPET = 1)", "", ">=", 0.85, 0.95),
    "contrast_small": ("PET-only lesions 6 to 10 mm across: contrast kept (SPET = 1)", "", ">=", 0.75, 0.90),
    "coverage_90": ("coverage of the 90 % interval, recalibrated on validation (ideal: 90)", "%", ">=", 80.0, 87.0),
    "one_sample": ("PSNR of the K=64 mean minus one sample (ideal: 3 dB)", "dB", ">=", 2.0, 2.7),
    "texture": ("noise SD of a sample in white matter over the SPET's (ideal: 1)", "", ">=", 0.7, 0.9),
    "other_mr": ("PSNR lost to no MR with another patient's MR", "dB", "<=", 0.3, 0.1),
    "fit_right": ("how much the model trusts the right MR, 0 to 1", "", ">=", 0.9, 0.97),
    "fit_other": ("... another patient's MR", "", "<=", 0.5, 0.1),
    "error_small": (
        "error of a lesion's contrast, 6 to 10 mm, minus the lowest of the other methods",
        "",
        "<=",
        0.0,
        None,
    ),
}


def white_roi(scan: Scan) -> np.ndarray:
    """White matter two voxels away from all else, and from lesions."""
    inside = (scan.tissues == 2) & (scan.lesions == 0)
    return ndimage.binary_erosion(inside, iterations=2)


def uncertainty(restored: Restoration, scan: Scan, scale: float) -> dict[str, float]:
    """Coverage at each level, as it comes and with the SD times `scale`; texture of sample, mean and coarse."""
    roi, spet = white_roi(scan), scan.spet
    row = {}
    for level in LEVELS:
        row[f"coverage_{level:g}"] = metrics.coverage(restored.mean, restored.std, spet, scan.mask, level)
        row[f"recalibrated_{level:g}"] = metrics.coverage(restored.mean, restored.std, spet, scan.mask, level, scale)
    fine = metrics.texture(spet, roi)
    images = {"sample": restored.samples[0], "mean": restored.mean, "coarse": restored.coarse, "lpet": scan.lpet}
    return row | {f"texture_{name}": metrics.texture(image, roi) / fine for name, image in images.items()}


def single_against_mean(model: MFdiff, scan: Scan, slices: int, k: int = 64) -> float:
    """PSNR of the mean of k samples minus that of one [dB], on the middle slices."""
    first = scan.lpet.shape[2] // 2 - slices // 2
    cut = (..., slice(first, first + slices))
    part = Scan(scan.lpet[cut], scan.mr[cut], affine=scan.affine, dose_reduction=DOSE)
    restored, spet, mask = model.restore(part, k), scan.spet[cut], scan.mask[cut]
    singles = [metrics.psnr(one, spet, mask) for one in restored.samples[:4]]
    return metrics.psnr(restored.mean, spet, mask) - float(np.mean(singles))


def samplers(model: MFdiff, cases: list[Scan]) -> dict[str, dict[str, float]]:
    """What steps, warm start, solver and K do to the mean and to one sample; means over patients."""
    found = {}
    for name, options in tqdm(SAMPLERS.items(), desc="samplers", unit="setting"):
        rows = []
        for scan in cases:
            restored = model.restore(scan, **({"n_samples": K} | options))
            one, roi = restored.samples[0], white_roi(scan)
            row = {"psnr": metrics.psnr(restored.mean, scan.spet, scan.mask)}
            row["psnr_sample"] = metrics.psnr(one, scan.spet, scan.mask)
            row["texture_sample"] = metrics.texture(one, roi) / metrics.texture(scan.spet, roi)
            rows.append(row | {"coverage_90": metrics.coverage(restored.mean, restored.std, scan.spet, scan.mask)})
        found[name] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return found


def audit(model: MFdiff, cases: list[Scan]) -> list[dict[str, dict[str, float]]]:
    """`audit_mr` of each patient, and whether the model says that the MR fits."""
    found = []
    for scan in tqdm(cases, desc="MR audit", unit="patient"):
        fits = []

        def restore(lpet, mr, scan=scan, fits=fits):
            restored = model.restore(Scan(lpet, mr, affine=scan.affine, dose_reduction=DOSE), 2)
            fits.append(np.nan if restored.fit is None else restored.fit)
            return restored.mean

        rows = audit_mr(restore, scan).rows
        found.append({name: row | {"fit": fit} for (name, row), fit in zip(rows.items(), fits, strict=True)})
    return found


def audit_picture(model: MFdiff, scan: Scan) -> None:
    """What each MR of the audit does to one slice: the MR, and restored minus restored without MR."""
    conditions = mr_conditions(scan)
    z = int(np.argmax([np.isin(scan.lesions[..., k], _labels(scan, "mr-only")).sum() for k in range(scan.mr.shape[2])]))
    cut = (..., slice(max(z - 2, 0), z + 3))
    images = {}
    for name, mr in conditions.items():
        part = Scan(scan.lpet[cut], None if mr is None else mr[cut], affine=scan.affine, dose_reduction=DOSE)
        images[name] = model.restore(part, 4).mean[..., min(z, 2)]
    wrong = [name for name, mr in conditions.items() if mr is not None]
    fig, axes = plt.subplots(2, len(wrong), figsize=(2.6 * len(wrong), 6.4), facecolor="white", layout="constrained")
    size = float(np.percentile(np.abs(images["right MR"] - images["no MR"]), 99.8))
    for column, name in zip(axes.T, wrong, strict=True):
        panel(column[0], conditions[name][..., z], name, "MR signal [arbitrary]", cmap="gray")
        change = images[name] - images["no MR"]
        panel(column[1], change, "what it changes", "difference [kBq/mL]", (-size, size), "RdBu_r")
    fig.savefig(RESULTS / "audit.png", dpi=90)


def _labels(scan: Scan, kind: str) -> list[int]:
    return [one.label for one in scan.lesion_table if one.kind == kind]


def reliability_picture(rows: dict[str, dict], scale: float) -> None:
    """Coverage against level, as it comes and recalibrated."""
    fig, ax = plt.subplots(figsize=(4.6, 4.2), facecolor="white", layout="constrained")
    for name, key, mark in (("as it comes", "coverage", "s--"), (f"SD x {scale:.1f}", "recalibrated", "o-")):
        ax.plot(100 * np.array(LEVELS), [100 * rows[f"{key}_{level:g}"]["mean"] for level in LEVELS], mark, label=name)
    ax.plot([0, 100], [0, 100], ":", color="0.5", label="perfect")
    ax.set(xlabel="interval [%]", ylabel="SPET voxels inside [%]", title=f"Coverage, DRF {DOSE}", xlim=(0, 100))
    ax.set_ylim(0, 100)
    ax.legend()
    fig.savefig(RESULTS / "reliability.png", dpi=90)


def size_and_region(x: np.ndarray, scan: Scan) -> dict[str, float]:
    """What `score` leaves out: contrast kept by lesion size, and bias by tissue, against SPET."""
    brain, row = scan.tissues > 0, {}
    for size, across in SIZES.items():
        known = (x, scan.spet, scan.lesions, scan.lesion_table, brain, "pet-only", across)
        row[f"contrast_{size}"] = metrics.contrast_kept(*known)
        row[f"contrast_error_{size}"] = metrics.contrast_error(*known)["rms"]
    for value, tissue in ((1, "grey"), (2, "white")):
        row[f"bias_{tissue}"] = metrics.activity_bias(x, scan.spet, (scan.tissues == value) & scan.mask)
    return row


def report(found: dict, targets: Targets) -> None:
    """The rows of results/targets.json."""
    ours, spread = found["by_size_and_region"][OURS], found["uncertainty"]
    for baseline, goal in (("LPET", "lpet"), ("gaussian", "gaussian"), ("mr guided", "mr_guided")):
        targets.add(f"gain_over_{goal}", *paired(found["table"], OURS, baseline, "psnr"))
    for tissue in ("grey", "white"):
        bias = ours[f"bias_{tissue}"]
        targets.add(f"bias_{tissue}", abs(100 * bias["mean"]), sorted(abs(100 * c) for c in bias["ci95"]))
    for kept in (f"contrast_{size}" for size in SIZES):
        if kept in ours:  # few patients may have no lesion of a size
            targets.add(kept, ours[kept]["mean"], ours[kept]["ci95"])
    cover = spread["recalibrated_0.9"]
    targets.add("coverage_90", 100 * cover["mean"], [100 * c for c in cover["ci95"]])
    targets.add("one_sample", found["one_sample"]["mean"], found["one_sample"]["ci95"])
    targets.add("texture", spread["texture_sample"]["mean"], spread["texture_sample"]["ci95"])
    lost = [row["no MR"]["psnr"] - row["another patient's MR"]["psnr"] for row in found["audit"]["patients"]]
    targets.add("other_mr", *metrics.mean_ci(lost))
    for goal, name in (("fit_right", "right MR"), ("fit_other", "another patient's MR")):
        targets.add(goal, *metrics.mean_ci([row[name]["fit"] for row in found["audit"]["patients"]]))
    errors = {n: row["contrast_error_small"]["mean"] for n, row in found["by_size_and_region"].items()}
    targets.add("error_small", errors[OURS] - min(error for name, error in errors.items() if name != OURS))


def table_block(found: dict) -> str:
    """Three tables: methods by what they keep and bend, the MR audit of the model, and its samplers."""
    table, extra, audited = found["table"]["summary"], found["by_size_and_region"], found["audit"]["summary"]
    n, patients = len(found["table"]["patients"]), len(found["audit"]["patients"])

    def interval(cell: dict) -> str:
        return f"{cell['mean']:.2f} [{cell['ci95'][0]:.2f}, {cell['ci95'][1]:.2f}]"

    heads = [f"PSNR [dB] against SPET, n = {n}", "against the truth", "contrast kept: 10 to 15 mm", "6 to 10 mm"]
    heads += ["error per lesion: 10 to 15 mm", "6 to 10 mm", "grey matter", "white matter", "MR leak, truth"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name, more in extra.items():
        cells = [interval(table[against][name]["psnr"]) for against in ("spet", "truth")]
        cells += [f"{more[f'contrast_{size}']['mean']:.2f}" for size in SIZES]
        cells += [f"{more[f'contrast_error_{size}']['mean']:.2f}" for size in SIZES]
        cells += [f"{100 * more[f'bias_{tissue}']['mean']:+.1f} %" for tissue in ("grey", "white")]
        cells.append(f"{table['truth'][name]['mr_leak']['mean']:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| MR given to the model | PSNR [dB] against SPET, n = {patients} | contrast kept | MR leak, SPET | fit |",
    ]
    lines.append("|---" * 5 + "|")
    for name, row in audited.items():
        kept, leak = (f"{row[key]['mean']:.3f}" for key in ("contrast_kept", "mr_leak"))
        fit = f"{row['fit']['mean']:.2f}" if "fit" in row else ""
        lines.append(f"| {name} | {interval(row['psnr'])} | {kept} | {leak} | {fit} |")
    lines += [
        "",
        "| sampler, validation patients | PSNR [dB] of the mean | of one sample | its texture | 90 % interval covers |",
    ]
    lines.append("|---" * 5 + "|")
    for name, row in found["samplers"].items():
        cells = [f"{row['psnr']:.2f}", f"{row['psnr_sample']:.2f}", f"{row['texture_sample']:.2f}"]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{100 * row['coverage_90']:.0f} %"]) + " |")
    return "\n".join(lines) + "\n"


def tune_all(quick: bool) -> tuple[dict, list[Scan]]:
    """The best settings of every filter on validation patients, and these patients."""
    cases = scans(VALIDATION_ANATOMIES, 2 if quick else 4, 6 if quick else 10, None, first=500_000)
    return {
        method: tune(method, tqdm(cases, desc=f"tuning {method.__name__}"), **GRIDS[method]) for method in GRIDS
    }, cases


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 patients, few slices, nothing written")] = False,
) -> None:
    """Measure the shipped weights against filters, wrong MRs and their own uncertainty."""
    RESULTS.mkdir(exist_ok=True)
    model, targets = load_pretrained("cpu"), Targets("evidence", GOALS, "make evidence")
    tuned, validation = tune_all(quick)
    drawn = [model.restore(s, K) for s in tqdm(validation, desc="calibration", unit="patient")]
    scale = float(
        np.mean([metrics.calibration(r.mean, r.std, s.spet, s.mask) for r, s in zip(drawn, validation, strict=True)])
    )
    sampled = samplers(model, validation)
    cases = scans(TEST_ANATOMIES, 2 if quick else 12, SLICES[quick], None, first=900_000)
    restored = {s.name: model.restore(s, K) for s in tqdm(cases, desc="restoring", unit="patient")}
    methods = {m.__name__.replace("_", " "): lambda s, m=m, kw=kw: m(s, **kw) for m, kw in tuned.items()}
    methods[OURS] = lambda s: restored[s.name].mean
    table = evaluate(methods, tqdm(cases, desc="baselines", unit="patient"))
    extra = {
        name: summarise([{"x": size_and_region(method(s), s)} for s in cases])["x"] for name, method in methods.items()
    }
    spread = summarise([{"x": uncertainty(restored[s.name], s, scale)} for s in cases])["x"]
    audited = audit(model, cases[: 2 if quick else 6])
    audit_summary = summarise(audited)
    single = metrics.mean_ci([single_against_mean(model, s, 2 if quick else 4) for s in cases[:4]])

    for against in ("spet", "truth"):
        print(f"\n{as_table(f'DRF {DOSE}, n = {len(cases)}, against {against}', table['summary'][against])}")
    print(f"\n{as_table(f'MR audit, DRF {DOSE}, n = {len(audited)}, against SPET', audit_summary)}\n")
    for name, row in sampled.items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    for name, row in (extra | {"uncertainty": spread}).items():
        print(name, {k: round(v["mean"], 3) for k, v in row.items()})

    settings = {method.__name__: {k: float(v) for k, v in kw.items()} for method, kw in tuned.items()}
    found = {
        "setting": {"dose_reduction": DOSE, "samples": K, "revision": targets.revision, "tuned": settings},
        "table": table,
        "by_size_and_region": extra,
        "uncertainty": {"sd_scale": scale, **spread},
        "one_sample": dict(zip(("mean", "ci95"), single, strict=True)),
        "samplers": sampled,
        "audit": {"patients": audited, "summary": audit_summary},
        "wilcoxon_p_of_psnr": {
            name: float(wilcoxon([p["spet"][OURS]["psnr"] - p["spet"][name]["psnr"] for p in table["patients"]]).pvalue)
            for name in table["summary"]["spet"]
            if name != OURS
        },
    }
    report(found, targets)
    targets.show()
    if quick:
        return
    write_json("evidence.json", found)
    targets.write()
    audit_picture(model, cases[0])
    reliability_picture(spread, scale)


if __name__ == "__main__":
    typer.run(main)
