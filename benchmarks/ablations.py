"""Which part is worth what: the model, its baselines and itself without single parts, trained anew at one equal budget.

    make ablations                                          # all of them, about 10 minutes each on 2 cores
    python benchmarks/ablations.py "gated fusion" "MR concatenated" --steps 800

Every variant gets the same data, steps, batches, seed and, where a part is replaced and not removed, the same number of
parameters within 3 %. Trained in runs/ablations/, cut runs go on. No setting is chosen here: all variants are judged
once on the test patients of `make results`. Writes results/ablations.json, results/tradeoff.png and, once the four of
HEADLINE are there, rows of group "evidence" in results/targets.json. A short budget ranks; it does not tell what long
training reaches.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer
from scipy import ndimage
from tqdm import tqdm

from mfdiff_lite import metrics
from mfdiff_lite.anatomy import load_anatomy
from mfdiff_lite.baselines import gaussian
from mfdiff_lite.config import TEST_ANATOMIES, Profile, load_profile
from mfdiff_lite.evaluation import evaluate, score
from mfdiff_lite.model import FIDELITY_SD, MFdiff, load_model
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.scan import Scan
from mfdiff_lite.training import WEIGHTS, train_stage1
from results import DOSE, RESULTS, SLICES, Targets, as_table, scans, write_json, write_readme

K = 4  # samples of a restoration
HEADLINE = ("gated fusion", "MR concatenated", "PET only", "regression U-Net, PET + MR")
BUDGET = "all trained alike for the steps in results/ablations.json"
GOALS = {
    "matched_unet": (f"PSNR over the regression U-Net of the same size, PET + MR; {BUDGET}", "dB", ">=", -0.1, 0.2),
    "pet_only": (f"PSNR over PET-only diffusion; {BUDGET}", "dB", ">=", 0.4, 1.0),
    "concat_psnr": (f"PSNR over MR-concat diffusion; {BUDGET}", "dB", ">=", -0.05, None),
    "concat_leak": (f"false contrast at MR-only lesions over MR concat's; {BUDGET}", "", "<=", 0.5, 0.25),
    "concat_contrast": (f"PET-only contrast kept minus MR concat's; {BUDGET}", "", ">=", 0.03, 0.08),
    "other_mr_pet_only": (f"PSNR with another patient's MR below the PET-only model; {BUDGET}", "dB", "<=", 0.3, 0.1),
    "no_mr_pet_only": (f"PSNR without MR below the PET-only model; {BUDGET}", "dB", "<=", 0.3, 0.1),
}
RUNS = Path(__file__).parents[1] / "runs" / "ablations"
PLAIN = {"fusion_widths": (40, 88, 160)}  # one encoder instead of two: wider, so that the parameters stay the same
UNET = {"fusion_widths": (48, 104, 216), "denoiser_widths": ()}
VARIANTS: dict[str, dict] = {
    "gated fusion": {},
    "MR concatenated": {"fusion": "concat", **PLAIN},
    "PET only": {"fusion": "pet", **PLAIN},
    "regression U-Net, PET + MR": {"fusion": "concat", **UNET},
    "regression U-Net, PET": {"fusion": "pet", **UNET},
    "no MR dropout or swap": {"no_mr": 0.0, "wrong_mr": 0.0},
    "no lesion weight": {"lesion_weight": 0.0},
    "one slice": {"context": 1},
    "three slices": {"context": 3},
}


def profile_of(variant: str, steps: int, base: str = "cpu") -> Profile:
    """The profile of a variant: the base profile with its part replaced and the common budget."""
    return load_profile(base, **VARIANTS[variant], steps=steps, validate_every=steps)


def trained(variant: str, steps: int, base: str) -> MFdiff:
    """The variant's averaged weights, trained now or taken from a finished run."""
    out = RUNS / f"{re.sub(r'[^a-z]+', '-', variant.lower())}-{base}-{steps}"
    if not (out / WEIGHTS).exists():
        states = train_stage1(profile_of(variant, steps, base), out, resume=True)
        for state in tqdm(states, total=steps, desc=variant, unit="step", mininterval=5):
            last = state
        tqdm.write(f"{variant}: {json.dumps(last.validation)}")
    return load_model(out / WEIGHTS)


def judged(model: MFdiff, cases: list[Scan]) -> dict:
    """Patients and summary, with the right, another patient's and no MR; and the curve of fidelity."""
    means = {}

    def with_mr(name, mr):
        def restore(scan):
            part = Scan(scan.lpet, mr(scan), affine=scan.affine, dose_reduction=DOSE, name=scan.name)
            means[name, scan.name] = model.restore(part, K, fidelity=0.0).mean
            return means[name, scan.name]

        return restore

    methods = {
        "right MR": with_mr("right", lambda s: s.mr),
        "another patient's MR": with_mr("other", lambda s: s.other_mr),
        "no MR": with_mr("no", lambda s: None),
    }
    table = evaluate(methods, tqdm(cases, desc="judging", unit="patient", leave=False))
    curve = []
    for fidelity in (0.0, 0.25, 0.5, 0.75, 1.0):
        images = [(s, means["right", s.name] + fidelity * _smooth(s.lpet - means["right", s.name])) for s in cases]
        curve.append({"fidelity": fidelity, **point([(s, image.clip(min=0)) for s, image in images])})
    return table | {"curve": curve}


def _smooth(image: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, FIDELITY_SD, mode="nearest")


def point(images: list[tuple[Scan, np.ndarray]]) -> dict[str, float]:
    """One point of the trade-off: mean PSNR and contrast kept over patients, against SPET."""
    rows = [score(image, scan.spet, scan.mask, scan) for scan, image in images]
    return {key: float(np.nanmean([row[key] for row in rows])) for key in ("psnr", "contrast_kept")}


def report(variants: dict[str, dict], targets: Targets) -> None:
    """The rows of the headline comparison, paired over patients."""
    ours, concat, pet_only, unet = (variants[name]["patients"] for name in HEADLINE)

    def paired(first, second, metric="psnr", against="spet", condition="right MR"):
        pairs = zip(first, second, strict=True)
        return [a[against][condition][metric] - b[against]["right MR"][metric] for a, b in pairs]

    targets.add("matched_unet", *metrics.mean_ci(paired(ours, unet)))
    targets.add("pet_only", *metrics.mean_ci(paired(ours, pet_only)))
    targets.add("concat_psnr", *metrics.mean_ci(paired(ours, concat)))
    leak = [np.nanmean([p["truth"]["right MR"]["mr_leak"] for p in patients]) for patients in (ours, concat)]
    targets.add("concat_leak", leak[0] / leak[1])
    targets.add("concat_contrast", *metrics.mean_ci(paired(ours, concat, "contrast_kept")))
    for name, condition in (("other_mr_pet_only", "another patient's MR"), ("no_mr_pet_only", "no MR")):
        lost = [-x for x in paired(ours, pet_only, condition=condition)]
        targets.add(name, *metrics.mean_ci(lost))


def picture(found: dict) -> None:
    """PSNR against lesion contrast kept: a curve for every model, so that nobody wins one by selling the other."""
    figure, axes = plt.subplots(figsize=(7, 4.6), facecolor="white", layout="constrained")
    for name, one in found["variants"].items():
        points = one["curve"]
        style = {"lw": 2.5} if name == HEADLINE[0] else {"lw": 1.2, "alpha": 0.9}
        axes.plot([p["contrast_kept"] for p in points], [p["psnr"] for p in points], "o-", ms=4, label=name, **style)
    points = found["gaussian"]
    axes.plot(
        [p["contrast_kept"] for p in points], [p["psnr"] for p in points], "s--", ms=4, color="0.4", label="Gaussian"
    )
    n, steps = found["setting"]["patients"], found["setting"]["steps"]
    axes.set(
        xlabel="contrast of PET-only lesions kept (SPET = 1)",
        ylabel="PSNR against SPET [dB]",
        title=f"Trade-off by fidelity, {steps} steps each, DRF {DOSE}, n = {n} patients",
    )
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "tradeoff.png", dpi=100)


def readme_block(found: dict) -> str:
    """PSNR, contrast kept and leak of every variant, with the right, another patient's and no MR."""
    lines = ["| | PSNR [dB] | another patient's MR | no MR | PET-only contrast kept | MR leak |", "|---" * 6 + "|"]
    for name, one in found["variants"].items():
        against = {key: one["summary"][key] for key in ("spet", "truth")}
        cells = [f"{against['spet'][mr]['psnr']['mean']:.2f}" for mr in ("right MR", "another patient's MR", "no MR")]
        cells += [f"{against['spet']['right MR']['contrast_kept']['mean']:.3f}"]
        cells += [f"{against['truth']['right MR']['mr_leak']['mean']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="names; default: all of them")] = None,
    steps: Annotated[int, typer.Option(help="the common budget")] = 1000,
    profile: Annotated[str, typer.Option(help="smoke for a try, cpu for numbers")] = "cpu",
    patients: Annotated[int, typer.Option(help="test patients")] = 6,
) -> None:
    """Train the variants at one budget and compare them on test patients."""
    unknown = [name for name in variants or [] if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"expected names out of {', '.join(VARIANTS)}, found {unknown[0]!r}")
    models = {name: trained(name, steps, profile) for name in variants or VARIANTS}
    cases = scans(TEST_ANATOMIES, patients, SLICES[False] if profile == "cpu" else 6, None, first=900_000)
    for scan in cases:
        scan.other_mr = virtual_patient(load_anatomy("icbm152"), 1, slices=scan.lpet.shape[2]).mr
    setting = {"patients": patients, "dose_reduction": DOSE, "samples": K, "steps": steps}
    path = RESULTS / "ablations.json"
    found = json.loads(path.read_text()) if path.exists() and profile == "cpu" else {}
    if found.get("setting") != setting:
        found = {"setting": setting, "variants": {}}
    found["gaussian"] = [
        {"fwhm": w, **point([(s, gaussian(s, w)) for s in cases])} for w in (3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
    ]
    for name, model in models.items():
        about = {"parameters": model.n_parameters, "minutes": model.card["training_minutes"]}
        found["variants"][name] = about | judged(model, cases)
        rows = {n: one["summary"]["spet"]["right MR"] for n, one in found["variants"].items()}
        print(as_table(f"{steps} steps, DRF {DOSE}, n = {patients}, against SPET", rows))
        if profile == "cpu":
            write_json("ablations.json", found)
    if profile == "cpu" and all(name in found["variants"] for name in HEADLINE):
        targets = Targets("evidence", GOALS, "make ablations")
        report(found["variants"], targets)
        targets.show()
        targets.write()
        picture(found)
        write_readme(readme_block(found), "ablations")


if __name__ == "__main__":
    typer.run(main)
