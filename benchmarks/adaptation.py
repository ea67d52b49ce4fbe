"""Stage 2 on OOD emulations: what adapting to one scan without a standard-dose image gains, and what it costs.

    make adaptation                                         # what is not measured yet, 8 to 18 minutes a shift
    python benchmarks/adaptation.py wide-psf amyloid        # these, again; results of others stay; two runs may go on
                                                            # side by side
    python benchmarks/adaptation.py --anatomy ahba-15496    # the validation head, for choosing settings; writes nothing
    python benchmarks/adaptation.py --anatomy brainweb-04   # a family of heads never trained on, once it is fetched
    python benchmarks/adaptation.py --only alone            # the user who has nothing but the scan: 4 minutes a target
    python benchmarks/adaptation.py --only guard            # wrong estimates of the noise, which must be refused
    python benchmarks/adaptation.py --only store            # the adapted weights that notebook 06 shows: minutes
    python benchmarks/adaptation.py --only report           # tables, figure and targets of what is measured

Each target is one slab of the test anatomy on a shifted scanner or patient. Stage 2 sees its LPET, MR and count halves;
the oracle learns from the SPETs of `OTHERS` patients of the same shift, heads of the training set, in all its weights
and without rehearsal. For the shifts in `COHORT`, split and sure learn from these patients too, without the SPETs. `in
distribution` is a patient of the default scanner, restored with the weights that were adapted to the target. `alone`
takes the halves away: 'sure' with the noise that is measured on the LPET, on every shift and on a second simulator that
no training sees (second_simulator.py), three patients of each tracer. `guard` puts wrong estimates of the noise in the
place of the measured ones. Writes results/adaptation.json and .png, and the rows of group "adapt" in
results/targets.json.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import typer
from safetensors.torch import save_file
from tqdm import tqdm

from mfdiff_lite import metrics
from mfdiff_lite.baselines import gaussian, tune
from mfdiff_lite.config import TEST_ANATOMIES, TRAIN_ANATOMIES, Adaptation, load_profile
from mfdiff_lite.evaluation import score
from mfdiff_lite.files import whole_file
from mfdiff_lite.model import MFdiff, load_pretrained
from mfdiff_lite.noise import NoiseModel, second_difference
from mfdiff_lite.phantom import SHIFTS, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.stage2 import refusal, train_stage2
from mfdiff_lite.view import ModelView
from results import DOSE, LESIONS, RESULTS, Targets, write_json
from second_simulator import second_scan

PAIRS = ("wide-psf+few-counts", "amyloid+t2-mr")
COHORT = ("edge-scanner", "amyloid")  # where split and sure also learn from other patients and not from the target
STORED = Path(__file__).parents[1] / "notebooks" / "06_stage2.safetensors"  # what notebook 06 shows at once
STORED_SHIFT, STORED_OTHERS = "amyloid+t2-mr", 3
OTHERS = 10  # patients of a shift beside the target
K = 4  # samples of a restoration
SEEDS, TRACERS = (3, 4, 5), ("fdg", "amyloid", "fdopa")  # targets of the second simulator
GUARDED = ("second fdg 3", "second fdopa 3", "edge-scanner")
RIGHT = (0.9, 1.1)  # SD of the measured over that of the true noise: in between the estimate is clean
GOALS = {
    "oracle_gap": ("PSNR of the oracle over stage 1 on OOD emulations, mean over shifts", "dB", ">=", 0.7, None),
    "gap_closed": ("share of that gap closed by stage 2 'split'", "%", ">=", 40.0, 65.0),
    "gap_closed_sure": ("share of that gap closed by stage 2 'sure'", "%", ">=", 40.0, 65.0),
    "worst_shift": ("stage 2 'split' minus stage 1 on the worst shift", "dB", ">=", -0.1, 0.0),
    "id_loss": ("PSNR lost in distribution after 'split', mean over shifts", "dB", "<=", 0.2, 0.1),
    "from_scratch": ("stage 2 'split' over the same from random weights, mean over shifts", "dB", ">=", 1.0, 2.0),
    "stop_rule": ("PSNR at the stop rule's step below the best validation in hindsight", "dB", "<=", 0.2, 0.05),
    "alone_worst": ("'sure' without halves minus stage 1, worst of all targets", "dB", ">=", -0.1, 0.0),
    "alone_share": ("its gain over the shifts as a share of that of 'sure' with halves", "%", ">=", 60.0, 85.0),
    "alone_second": ("its mean gain on the second simulator", "dB", ">=", 0.3, 0.8),
    "alone_contrast": ("PET-only contrast kept after it, minus stage 1", "", ">=", -0.03, 0.0),
    "guard_hits": ("wrong estimates of the noise that are refused, before or after use", "%", ">=", 95.0, 100.0),
    "guard_through": ("targets whose noise is measured within 10 % that are let through", "%", ">=", 90.0, 100.0),
    "minutes": ("adapting to one 64-slice scan by 'split'", "min", "<=", 5.0, 2.0),
}


def target(shift: str | None, seed: int, slices: int, anatomy: str) -> Scan:
    """A scan with count halves; patients of different seeds differ."""
    patient = virtual_patient(load_anatomy(anatomy), seed, shift, slices, LESIONS)
    return Scanner.shifted(shift).scan(patient, DOSE, halves=True)


def judged(model: MFdiff, scan: Scan) -> dict[str, float]:
    """All metrics against SPET, with the MR leak against truth."""
    mean = model.restore(scan, K).mean
    leak = score(mean, scan.activity, scan.mask, scan)["mr_leak"]
    return score(mean, scan.spet, scan.mask, scan) | {"mr_leak": leak}


def coarse_psnr(model: MFdiff, scan: Scan) -> float:
    return metrics.psnr(model.restore(scan, 1, steps=1).coarse, scan.spet, scan.mask)  # no sampler in it


def adapted(parent: MFdiff, scans: Scan | list[Scan], objective: str, settings: Adaptation, watch: Scan | None = None):
    """The adapted model, the last state, and the true PSNR of `watch` at each validation."""
    truth = {0: coarse_psnr(parent, watch)} if watch is not None else {}
    states = train_stage2(parent, scans, objective, settings=settings, device="cpu")
    for state in tqdm(states, desc=objective, total=settings.steps, unit="step", leave=False, mininterval=5):
        last = state
        if watch is not None and state.curve[-1]["step"] == state.step:
            truth[state.step] = coarse_psnr(state.average, watch)
    return last.model, last, truth


def others_of(shift: str, slices: int, count: int = OTHERS) -> list[Scan]:
    """Other patients of the shift, with heads that stage 1 was trained on: they tell of the shift, not of the head."""
    heads = itertools.islice(itertools.cycle(TRAIN_ANATOMIES), count)
    return [target(shift, 930_000 + i, slices, head) for i, head in enumerate(heads)]


def measure(parent: MFdiff, shift: str, settings: Adaptation, slices: int, anatomy: str) -> dict:
    """One shift: every objective on the target, in distribution, and what the stop rule missed."""
    scan = target(shift, 910_000, slices, anatomy)
    known = target(None, 920_000, slices, anatomy)
    split, state, truth = adapted(parent, scan, "split", settings, watch=scan)
    models = {"stage 1": parent, "split": split}
    models["sure"] = adapted(parent, scan, "sure", settings)[0]
    models["oracle"] = adapted(parent, others_of(shift, slices), "paired", unbound(settings))[0]
    rows = {name: judged(model, scan) for name, model in models.items()}
    rows["LPET"] = score(scan.lpet, scan.spet, scan.mask, scan)
    rows["from scratch"] = from_scratch(parent, scan, settings)
    return {
        "target": rows,
        "in distribution": {name: judged(model, known) for name, model in models.items() if name != "oracle"},
        "stop_rule_loss": max(truth.values()) - truth[state.best],
        "true_psnr": truth,
        "held_out": state.curve,
        "steps": state.step,
        "seconds_per_step": state.seconds / state.step,
    }


def from_others(parent: MFdiff, shift: str, settings: Adaptation, slices: int, anatomy: str) -> dict:
    """split and sure on other patients of the shift, judged on the target, which they have not seen."""
    scan, others = target(shift, 910_000, slices, anatomy), others_of(shift, slices)
    return {objective: judged(adapted(parent, others, objective, settings)[0], scan) for objective in ("split", "sure")}


def store(parent: MFdiff, settings: Adaptation, found: dict, slices: int, anatomy: str) -> None:
    """Adapt by `split` to some other patients of a shift, and keep the weights that changed, in half precision."""
    others = others_of(STORED_SHIFT, slices, STORED_OTHERS)
    model, state, _ = adapted(parent, others, "split", settings)
    before = parent.state_dict()
    changed = {
        name: value.half().contiguous() for name, value in model.state_dict().items() if not value.equal(before[name])
    }
    about = {"parent": parent.fingerprint, "shift": STORED_SHIFT, "patients": str(STORED_OTHERS)}
    with whole_file(STORED, force=True) as partial:
        save_file(changed, partial, metadata=about | {"objective": "split", "steps": str(state.best)})
    print(f"{STORED}: {sum(v.numel() for v in changed.values()):,} weights, step {state.best} of {state.step}")


def from_scratch(parent: MFdiff, scan: Scan, settings: Adaptation) -> dict:
    """'split' on the target alone from random weights, all of them trained, without rehearsal."""
    blank = MFdiff.from_profile(load_profile("cpu", context=parent.fusion.context))
    return judged(adapted(blank, scan, "split", unbound(settings))[0], scan)


def measure_alone(parent: MFdiff, scan: Scan, settings: Adaptation) -> dict:
    """'sure' on a scan without halves: the target before and after, what the guard said, and what the stop rule did."""
    rows = {"LPET": score(scan.lpet, scan.spet, scan.mask, scan), "stage 1": judged(parent, scan)}
    model, state, _ = adapted(parent, dataclasses.replace(scan, halves=None), "sure", settings)
    rows["sure"] = judged(model, scan)
    fwhm = tune(gaussian, [scan], fwhm=np.arange(2.0, 12.1, 0.5))["fwhm"]  # on the target's own SPET: a bound
    rows["best Gaussian"] = score(gaussian(scan, fwhm), scan.spet, scan.mask, scan)
    checked = {"curve": state.curve, "kept": state.best, "steps": state.step, "sd": sd_ratio(scan, parent.context)}
    return {"target": rows, "refused": refusal(model.card), "noise": model.card["noise"]} | checked


def sd_ratio(scan: Scan, context: int) -> float:
    """SD of the noise as it is measured, over that of the noise that the halves show, in the brain."""
    view = ModelView(scan, context)
    a, b = (view.activity(half)[view.mask] for half in scan.halves)
    drawn = NoiseModel(view.lpet, view.mask).draw(np.random.default_rng(0))
    return float(drawn[view.mask].std() / ((a - b) / 2).std())


def lent(self: NoiseModel, rng: np.random.Generator) -> np.ndarray:
    """Differences of a slice and its neighbours, of other slices: these share terms, which the noise does not."""
    away = int(rng.integers(3, self.image.shape[2] - 3))
    lent = np.roll(second_difference(self.image, 1) / np.sqrt(1.5) / self.sd, away, axis=2)
    return (rng.choice((-1, 1)) * lent * self.sd).astype(np.float32)


def wrong_draws() -> dict[str, Callable[[NoiseModel, np.random.Generator], np.ndarray]]:
    """Estimates of the noise that deceive SURE, by what is wrong with them."""
    right = NoiseModel.draw
    return {
        "terms shared by neighbours": lent,
        "half as strong": lambda self, rng: np.float32(0.5) * right(self, rng),
        "twice as strong": lambda self, rng: np.float32(2) * right(self, rng),
        "white": lambda self, rng: (rng.standard_normal(self.sd.shape) * self.sd).astype(np.float32),
    }


def measure_guard(parent: MFdiff, scan: Scan, settings: Adaptation, draw: Callable) -> dict:
    """'sure' without halves on a wrong estimate of the noise: why it was refused; in PSNR what it would have cost
    without guard and in full, "cost", and what the weights that are kept cost, "kept"."""
    short, bare = dataclasses.replace(settings, steps=settings.validate_every), dataclasses.replace(scan, halves=None)
    remembering = NoiseModel.__init__

    def remembered(self: NoiseModel, image: np.ndarray, mask: np.ndarray) -> None:
        self.image = image
        remembering(self, image, mask)

    with mock.patch.object(NoiseModel, "draw", draw), mock.patch.object(NoiseModel, "__init__", remembered):
        *_, last = train_stage2(parent, bare, "sure", settings=short, device="cpu")
    before = coarse_psnr(parent, scan)
    costs = {"cost": coarse_psnr(last.average, scan) - before, "kept": coarse_psnr(last.model, scan) - before}
    return {"refused": refusal(last.model.card), "curve": last.curve} | costs


def guard(parent: MFdiff, settings: Adaptation, found: dict, slices: int, anatomy: str) -> None:
    """Every wrong estimate on every guarded target that is not measured yet."""
    made, draws = alone_targets(slices, anatomy), wrong_draws()
    for name, kind in tqdm(list(itertools.product(GUARDED, draws)), desc="guard", unit="run"):
        if missing(found, "guard", [f"{name}, {kind}"]):
            one = measure_guard(parent, made[name](), settings, draws[kind])
            tqdm.write(f"{name}, {kind}: {one['cost']:+.2f} dB, refused: {one['refused']}")
            keep(found, "guard", f"{name}, {kind}", one)


def alone_targets(slices: int, anatomy: str) -> dict[str, Callable[[], Scan]]:
    """Name -> target: the shifts' own, and those of the second simulator."""
    made: dict[str, Callable[[], Scan]] = {}
    for seed, tracer in itertools.product(SEEDS, TRACERS):
        made[f"second {tracer} {seed}"] = functools.partial(
            second_scan, anatomy, seed, tracer, DOSE, slices=slices, halves=True
        )
    return made | {s: functools.partial(target, s, 910_000, slices, anatomy) for s in (*SHIFTS, *PAIRS)}


def alone(parent: MFdiff, settings: Adaptation, found: dict, slices: int, anatomy: str) -> None:
    """Measure what is not measured yet, first the shifts that are measured with halves."""
    made = alone_targets(slices, anatomy)
    order = sorted(missing(found, "alone", made), key=lambda name: name not in found["shifts"])
    for name in tqdm(order, desc="alone", unit="target"):
        one = measure_alone(parent, made[name](), settings)
        line = {key: float(round(row["psnr"], 2)) for key, row in one["target"].items()}
        tqdm.write(f"{name}: {line}, kept step {one['kept']}, refused: {one['refused']}")
        keep(found, "alone", name, one)


def keep(found: dict, part: str, name: str, one: dict) -> None:
    """Add a result to what the file holds by now: several runs may measure side by side."""
    path = RESULTS / "adaptation.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    if held.get("setting") == found["setting"]:
        found |= held
    found.setdefault(part, {})[name] = one
    write_json("adaptation.json", found)


def unbound(settings: Adaptation) -> Adaptation:
    """All weights, without rehearsal: of what stage 2 is compared with."""
    return dataclasses.replace(settings, trained="all", rehearsal=0.0)


def change(one: dict, name: str, metric: str) -> float:
    """Of a metric on a target, from stage 1 to the adapted weights."""
    return one["target"][name][metric] - one["target"]["stage 1"][metric]


def gained(shifts: dict[str, dict], name: str, over: str = "stage 1", where: str = "target") -> np.ndarray:
    return np.array([one[where][name]["psnr"] - one[where][over]["psnr"] for one in shifts.values()])


def report(found: dict, targets: Targets) -> None:
    """The rows of results/targets.json, over all shifts measured so far."""
    shifts = found["shifts"]
    gap = gained(shifts, "oracle")
    targets.add("oracle_gap", *metrics.mean_ci(gap))
    for objective, goal in (("split", "gap_closed"), ("sure", "gap_closed_sure")):
        targets.add(goal, 100 * gained(shifts, objective).sum() / gap.sum())
    targets.add("worst_shift", gained(shifts, "split").min())
    targets.add("id_loss", *metrics.mean_ci(-gained(shifts, "split", where="in distribution")))
    targets.add("from_scratch", *metrics.mean_ci(gained(shifts, "split", over="from scratch")))
    targets.add("stop_rule", *metrics.mean_ci([one["stop_rule_loss"] for one in shifts.values()]))
    targets.add("minutes", found["minutes"]["64"]["split"])
    if "alone" in found:
        report_alone(found, targets)


def report_alone(found: dict, targets: Targets) -> None:
    """The rows of the user who has nothing but the scan."""
    held = found["alone"]
    gain = {name: change(one, "sure", "psnr") for name, one in held.items()}
    known = [name for name in gain if name in found["shifts"]]
    with_halves = gained({name: found["shifts"][name] for name in known}, "sure")
    second = [value for name, value in gain.items() if name.startswith("second")]
    contrast = [change(one, "sure", "contrast_kept") for one in held.values()]
    targets.add("alone_worst", min(gain.values()))
    targets.add("alone_share", 100 * sum(gain[name] for name in known) / with_halves.sum())
    targets.add("alone_contrast", *metrics.mean_ci(contrast))
    if second:
        targets.add("alone_second", *metrics.mean_ci(second))
    through = [not one["refused"] for one in held.values() if RIGHT[0] < one["sd"] < RIGHT[1]]
    targets.add("guard_through", 100 * float(np.mean(through)))
    if "guard" in found:
        targets.add("guard_hits", 100 * float(np.mean([bool(one["refused"]) for one in found["guard"].values()])))


def picture(shifts: dict[str, dict]) -> None:
    """PSNR over stage 1 by shift, on the target and in distribution."""
    figure, axes = plt.subplots(figsize=(9, 4.6), facecolor="white", layout="constrained")
    bars = {
        "split (no SPET)": (gained(shifts, "split"), "tab:blue"),
        "sure (no SPET)": (gained(shifts, "sure"), "tab:cyan"),
        f"oracle (SPETs of {OTHERS} others)": (gained(shifts, "oracle"), "0.55"),
        "split, in distribution": (gained(shifts, "split", where="in distribution"), "tab:orange"),
    }
    place = np.arange(len(shifts))
    for index, (name, (values, colour)) in enumerate(bars.items()):
        axes.bar(place + 0.2 * index - 0.3, values, 0.2, label=name, color=colour)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(place, [name.replace("+", " +\n") for name in shifts], rotation=30, ha="right")
    axes.set(ylabel="PSNR over stage 1 [dB]", title=f"Stage 2 on OOD emulations, one scan each, DRF {DOSE}")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "adaptation.png", dpi=100)


def table_block(shifts: dict[str, dict]) -> str:
    """PSNR [dB] against SPET, one target scan a shift, and what adapting costs elsewhere."""
    names, adapted_ones = ("LPET", "from scratch", "stage 1", "split", "sure", "oracle"), ("stage 1", "split", "sure")
    elsewhere = ("in distribution: stage 1, split, sure", "MR leak: stage 1, split, sure")
    lines = ["| OOD emulation | " + " | ".join([*names, *elsewhere]) + " |", "|---" * (3 + len(names)) + "|"]
    for shift, one in shifts.items():
        cells = [f"{one['target'][name]['psnr']:.2f}" for name in names]
        cells.append(", ".join(f"{one['in distribution'][name]['psnr']:.2f}" for name in adapted_ones))
        cells.append(", ".join(f"{one['target'][name]['mr_leak']:.3f}" for name in adapted_ones))
        lines.append(f"| {shift} | " + " | ".join(cells) + " |")
    mean = {name: np.mean([one["target"][name]["psnr"] for one in shifts.values()]) for name in names}
    known = [np.mean([one["in distribution"][name]["psnr"] for one in shifts.values()]) for name in adapted_ones]
    cells = [f"**{value:.2f}**" for value in mean.values()] + [", ".join(f"**{value:.2f}**" for value in known), ""]
    return "\n".join([*lines, "| **mean** | " + " | ".join(cells) + " |"]) + "\n"


def cohort_block(found: dict) -> str:
    """PSNR [dB] on the target: adapted to itself, and to other patients of its shift."""
    if not found.get("cohort"):
        return ""
    lines = [
        "",
        "Adapted to other patients, without their SPETs, and judged on the same scan, which they have not seen:",
        "",
    ]
    lines += ["| adapted to | " + " | ".join(f"{shift}: split | sure" for shift in found["cohort"]) + " |"]
    lines.append("|---" * (1 + 2 * len(found["cohort"])) + "|")
    for title, rows in (("the scan itself", "shifts"), (f"{OTHERS} other patients, without their SPETs", "cohort")):
        each = [found[rows][shift] for shift in found["cohort"]]
        each = [one.get("target", one) for one in each]
        cells = [f"{one[objective]['psnr']:.2f}" for one in each for objective in ("split", "sure")]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def alone_block(found: dict) -> str:
    """PSNR [dB] and PET-only contrast kept of the targets without halves; what the guard refused."""
    if not found.get("alone"):
        return ""
    lines = [
        "",
        "| without halves | LPET | best Gaussian | stage 1 | sure | PET-only contrast kept: stage 1, sure | "
        "SD of the noise, measured over true | guard |",
    ]
    lines.append("|---" * 8 + "|")
    for name, one in found["alone"].items():
        rows = one["target"]
        cells = [f"{rows[key]['psnr']:.2f}" for key in ("LPET", "best Gaussian", "stage 1", "sure")]
        cells.append(", ".join(f"{rows[key]['contrast_kept']:.2f}" for key in ("stage 1", "sure")))
        cells += [f"{one['sd']:.2f}", "refused" if one["refused"] else "let through"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def guard_block(found: dict) -> str:
    """Wrong estimates of the noise: what a step rule without the guard would have kept, and what the guard said."""
    lines = ["| wrong estimate of the noise | PSNR without the guard | with it | guard |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {one['cost']:+.2f} dB | {one['kept']:+.2f} dB | "
        f"{'refused: ' + one['refused'] if one['refused'] else '**let through**'} |"
        for name, one in found.get("guard", {}).items()
    ]
    return "\n".join(lines) + "\n"


def cohort(parent: MFdiff, settings: Adaptation, found: dict, slices: int, anatomy: str) -> None:
    """Adapt to other patients of a shift, and measure what adapting costs in time."""
    for shift in tqdm(missing(found, "cohort", COHORT), desc="other patients", unit="shift"):
        keep(found, "cohort", shift, from_others(parent, shift, settings, slices, anatomy))
    for count in missing(found, "minutes", ("64",)):
        whole = target(next(iter(found["shifts"])), 940_000, int(count), anatomy)
        keep(found, "minutes", count, {"split": adapted(parent, whole, "split", settings)[1].seconds / 60})


def missing(found: dict, part: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in found.get(part, {})]


def publish(parent: MFdiff, settings: Adaptation, found: dict, slices: int, anatomy: str) -> None:
    """Targets and figure of what is measured."""
    targets = Targets("adapt", GOALS, "make adaptation")
    report(found, targets)
    targets.show()
    targets.write()
    picture(found["shifts"])


# what --only can name, in the order in which all of them run
PARTS = {"alone": alone, "guard": guard, "store": store, "cohort": cohort, "report": publish}
Part = enum.Enum("Part", {name: name for name in PARTS}, type=str)


def main(
    shifts: Annotated[
        list[str] | None, typer.Argument(help="names, '+' joins two; default: all that these weights have no result of")
    ] = None,
    slices: Annotated[int, typer.Option(help="axial slices of each target")] = 15,
    steps: Annotated[int, typer.Option(help="of stage 2, at most")] = Adaptation.steps,
    anatomy: Annotated[str, typer.Option(help="another one than the test anatomy writes nothing")] = TEST_ANATOMIES[0],
    learning_rate: Annotated[float, typer.Option(help="of stage 2")] = Adaptation.learning_rate,
    only: Annotated[Part | None, typer.Option(help="one part")] = None,
) -> None:
    """Adapt to each shift and compare with stage 1 and the oracle."""
    elsewhere = anatomy != TEST_ANATOMIES[0]
    if elsewhere and only:
        raise typer.BadParameter(f"--only writes results, which are of {TEST_ANATOMIES[0]}: leave out --anatomy")
    parent, settings = load_pretrained("cpu"), Adaptation(steps=steps, learning_rate=learning_rate)
    path = RESULTS / "adaptation.json"
    setting = {"dose_reduction": DOSE, "slices": slices, "samples": K, "steps": steps, "others": OTHERS}
    setting["parent"] = parent.card.get("rounded_from", parent.fingerprint)
    found = json.loads(path.read_text()) if path.exists() and not elsewhere else {}
    if found.get("setting") != setting:  # measured in another way, or with other weights
        found = {"setting": setting, "shifts": {}}
    if only:
        return PARTS[only.value](parent, settings, found, slices, anatomy)
    for shift in tqdm(shifts or missing(found, "shifts", (*SHIFTS, *PAIRS)), desc="shifts", unit="shift"):
        one = measure(parent, shift, settings, slices, anatomy)
        line = {name: float(round(row["psnr"], 2)) for name, row in one["target"].items()}
        known = {name: float(round(row["psnr"], 2)) for name, row in one["in distribution"].items()}
        tqdm.write(f"{shift}: target {line}, in distribution {known}, best step {one['steps']}")
        if not elsewhere:
            keep(found, "shifts", shift, one)
    if elsewhere or shifts:
        return
    for part in PARTS.values():
        part(parent, settings, found, slices, anatomy)


if __name__ == "__main__":
    typer.run(main)
