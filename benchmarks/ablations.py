"""Which part is worth what: the model, its baselines and itself without single parts, trained at one equal budget.

    make ablations                                          # all of them, about 10 minutes each on 2 cores
    python benchmarks/ablations.py "gated fusion" "one slice"
    python benchmarks/ablations.py --headline --seed 1      # the four that matter most, longer; one more seed
    python benchmarks/ablations.py --continued              # parts taken from the shipped weights, which then train on

Every variant gets the same data, steps, batches, seed and, where a part is replaced and not removed, the same number of
parameters within 3 %. Trained in runs/ablations/, cut runs go on. No setting is chosen here: all variants are judged
once on the test patients of `make results`. Writes results/ablations.json, results/tradeoff*.png and rows of group
"evidence" in results/targets.json. A short budget from random weights ranks what is learned first; it does not tell
what long training reaches. `--headline` goes three times as far, and averages over the seeds measured so far: another
seed means other simulated patients, other weights to start from, other batches. `--continued` starts from the shipped
weights: whoever can do without a part makes up for it in these steps.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from einops import repeat
from scipy import ndimage
from tqdm import tqdm

from mfdiff_lite import fusion, metrics
from mfdiff_lite.baselines import gaussian
from mfdiff_lite.config import TEST_ANATOMIES, Profile, load_profile
from mfdiff_lite.diffusion import diffuse, sample, velocity
from mfdiff_lite.evaluation import another_mr, evaluate, score, summarise
from mfdiff_lite.fusion import Fused, GatedFusion, local_correlation
from mfdiff_lite.model import START, STEPS, MFdiff, load_model, load_pretrained, residual_sd
from mfdiff_lite.scan import Scan
from mfdiff_lite.stage1 import WEIGHTS, train_stage1
from mfdiff_lite.view import FIDELITY_SD
from results import DOSE, RESULTS, SLICES, Targets, as_table, scans, write_json

K = 4  # samples of a restoration
HEADLINE = ("gated fusion", "MR concatenated", "PET only", "regression U-Net, PET + MR")
BUDGETS = {"variants": 500, "headline": 1500, "continued": 400}
BUDGET = "all trained alike for the steps of the headline in results/ablations.json"
FULL = "both trained on alike from the weights named in results/ablations.json"
GOALS = {
    "matched_unet": (f"PSNR over the regression U-Net of the same size, PET + MR; {BUDGET}", "dB", ">=", -0.1, 0.2),
    "pet_only": (f"PSNR over PET-only diffusion; {BUDGET}", "dB", ">=", 0.4, 1.0),
    "concat_psnr": (f"PSNR over MR-concat diffusion; {BUDGET}", "dB", ">=", -0.05, None),
    "concat_leak": (f"false contrast at MR-only lesions over MR concat's; {BUDGET}", "", "<=", 0.5, 0.25),
    "concat_contrast": (f"PET-only contrast kept minus MR concat's; {BUDGET}", "", ">=", 0.03, 0.08),
    "tradeoff": (
        f"PSNR over MR concat, U-Net and Gaussian at equal contrast, worst point; {BUDGET}",
        "dB",
        ">=",
        0,
        None,
    ),
    "other_mr_pet_only": (f"PSNR with another patient's MR below the PET-only model; {BUDGET}", "dB", "<=", 0.3, 0.1),
    "no_mr_pet_only": (f"PSNR without MR below the PET-only model; {BUDGET}", "dB", "<=", 0.3, 0.1),
}
CONTINUED_GOALS = {
    "pet_only_continued": (f"PSNR over the model that never sees an MR again; {FULL}", "dB", ">=", 0.4, 1.0),
    "other_mr_continued": (f"PSNR with another patient's MR below that model; {FULL}", "dB", "<=", 0.3, 0.1),
    "no_mr_continued": (f"PSNR without MR below that model; {FULL}", "dB", "<=", 0.3, 0.1),
    "dose_conditioned": (f"PSNR lost to a model of one dose, worst of DRF 4, 20, 100; {FULL}", "dB", "<=", 0.4, 0.15),
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
    "no coarse estimate": {},
    "no residual": {},
    "no MR dropout or swap": {"no_mr": 0.0, "wrong_mr": 0.0},
    "no lesion weight": {"lesion_weight": 0.0},
    "one slice": {"context": 1},
    "three slices": {"context": 3},
}
BLIND = "no MR, in training and after"
CONTINUED: dict[str, dict] = {
    "all parts": {},
    BLIND: {"no_mr": 1.0, "wrong_mr": 0.0},
    "no gate": {},
    "no similarity": {},
    "no MR dropout or swap": {"no_mr": 0.0, "wrong_mr": 0.0},
    "no lesion weight": {"lesion_weight": 0.0},
    "lesion weight times 4": {"lesion_weight": 32.0},
}
ALONE = {f"DRF {dose} alone": dose for dose in (4, 20, 100)}  # models of one dose
CONTINUED |= {name: {"dose_range": (float(dose), float(dose)), "patients": 160} for name, dose in ALONE.items()}
WHOLE_SD = 0.5  # of the scaled activity in a slice, rough: makes the image of order 1 for the denoiser
SCHEDULE = {"learning_rate": 4e-4, "warmup": 50}  # of CONTINUED


def _without_gate(self: GatedFusion, p: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, ...]:
    _, gate, similarity = _fuse(self, p, m)
    pn, mn = (torch.nn.functional.instance_norm(x) for x in (p, m))
    return p + self.refine(self.attend(pn, mn)), torch.ones_like(gate), similarity


def _without_similarity(pn: torch.Tensor, mn: torch.Tensor) -> torch.Tensor:
    return 0 * local_correlation(pn, mn)


def _without_coarse(self: MFdiff, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"diffusion": _losses(self, *batch)["diffusion"]}  # the head stays at zero: coarse is a fixed Gaussian


def _losses_of_whole(self: MFdiff, batch: dict, t: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """The denoiser generates the image itself, not what the coarse estimate lacks."""
    fused = self.fusion(batch["lpet"], batch["mr"], batch["dose"])
    weight = batch["weight"] / batch["weight"].mean()
    lacking = (batch["spet"] - fused.coarse) / residual_sd(batch["dose"])
    x0 = batch["spet"] / WHOLE_SD
    v = self._denoise(diffuse(x0, noise, t, self.schedule), t, batch["lpet"], fused.feature, batch["dose"])
    wrong = v - velocity(x0, noise, t, self.schedule)
    return {"coarse": (weight * lacking**2).mean(), "diffusion": (weight * wrong**2).mean()}


@torch.no_grad()
def _restore_whole(
    self: MFdiff, lpet, mr, dose, noise, steps=STEPS, start=START, method="dpm++", generator=None
) -> tuple[torch.Tensor, Fused]:
    """Its samples; the warm start begins at the coarse estimate, as with the residual."""
    fused, k = self.fusion(lpet, mr, dose), noise.shape[1]
    lpets, features, doses, guess = (
        repeat(x, "b ... -> (b k) ...", k=k) for x in (lpet, fused.feature, dose, fused.coarse / WHOLE_SD)
    )
    drawn = sample(
        lambda xt, t: self._denoise(xt, t, lpets, features, doses),
        noise.flatten(0, 1)[:, None],
        self.schedule,
        steps,
        start,
        method,
        guess,
        generator,
    )
    return WHOLE_SD * drawn.unflatten(0, (-1, k))[:, :, 0], fused


_fuse, _losses = GatedFusion.forward, MFdiff.forward
ALTERED: dict[str, list[tuple[object, str, Callable]]] = {  # what no profile switches off: where, which name, by what
    "no gate": [(GatedFusion, "forward", _without_gate)],
    "no similarity": [(fusion, "local_correlation", _without_similarity)],
    "no coarse estimate": [(MFdiff, "forward", _without_coarse)],
    "no residual": [(MFdiff, "forward", _losses_of_whole), (MFdiff, "restore_slices", _restore_whole)],
}


@contextlib.contextmanager
def altered(variant: str) -> Iterator[None]:
    """The library without the variant's part, while it is trained and while it restores."""
    with contextlib.ExitStack() as stack:
        for replaced in ALTERED.get(variant, []):
            stack.enter_context(patch.object(*replaced))
        yield


def profile_of(variant: str, steps: int, base: str = "cpu", continued: bool = False, seed: int = 0) -> Profile:
    """The profile of a variant: the base profile with its part replaced and the common budget."""
    changes = SCHEDULE | CONTINUED[variant] if continued else VARIANTS[variant]
    return load_profile(base, **changes, steps=steps, validate_every=steps, seed=seed)


def trained(variant: str, steps: int, base: str, start: MFdiff | None = None, seed: int = 0) -> MFdiff:
    """The variant's averaged weights, trained now or taken from a finished run. start: what a CONTINUED one starts
    from."""
    name = re.sub(r"[^a-z0-9]+", "-", variant.lower())
    origin = "" if start is None else f"-from-{start.fingerprint[:8]}"  # other weights, another run
    out = RUNS / f"{name}-{base}-{steps}{f'-seed{seed}' if seed else ''}{origin}"
    if not (out / WEIGHTS).exists():
        profile = profile_of(variant, steps, base, continued=start is not None, seed=seed)
        states = train_stage1(profile, out, resume=True, start=start)
        for state in tqdm(states, total=steps, desc=variant, unit="step", mininterval=5):
            last = state
        tqdm.write(f"{variant}: {json.dumps(last.validation)}")
    return load_model(out / WEIGHTS)


_other_mr = functools.cache(another_mr)  # of a scan, for every model that is judged on it


def judged(model: MFdiff, cases: list[Scan], blind: bool = False) -> dict:
    """Patients and summary, with the right, another patient's and no MR; and the curve of fidelity. blind: never with
    an MR."""
    means = {}

    def with_mr(name, mr):
        def restore(scan):
            part = Scan(scan.lpet, None if blind else mr(scan), affine=scan.affine, dose_reduction=DOSE, name=scan.name)
            means[name, scan.name] = model.restore(part, K, fidelity=0.0).mean
            return means[name, scan.name]

        return restore

    methods = {
        "right MR": with_mr("right", lambda s: s.mr),
        "another patient's MR": with_mr("other", _other_mr),
        "no MR": with_mr("no", lambda s: None),
    }
    table = evaluate(methods, tqdm(cases, desc="judging", unit="patient", leave=False))
    curve = []
    for fidelity in (0.0, 0.25, 0.5, 0.75, 1.0):
        images = [(s, means["right", s.name] + fidelity * _smooth(s.lpet - means["right", s.name])) for s in cases]
        curve.append({"fidelity": fidelity, **point([(s, image.clip(min=0)) for s, image in images])})
    return table | {"curve": curve}


def by_dose(models: dict[str, MFdiff], patients: int, dose: int) -> dict[str, list[float]]:
    """PSNR against SPET of each model at this dose, patient by patient."""
    cases = scans(TEST_ANATOMIES, patients, SLICES[False], None, first=900_000, dose_reduction=dose)
    return {
        name: [metrics.psnr(model.restore(scan, K, fidelity=0.0).mean, scan.spet, scan.mask) for scan in cases]
        for name, model in models.items()
    }


def _smooth(image: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, FIDELITY_SD, mode="nearest")


def point(images: list[tuple[Scan, np.ndarray]]) -> dict[str, float]:
    """One point of the trade-off: mean PSNR and contrast kept over patients, against SPET."""
    rows = [score(image, scan.spet, scan.mask, scan) for scan, image in images]
    return {key: float(np.nanmean([row[key] for row in rows])) for key in ("psnr", "contrast_kept")}


def margin(ours: list[dict], other: list[dict]) -> float:
    """PSNR of one trade-off curve over the other's points of equal contrast kept, the least one [dB]; inf if the curves
    share no contrast."""
    contrast, psnr = zip(*sorted((p["contrast_kept"], p["psnr"]) for p in ours), strict=True)
    shared = [p for p in other if contrast[0] <= p["contrast_kept"] <= contrast[-1]]
    return min((float(np.interp(p["contrast_kept"], contrast, psnr)) - p["psnr"] for p in shared), default=np.inf)


def complete(seeds: dict[str, dict]) -> list[dict]:
    """The seeds of which no variant is missing."""
    return [one for one in seeds.values() if one.keys() == set(HEADLINE)]


def over_seeds(seeds: list[dict[str, dict]]) -> dict[str, dict]:
    """Mean over seeds, variant by variant: every patient's metrics and the curves; summaries over patients anew."""
    found = {}
    for name in HEADLINE:
        each = [one[name] for one in seeds]
        patients = mean_of([one["patients"] for one in each])
        summary = {key: summarise([p[key] for p in patients]) for key in ("spet", "truth")}
        found[name] = {"patients": patients, "summary": summary, "curve": mean_of([one["curve"] for one in each])}
    return found


def mean_of(alike: list) -> dict | list | str | float:
    """Numbers averaged place by place through nested dicts and lists of one form; text is that of the first."""
    first = alike[0]
    if isinstance(first, dict):
        return {key: mean_of([one[key] for one in alike]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(place)) for place in zip(*alike, strict=True)]
    return first if isinstance(first, str) else float(np.mean(alike))


def report(variants: dict[str, dict], gaussians: list[dict], targets: Targets) -> None:
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
    mine, *others = (variants[name]["curve"] for name in (HEADLINE[0], HEADLINE[1], HEADLINE[3]))
    targets.add("tradeoff", min(margin(mine, other) for other in (*others, gaussians)))
    for name, condition in (("other_mr_pet_only", "another patient's MR"), ("no_mr_pet_only", "no MR")):
        lost = [-x for x in paired(ours, pet_only, condition=condition)]
        targets.add(name, *metrics.mean_ci(lost))


def report_continued(variants: dict[str, dict], doses: dict[str, dict], targets: Targets) -> None:
    """What an MR is worth to the shipped weights, and what serving every dose costs, paired over patients."""
    ours, blind = (variants[name]["patients"] for name in ("all parts", BLIND))

    def over(condition):
        pairs = zip(ours, blind, strict=True)
        return [a["spet"][condition]["psnr"] - b["spet"]["no MR"]["psnr"] for a, b in pairs]

    targets.add("pet_only_continued", *metrics.mean_ci(over("right MR")))
    targets.add("other_mr_continued", *metrics.mean_ci([-x for x in over("another patient's MR")]))
    targets.add("no_mr_continued", *metrics.mean_ci([-x for x in over("no MR")]))
    lost = [np.subtract(one["alone"], one["all doses"]) for one in doses.values()]
    targets.add("dose_conditioned", *metrics.mean_ci(max(lost, key=np.mean)))


def picture(variants: dict[str, dict], gaussians: list[dict], how: str, path: Path) -> None:
    """PSNR against lesion contrast kept: a curve for every model, so that nobody wins one by selling the other."""
    figure, axes = plt.subplots(figsize=(7, 5.2), facecolor="white", layout="constrained")
    for index, (name, one) in enumerate(variants.items()):
        points = one["curve"]
        style = {"lw": 2.5} if index == 0 else {"lw": 1.2, "alpha": 0.9}
        axes.plot([p["contrast_kept"] for p in points], [p["psnr"] for p in points], "o-", ms=4, label=name, **style)
    contrast, psnr = zip(*((p["contrast_kept"], p["psnr"]) for p in gaussians), strict=True)
    axes.plot(contrast, psnr, "s--", ms=4, color="0.4", label="Gaussian")
    n = len(next(iter(variants.values()))["patients"])
    axes.set(
        xlabel="contrast of PET-only lesions kept (SPET = 1)",
        ylabel="PSNR against SPET [dB]",
        title=f"Trade-off by fidelity, DRF {DOSE}, n = {n} patients\n{how}",
    )
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def table_block(variants: dict[str, dict]) -> str:
    """PSNR, contrast kept and leak of every variant, with the right, another patient's and no MR."""
    lines = ["| | PSNR [dB] | another patient's MR | no MR | PET-only contrast kept | MR leak |", "|---" * 6 + "|"]
    for name, one in variants.items():
        against = {key: one["summary"][key] for key in ("spet", "truth")}
        cells = [f"{against['spet'][mr]['psnr']['mean']:.2f}" for mr in ("right MR", "another patient's MR", "no MR")]
        cells += [f"{against['spet']['right MR']['contrast_kept']['mean']:.3f}"]
        cells += [f"{against['truth']['right MR']['mr_leak']['mean']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def doses_block(doses: dict[str, dict]) -> str:
    """Mean PSNR of one model for all doses, and of a model for each."""
    lines = ["", "| PSNR [dB] at | " + " | ".join(name.removesuffix(" alone") for name in doses) + " |"]
    lines.append("|---" * (1 + len(doses)) + "|")
    for title, key in (("one model for DRF 4 to 100", "all doses"), ("one model for each dose", "alone")):
        lines.append(f"| {title} | " + " | ".join(f"{np.mean(one[key]):.2f}" for one in doses.values()) + " |")
    return "\n".join(lines) + "\n"


def _kind(headline: bool, continued: bool, seed: int, profile: str) -> str:
    """Which of the three comparisons is asked for; refuse what does not go together."""
    if headline and continued:
        raise typer.BadParameter("expected --headline or --continued, found both")
    if seed and not headline:
        raise typer.BadParameter("expected --headline with another seed: everything else is of one seed")
    if continued and profile != "cpu":
        raise typer.BadParameter("expected profile cpu with --continued: the shipped weights are of that size")
    return "headline" if headline else "continued" if continued else "variants"


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="names; default: all of them")] = None,
    headline: Annotated[bool, typer.Option("--headline", help=f"only {', '.join(HEADLINE)}; longer")] = False,
    continued: Annotated[bool, typer.Option("--continued", help="take parts from the shipped weights")] = False,
    seed: Annotated[int, typer.Option(help="of the headline comparison")] = 0,
    steps: Annotated[int | None, typer.Option(help=f"the common budget; default {BUDGETS}")] = None,
    profile: Annotated[str, typer.Option(help="smoke for a try, cpu for numbers")] = "cpu",
    patients: Annotated[int, typer.Option(help="test patients")] = 6,
) -> None:
    """Train the variants at one budget and compare them on test patients."""
    key = _kind(headline, continued, seed, profile)
    known = {"headline": HEADLINE, "continued": CONTINUED, "variants": VARIANTS}[key]
    unknown = [name for name in variants or [] if name not in known]
    if unknown:
        raise typer.BadParameter(f"expected names out of {', '.join(known)}, found {unknown[0]!r}")
    steps = steps or BUDGETS[key]
    start = load_pretrained("cpu") if continued else None
    cases = scans(TEST_ANATOMIES, patients, SLICES[False] if profile == "cpu" else 6, None, first=900_000)
    setting = {"patients": patients, "dose_reduction": DOSE, "samples": K, "steps": steps}
    setting |= {"from": start.fingerprint} if continued else {}
    path = RESULTS / "ablations.json"
    found = json.loads(path.read_text()) if path.exists() and profile == "cpu" else {}
    if found.get(f"setting of {key}") != setting:
        found |= {f"setting of {key}": setting, key: {}}
        if continued:
            found["doses"] = {}
    doses = found.setdefault("doses", {})
    judgements = found[key].setdefault(str(seed), {}) if headline else found[key]
    found["gaussian"] = [
        {"fwhm": w, **point([(s, gaussian(s, w)) for s in cases])} for w in (3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
    ]
    for name in variants or known:
        with altered(name):
            model = trained(name, steps, profile, start, seed)
            if name in ALONE:
                both = {"all doses": trained("all parts", steps, profile, start), "alone": model}
                doses[name] = by_dose(both, patients, ALONE[name])
                write_json("ablations.json", found)
                continue
            about = {"parameters": model.n_parameters, "minutes": model.card["training_minutes"]}
            judgements[name] = about | judged(model, cases, blind=name == BLIND)
        rows = {n: one["summary"]["spet"]["right MR"] for n, one in judgements.items()}
        print(as_table(f"{steps} steps, DRF {DOSE}, n = {patients}, against SPET", rows))
        if profile == "cpu":
            write_json("ablations.json", found)
    if profile == "cpu":
        publish(found, key)


def publish(found: dict, key: str) -> None:
    """Picture and targets of one comparison, once all that they need is measured."""
    steps = found[f"setting of {key}"]["steps"]
    if key == "headline" and (seeds := complete(found[key])):
        variants = over_seeds(seeds)
        targets = Targets("evidence", GOALS, "make ablations ARGS=--headline")
        report(variants, found["gaussian"], targets)
        how = f"{steps} steps from random weights, {'one seed' if len(seeds) == 1 else f'mean of {len(seeds)} seeds'}"
        picture(variants, found["gaussian"], how, RESULTS / "tradeoff.png")
        targets.show()
        targets.write()
    elif key == "continued" and found[key].keys() | found["doses"].keys() == CONTINUED.keys():
        targets = Targets("evidence", CONTINUED_GOALS, "make ablations ARGS=--continued")
        report_continued(found[key], found["doses"], targets)
        how = f"from weights {found['setting of continued']['from'][:8]}, {steps} steps each"
        picture(found[key], found["gaussian"], how, RESULTS / "tradeoff_continued.png")
        targets.show()
        targets.write()


if __name__ == "__main__":
    typer.run(main)
