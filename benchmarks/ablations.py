"""Which part is worth what: the model, its baselines and itself without single parts, trained anew at one equal budget.

    make ablations                                          # all of them, about 10 minutes each on 2 cores
    python benchmarks/ablations.py "gated fusion" "MR concatenated" --steps 800

Every variant gets the same data, steps, batches, seed and, where a part is replaced and not removed, the same number of
parameters within 3 %. Trained in runs/ablations/, cut runs go on. Judged on validation patients, because this is where
design decisions are made; writes results/ablations.json. A short budget ranks; it does not tell what long training
reaches.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from mfdiff_lite.anatomy import load_anatomy
from mfdiff_lite.baselines import gaussian
from mfdiff_lite.config import VALIDATION_ANATOMIES, Profile, load_profile
from mfdiff_lite.evaluation import evaluate
from mfdiff_lite.model import MFdiff, load_model
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.scan import Scan
from mfdiff_lite.training import WEIGHTS, train_stage1
from results import DOSE, RESULTS, as_table, scans, write_json

RUNS = Path(__file__).parents[1] / "runs" / "ablations"
PLAIN = {"fusion_widths": (56, 104, 200)}  # one encoder instead of two: wider, so that the parameters stay the same
UNET = {"fusion_widths": (56, 120, 224), "denoiser_widths": ()}
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
    """Summary over patients against SPET and truth, with the right, another patient's and no MR; fidelity 0."""

    def with_mr(mr):
        return lambda s: (
            model.restore(Scan(s.lpet, mr(s), affine=s.affine, dose_reduction=DOSE, name=s.name), 4, fidelity=0.0).mean
        )

    methods = {
        "right MR": with_mr(lambda s: s.mr),
        "another patient's MR": with_mr(lambda s: s.other_mr),
        "no MR": with_mr(lambda s: None),
        "Gaussian": gaussian,
    }
    return evaluate(methods, cases)["summary"]


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="names; default: all of them")] = None,
    steps: Annotated[int, typer.Option(help="the common budget")] = 1000,
    profile: Annotated[str, typer.Option(help="smoke for a try, cpu for numbers")] = "cpu",
    patients: Annotated[int, typer.Option(help="validation patients")] = 6,
) -> None:
    """Train the variants at one budget and compare them on validation patients."""
    unknown = [name for name in variants or [] if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"expected names out of {', '.join(VARIANTS)}, found {unknown[0]!r}")
    cases = scans(VALIDATION_ANATOMIES, patients, 24 if profile == "cpu" else 6, None, first=500_000)
    for scan in cases:
        other = load_anatomy("icbm152")
        scan.other_mr = virtual_patient(other, 1, slices=scan.lpet.shape[2]).mr
    found = {}
    for name in variants or VARIANTS:
        model = trained(name, steps, profile)
        summary = judged(model, cases)
        found[name] = {
            "steps": steps,
            "parameters": model.n_parameters,
            "minutes": model.card["training_minutes"],
            **summary,
        }
        rows = {n: r["spet"]["right MR"] for n, r in found.items()} | {"Gaussian": summary["spet"]["Gaussian"]}
        print(as_table(f"{steps} steps, DRF {DOSE}, n = {patients}, against SPET", rows))
    if profile == "cpu":
        path = RESULTS / "ablations.json"
        held = json.loads(path.read_text())["variants"] if path.exists() else {}
        setting = {"patients": patients, "dose_reduction": DOSE, "samples": 4, "fidelity": 0.0}
        write_json("ablations.json", {"setting": setting, "variants": held | found})


if __name__ == "__main__":
    typer.run(main)
