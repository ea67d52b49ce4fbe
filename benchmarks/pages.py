"""What README, docs/ and the notebooks say about results: tables, claims and sentences, made from results/*.json.

    make pages          # rewrites what stands between the marks <!-- NAME:start --> and <!-- NAME:end -->

Nothing is measured here. Each sentence is chosen by the value it speaks of, each verdict by a rule with its threshold
beside it; tests turn the values round and expect the other sentence. `make results` and the other measuring commands
call this at their end.
"""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ablations
import adaptation
import any_noise
import detection
import evidence
import numpy as np
import real

import bench
import results
from mfdiff_lite.evaluation import beside
from mfdiff_lite.metrics import mean_ci

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"(<!-- (\w+):start -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)
LARGE = 1.0  # dB; a gain below is called small
WORTH = 0.1  # dB; a gain that is surely below is called none
TEXTURE = (0.8, 1.25)  # of the SPET's: a sample in between looks like an SPET as far as this number goes
COVERED = 0.85  # of the 90 % interval; below, the SD is called too small


FEW = 5


class Number(NamedTuple):
    """A measured value with its interval over patients or shifts; from fewer than FEW an interval says nothing."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: object) -> Number:
        value, (low, high) = mean_ci(values)
        return cls(value, low, high) if len(list(values)) >= FEW else cls(value, -np.inf, np.inf)

    def text(self, unit: str = " dB", sign: str = "+") -> str:
        value, low, high = (f"{round(x, 2) + 0.0:{sign}.2f}" for x in self)  # no "-0.00"
        return f"{value}{unit} [{low}, {high}]" if np.isfinite(self.low) else f"{value}{unit} (too few for an interval)"


# ---- verdicts ------------------------------------------------------------------------------------------------------


def of_gain(gain: Number, only: str = "") -> str:
    """Verdict on a gain in dB that the paper claims. only: where it was seen, "in emulation only" or nothing."""
    if gain.low > 0 and gain.high >= WORTH:
        return f"reproduced {only}" if only else "reproduced" if gain.value >= LARGE else "reproduced, small"
    return "not reproduced" if gain.high < WORTH else "open"


def of_limit(number: Number, limit: float) -> str:
    """Verdict on a harm that must stay below a limit."""
    return "reproduced" if number.high <= limit else "not reproduced" if number.low > limit else "open"


def of_range(number: Number, low: float, high: float) -> str:
    """Verdict on a ratio that must lie in a range."""
    inside = low <= number.low and number.high <= high
    outside = number.high < low or number.low > high
    return "reproduced" if inside else "not reproduced" if outside else "open"


def of_rivals(gains: list[Number], published: int = 0) -> str:
    """Verdict on being ahead of everybody: never more than open while no published network was compared."""
    if any(gain.high < 0 for gain in gains):
        return "not reproduced"
    return "reproduced" if published and all(gain.low > 0 for gain in gains) else "open"


# ---- what was measured ---------------------------------------------------------------------------------------------


DETECTED = {"LPET": "that of the LPET", "Gaussian": "the Gaussian's", "kernel EM": "that of kernel EM"}


def stored(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def difference(patients: list[dict], one: str, other: str, metric: str = "psnr", against: str = "spet") -> Number:
    """one minus other within patients; rows may be those of two models, given as (patients, row)."""
    return Number.of([p[against][one][metric] - p[against][other][metric] for p in patients])


def between(ours: list[dict], others: list[dict], rows: tuple[str, str], metric: str, against: str = "spet") -> Number:
    """Row of our patients minus row of the same patients with another model."""
    pairs = zip(ours, others, strict=True)
    return Number.of([a[against][rows[0]][metric] - b[against][rows[1]][metric] for a, b in pairs])


def audited(proof: dict, one: str, other: str, metric: str) -> Number:
    """One MR minus another given to the shipped weights, within patients."""
    return Number.of([p[one][metric] - p[other][metric] for p in proof["audit"]["patients"]])


def measured() -> dict[str, Number]:
    """Every number that a claim or a sentence rests on, by name."""
    restore, proof, parts, shifts = (stored(n) for n in ("restore", "evidence", "ablations", "adaptation"))
    patients, k = restore["tables"]["default scanner"]["patients"], restore["setting"]["samples"]
    mean, right, other = f"mean of {k}", "right MR", "another patient's MR"
    ours, blind = (parts["continued"][name]["patients"] for name in ("all parts", ablations.BLIND))
    spread, table = proof["uncertainty"], proof["table"]["patients"]
    small = {name: proof["by_size_and_region"][name]["contrast_small"] for name in (evidence.OURS, "gaussian")}

    def cell(one: dict) -> Number:
        return Number(one["mean"], *one["ci95"])

    found = {
        "mean over lpet": difference(patients, mean, "LPET"),
        "mean over gaussian": difference(patients, mean, "Gaussian"),
        "mean over coarse": difference(patients, mean, "coarse"),
        "sample over mean": difference(patients, "one sample", mean),
        "right MR": between(ours, blind, (right, "no MR"), "psnr"),
        "right over none": audited(proof, right, "no MR", "psnr"),
        "wrong MR costs": audited(proof, "no MR", other, "psnr"),
        "false contrast": audited(proof, right, "no MR", "mr_leak"),
        "MR fit": cell(proof["audit"]["summary"][right]["fit"]),
        "MR fit of another": cell(proof["audit"]["summary"][other]["fit"]),
        "wrong MR costs, continued": between(blind, ours, ("no MR", other), "psnr"),
        "false contrast, continued": between(ours, blind, (right, "no MR"), "mr_leak", "truth"),
        "contrast moved": between(ours, blind, (right, "no MR"), "contrast_kept"),
        "texture of a sample": cell(spread["texture_sample"]),
        "texture of the mean": cell(spread["texture_mean"]),
        "covered": cell(spread["coverage_0.9"]),
        "covered, recalibrated": cell(spread["recalibrated_0.9"]),
        "kept small": cell(small[evidence.OURS]),
        "gaussian kept small": cell(small["gaussian"]),
    }
    for rival in ("gaussian", "mr guided", "kernel em"):
        found[f"over {rival}"] = difference(table, evidence.OURS, rival)
    for one in ("split", "sure", "oracle"):
        found[one] = Number.of(adaptation.gained(shifts["shifts"], one))
        if one != "oracle":
            found[f"{one} at home"] = Number.of(adaptation.gained(shifts["shifts"], one, where="in distribution"))
    found["alone"] = Number.of(adaptation.gained(shifts["alone"], "sure"))
    found["over scratch"] = Number.of(adaptation.gained(shifts["shifts"], "split", over="from scratch"))
    seeds = ablations.complete(parts["headline"])
    alike = ablations.over_seeds(seeds)
    rows = {name: alike[name]["patients"] for name in ablations.HEADLINE}
    first = ablations.HEADLINE[0]
    for name in ablations.HEADLINE[1:]:
        condition = "no MR" if name == "PET only" else right
        found[f"alike over {name}"] = between(rows[first], rows[name], (right, condition), "psnr")
    observed = stored("detection")
    rows = {name: row["patients"] for name, row in observed["by_size"]["all"]["hotelling"].items()}
    for rival in DETECTED:
        theirs = rows[detection.PLAIN if rival == "LPET" else rival]
        found[f"detected over {rival}"] = Number.of([rows[detection.OURS][p] - auc for p, auc in theirs.items()])
    for name, row in (("restored", detection.OURS), ("Gaussian", "Gaussian")):
        found[f"equivalent dose, {name}"] = Number(*[observed["equivalent_dose"][row]] * 3)
    found["sd factor"] = Number(spread["sd_scale"], spread["sd_scale"], spread["sd_scale"])
    return found


# ---- the claims ----------------------------------------------------------------------------------------------------


def line_of(module: str, name: str) -> int:
    """The line of the library's module on which a class or function begins."""
    tree = ast.parse((ROOT / "mfdiff_lite" / module).read_text(encoding="utf-8"))
    return next(node.lineno for node in ast.walk(tree) if getattr(node, "name", None) == name)


def claims(found: dict[str, Number]) -> list[tuple[str, str, str, str, str]]:
    """Claim of the abstract, (module, name), notebook, what was measured, verdict."""
    n = found
    limit = ablations.CONTINUED_GOALS["other_mr_continued"][3]
    shifts = len(stored("adaptation")["shifts"])
    rivals = [n[f"over {name}"] for name in ("gaussian", "mr guided", "kernel em")]
    return [
        (
            "a fusion module makes full use of the MR",
            ("fusion.py", "GatedFusion"),
            "02_fusion",
            f"right MR {n['right over none'].text()} over the same weights without one; in the ablations, of weights "
            f"before these, {n['right MR'].text()} over a model that never sees one",
            of_gain(n["right MR"]),
        ),
        (
            "... without introducing extraneous details",
            ("fusion.py", "GatedFusion"),
            "02_fusion",
            f"another patient's MR costs {n['wrong MR costs'].text()} against none (at most {limit:g}), its fit is "
            f"{n['MR fit of another'].value:.2f} of 1, that of the right one "
            f"{n['MR fit'].value:.2f}; false contrast at MR-only lesions {n['false contrast'].text('')}",
            of_limit(n["wrong MR costs"], limit),
        ),
        (
            "a diffusion model generates the SPET, with the fusion feature as a condition: its texture",
            ("denoiser.py", "ConditionalUNet"),
            "04_denoiser",
            f"a sample has {n['texture of a sample'].text('', '')} times the texture of the SPET",
            of_range(n["texture of a sample"], *TEXTURE),
        ),
        (
            "... iteratively, for a better image",
            ("diffusion.py", "sample"),
            "03_diffusion",
            f"mean of the samples {n['mean over coarse'].text()} over the coarse estimate",
            of_gain(n["mean over coarse"]),
        ),
        (
            "stage 1: generalized priors from simulated data",
            ("stage1.py", "train_stage1"),
            "05_stage1",
            f"{n['over scratch'].text()} over learning from the one scan alone, mean over {shifts} shifts",
            of_gain(n["over scratch"], "in emulation only"),
        ),
        (
            "stage 2: specific priors for out-of-distribution data in vivo",
            ("stage2.py", "train_stage2"),
            "06_stage2",
            f"`split` {n['split'].text()}, `sure` {n['sure'].text()}, oracle {n['oracle'].text()}, mean over {shifts} "
            f"shifts; `sure` from the LPET alone {n['alone'].text()}, mean over {len(stored('adaptation')['alone'])} "
            "targets of two simulators; nothing in vivo",
            of_gain(min(n["split"], n["sure"]), "in emulation only"),
        ),
        (
            "ahead of the state of the art",
            ("baselines.py", "kernel_em"),
            "08_evaluation",
            f"{n['over kernel em'].text()} over kernel EM, {n['over mr guided'].text()} over an MR-guided filter; "
            f"lesions of 6 to 10 mm keep {n['kept small'].value:.2f} of their contrast, with a Gaussian "
            f"{n['gaussian kept small'].value:.2f}; an observer finds lesions as at "
            f"{n['equivalent dose, restored'].value:.1f} times the dose, with a Gaussian "
            f"{n['equivalent dose, Gaussian'].value:.1f}; no published network was compared",
            of_rivals(rivals),
        ),
    ]


def claims_table(found: dict[str, Number], root: str = "") -> str:
    """The claims in Markdown. root: the way from the page to the repository's root."""
    lines = ["| the abstract says | code | notebook | measured here | verdict |", "|---|---|---|---|---|"]
    for claim, (module, name), notebook, number, verdict in claims(found):
        line = line_of(module, name)
        code = f"[{module}:{line}]({root}mfdiff_lite/{module}#L{line})"
        lines.append(
            f"| {claim} | {code} | [{notebook[:2]}]({root}notebooks/{notebook}.ipynb) | {number} | **{verdict}** |"
        )
    return "\n".join(lines) + "\n"


# ---- sentences -----------------------------------------------------------------------------------------------------


def worth(found: dict[str, Number]) -> str:
    """One paragraph, the same in three notebooks: what the diffusion stage is worth."""
    gain, texture, smooth = (found[k] for k in ("mean over coarse", "texture of a sample", "texture of the mean"))
    cover, factor = found["covered"], found["sd factor"].value
    text = (
        "**What is the diffusion worth?** Measured on the test patients of the default scanner at DRF 20: the mean of "
        f"the samples lies {beside(gain.value)} the coarse estimate in PSNR ({gain.text()}). "
    )
    if gain.high < WORTH:
        text += "So for the best single image you need no diffusion: the fusion module alone is as good. "
    elif gain.low > 0:
        text += "So the diffusion also makes the best single image better. "
    else:
        text += "Whether the diffusion makes the best single image better is open. "
    like = TEXTURE[0] <= texture.value <= TEXTURE[1]
    text += (
        f"What it gives is something else. It gives *samples*: possible images, whose texture is {texture.value:.2f} "
        f"times that of the SPET ({'close to' if like else 'not close to'} 1; the mean has {smooth.value:.2f}). And it "
        "gives an *SD*: where the samples disagree. "
    )
    share = f"the 90 % interval covers {100 * cover.value:.0f} % of the voxels"
    if cover.value < COVERED:
        text += f"That SD is too small as it comes: {share}. It must be multiplied by {factor:.1f} first."
    else:
        text += f"That SD can be used nearly as it comes: {share}."
    return text + "\n"


def read_restore(found: dict[str, Number]) -> str:
    n = found
    return (
        f"The mean of the samples lies {beside(n['mean over lpet'].value)} the LPET, "
        f"{beside(n['mean over gaussian'].value)} the tuned Gaussian and {beside(n['mean over coarse'].value)} the "
        f"coarse estimate. One sample lies {beside(n['sample over mean'].value)} the mean. Never compare a number of a "
        "table against the SPET with one against the truth.\n"
    )


def read_headline(found: dict[str, Number]) -> str:
    names = ablations.HEADLINE[1:]
    return (
        "With the right MR the gated fusion lies "
        + ", ".join(f"{beside(found[f'alike over {name}'].value)} *{name}*" for name in names)
        + ". Not all that is called leak comes from the MR: *PET only*, which never sees one, has its own value in the "
        "last column.\n"
    )


def read_continued(found: dict[str, Number]) -> str:
    right, wrong, false, kept = (
        found[k] for k in ("right MR", "wrong MR costs, continued", "false contrast, continued", "contrast moved")
    )
    limit = ablations.CONTINUED_GOALS["other_mr_continued"][3]
    text = f"With the right MR the model lies {beside(right.value)} one that never sees an MR ({right.text()}). "
    text += (
        f"With another patient's MR it lies {beside(-wrong.value)} that model. We allow {limit:g} dB: "
        + ("kept" if wrong.value <= limit else "**not** kept")
        + ". "
    )
    if false.low > 0:
        text += f"The right MR adds {false.value:.3f} of false contrast at MR-only lesions. "
    elif false.high < 0:
        text += f"The right MR takes {-false.value:.3f} of false contrast away at MR-only lesions. "
    else:
        text += "False contrast at MR-only lesions is not changed beyond its interval. "
    part = {name: between_parts(name) for name in ("no gate", "no similarity", "no lesion weight")}
    text += "Without the part the PSNR changes by " + ", ".join(f"{v:+.2f} dB (*{k}*)" for k, v in part.items())
    return text + f"; the contrast of PET-only lesions moves by {kept.value:+.3f} with the MR.\n"


def between_parts(name: str, condition: str = "right MR") -> float:
    parts = stored("ablations")["continued"]
    return between(parts[name]["patients"], parts["all parts"]["patients"], (condition, condition), "psnr").value


def read_adaptation(found: dict[str, Number]) -> str:
    shifts = stored("adaptation")["shifts"]
    text = ""
    for one in ("split", "sure"):
        gains = dict(zip(shifts, adaptation.gained(shifts, one), strict=True))
        best, worst = max(gains, key=gains.get), min(gains, key=gains.get)
        home = found[f"{one} at home"].value
        text += (
            f"`{one}`: {found[one].text()} over stage 1, mean over {len(gains)} shifts; most on *{best}* "
            f"({gains[best]:+.2f} dB), least on *{worst}* ({gains[worst]:+.2f} dB). On an ordinary patient the adapted "
            f"weights lie {beside(home)} stage 1. "
        )
    gain = found["over scratch"]
    text += f"Stage 1 is worth {gain.text()} over learning from the one scan alone. The oracle, which has the SPETs of "
    text += f"other patients, gains {found['oracle'].text()}. "
    alone = stored("adaptation")["alone"]
    gains = dict(zip(alone, adaptation.gained(alone, "sure"), strict=True))
    worst, refused = min(gains, key=gains.get), sum(bool(one["refused"]) for one in alone.values())
    kept = np.mean([adaptation.change(one, "sure", "contrast_kept") for one in alone.values()])
    text += (
        f"From the LPET alone `sure` gains {np.mean(list(gains.values())):+.2f} dB on average of {len(gains)} targets, "
    )
    text += f"least on *{worst}* ({gains[worst]:+.2f} dB); the guard refused {refused}. PET-only lesions change by "
    return text + f"{kept:+.3f} in the contrast that is kept.\n"


def not_to_adapt(found: dict[str, Number]) -> str:
    """The shifts on which `split` gained next to nothing."""
    shifts = stored("adaptation")["shifts"]
    gains = dict(zip(shifts, adaptation.gained(shifts, "split"), strict=True))
    small = [f"*{name}* ({gain:+.2f} dB)" for name, gain in gains.items() if gain < WORTH]
    if not small:
        return f"`split` gained {WORTH:g} dB or more on every one of {len(gains)} shifts.\n"
    return f"`split` gained less than {WORTH:g} dB on {len(small)} of {len(gains)} shifts: {', '.join(small)}.\n"


def read_evidence(found: dict[str, Number]) -> str:
    n = found
    small, blurred = n["kept small"].value, n["gaussian kept small"].value
    text = ", ".join(f"{beside(n[f'over {r}'].value)} *{r}*" for r in ("gaussian", "mr guided", "kernel em"))
    text = f"The restored mean lies {text}. Lesions of 6 to 10 mm keep {small:.2f} of their contrast, where the "
    text += f"Gaussian keeps {blurred:.2f}: "
    text += "small lesions are the price. " if small < blurred else "they are not the price here. "
    cover, again = n["covered"].value, n["covered, recalibrated"].value
    text += f"The 90 % interval covers {100 * cover:.0f} %, with the SD times {n['sd factor'].value:.2f}, fitted on "
    return text + f"validation patients, {100 * again:.0f} %.\n"


# ---- where it all goes ---------------------------------------------------------------------------------------------


def headline_block() -> str:
    return ablations.table_block(ablations.over_seeds(ablations.complete(stored("ablations")["headline"])))


def continued_block() -> str:
    parts = stored("ablations")
    return ablations.table_block(parts["continued"]) + ablations.doses_block(parts["doses"])


def adaptation_block() -> str:
    held = stored("adaptation")
    return adaptation.table_block(held["shifts"]) + adaptation.cohort_block(held) + adaptation.alone_block(held)


def restore_block() -> str:
    return results.table_block(stored("restore")["tables"], stored("restore")["setting"])


def share(count: int, whole: list[str]) -> str:
    return "all" if count == len(whole) else str(count)


def limits(found: dict[str, Number]) -> str:
    """What the README warns of, by what was measured."""
    kept, audited = found["kept small"].value, stored("evidence")["audit"]["summary"]
    harm = audited["no MR"]["psnr"]["mean"] - audited["another patient's MR"]["psnr"]["mean"]
    small = f"Lesions of 6 to 10 mm keep {kept:.0%} of their contrast. "
    wrong = (
        f"Another patient's MR does harm, {harm:.2f} dB"
        if harm > 0.1
        else "Another patient's MR is noticed and left out"
    )
    ours, filtered = (found[f"equivalent dose, {name}"].value for name in ("restored", "Gaussian"))
    seen = f"An observer finds lesions at threshold {'better' if ours > filtered else 'no better'} than with a Gaussian"
    gains = {name: row["restored"] - row["Gaussian"] for name, row in stored("any_noise")["scans"].items()}
    below = [name.split(",")[0] for name, gain in gains.items() if gain < -0.1]
    unseen = f"On {len(below)} of {len(gains)} scans of another simulator the best Gaussian is better"
    if below:
        most = max(below, key=below.count)
        warned = sum(bool(stored("any_noise")["scans"][name]["warned"]) for name, gain in gains.items() if gain < -0.1)
        unseen += f", {share(below.count(most), below)} of them with {most}; a check warns of {share(warned, below)}"
    return f"- {small}{seen}. {wrong}. {unseen}: [results](docs/results.md).\n"


def after_warning(below: list[dict]) -> str:
    """Of scans on which a Gaussian is better: whether a user is warned, and what adapting gets back."""
    if not below:
        return ""
    warned, refused = (sum(bool(row[key]) for row in below) for key in ("warned", "refused"))
    gap = float(np.mean([row["adapted"] - row["Gaussian"] for row in below]))
    text = f"A check warns of {warned} of these. Adapted to the scan alone they lie {beside(gap)} that Gaussian"
    return text + (f"; on {refused} the guard refused, and nothing changed. " if refused else ". ")


def read_any_noise(found: dict[str, Number]) -> str:
    held = stored("any_noise")
    gains = {name: row["restored"] - row["Gaussian"] for name, row in held["scans"].items()}
    worst = min(gains, key=gains.__getitem__)
    tracer, width, counts = worst.split(", ")
    below = [name for name, gain in gains.items() if gain < -0.1]
    text = f"Over these {len(gains)} scans the restored image lies {beside(float(np.mean(list(gains.values()))))} that "
    text += "Gaussian on average. " + (
        f"On {len(below)} of them it lies more than 0.1 dB below. "
        if below
        else "On none is it more than 0.1 dB below. "
    )
    text += after_warning([held["scans"][name] for name in below])
    text += (
        f"The worst is {tracer} with a filter of {width} and {int(counts):,} counts a slice: {gains[worst]:+.2f} dB. "
    )
    single = held["single"]
    text += (
        f"A slice that comes alone: LPET {single['LPET']:.1f} dB, the best 2-D Gaussian {single['Gaussian']:.1f} dB, "
    )
    return text + f"restored {single['restored']:.1f} dB.\n"


def read_detection(found: dict[str, Number]) -> str:
    """What the observers say of the shipped weights, and whether decibels say the same."""
    ours, filtered = (found[f"equivalent dose, {name}"].value for name in ("restored", "Gaussian"))
    text = f"The restored mean detects like a plain image of {ours:.1f} times the LPET's dose, the tuned Gaussian like "
    text += f"one of {filtered:.1f} times. "
    for rival, words in DETECTED.items():
        gain = found[f"detected over {rival}"]
        where = "within the interval of" if gain.low <= 0 <= gain.high else "above" if gain.low > 0 else "**below**"
        text += f"Its AUC lies {where} {words} ({gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]). "
    if ours <= filtered:
        return text + "So for finding such lesions it is no better than a Gaussian, whatever the PSNR says.\n"
    return text + "So for finding such lesions, too, it is better than a Gaussian.\n"


def read_bench(found: dict[str, Number]) -> str:
    """Each ratio to the fastest peer beside its goal."""
    rows = {row["id"].removeprefix("speed."): row for row in stored("targets") if row["id"].startswith("speed.")}

    def said(name: str) -> str:
        row = rows[name]
        return f"{row['value']:.1f} times (goal: {row['must']:g}{'' if row['met'] else ', **missed**'})"

    text = (
        f"One sample comes {said('restore')} as fast as from the fastest peer, without samples {said('fast')}; a step "
    )
    text += f"of training {said('training')}; a reconstruction {said('osem')} as fast as with the ASTRA toolbox's "
    name, slower = fastest_peer(), fastest_peer(plain=True)
    rates = stored("bench")["restoring"]["slices_a_second"]
    best = max(rate for one, rate in rates.items() if one.startswith("ours, "))
    text += f"projector. The fastest peer in restoring is {name}; over the fastest with our own widths it is "
    text += f"{best / rates[slower]:.1f} times. "
    held = stored("bench")["equal_time"]
    each = ", ".join(f"{name} {psnr:.1f} dB ({held['steps'][name]:,} steps)" for name, psnr in held["psnr_db"].items())
    text += (
        f"PSNR on the validation slices after {held['minutes']:g} minutes of CPU time of training each, on the same "
    )
    text += (
        f"batches: {each}. That is {beside(rows['equal_time']['value'])} the best peer. Ours sees two slices on either "
    )
    return text + "side of the one to restore, the peers see that one alone.\n"


def read_fast(found: dict[str, Number]) -> str:
    """What the qualities give up, in PSNR."""
    held, mean = stored("bench")["volume"], found["mean over coarse"].value
    psnr, seconds = held["psnr_db"], held["cpu_seconds"]
    text = f"The mean of the samples lies {beside(mean)} the coarse estimate of all views (mean over patients, on the "
    text += f"page [results](results.md)). `fast` sees one view: on {held['slices']} slices of one head it lay "
    text += f"{beside(psnr['fast'] - psnr['now'])} `standard`, in {seconds['fast'] / seconds['now']:.0%} of the time. "
    return text + f"bfloat16 moved the PSNR of `standard` by {abs(psnr['now'] - psnr['float32']):.3f} dB.\n"


def fastest_peer(plain: bool = False) -> str:
    """Name and precision of the peer that restores fastest. plain: of those with our own widths."""
    rates = stored("bench")["restoring"]["slices_a_second"]
    peers = [name for name in rates if name.startswith(tuple(bench.PEERS)) and not (plain and "deeper" in name)]
    return max(peers, key=rates.__getitem__)


def checks_block() -> str:
    """How often the checks of a scan are right, and how far the registration is off: the rows of the targets."""
    rows = [
        row for row in stored("targets") if row["id"].startswith(("real.warned", "real.false", "real.registration"))
    ]
    lines = ["| | found | must | |", "|---|---|---|---|"]
    for row in rows:
        found, must = f"{row['value']:.3g} {row['unit']}", f"{row['sense']} {row['must']:g} {row['unit']}"
        lines.append(f"| {row['relation']} | {found} | {must} | {'met' if row['met'] else '**missed**'} |")
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, Callable[[dict[str, Number]], str]] = {
    "results": lambda found: restore_block(),
    "evidence": lambda found: evidence.table_block(stored("evidence")),
    "headline": lambda found: headline_block(),
    "ablations": lambda found: ablations.table_block(stored("ablations")["variants"]),
    "continued": lambda found: continued_block(),
    "adaptation": lambda found: adaptation_block(),
    "guard": lambda found: adaptation.guard_block(stored("adaptation")),
    "any_noise": lambda found: any_noise.block(stored("any_noise")),
    "read_any_noise": read_any_noise,
    "detection": lambda found: detection.table_block(stored("detection")),
    "read_detection": read_detection,
    "bench": lambda found: bench.block(stored("bench")),
    "read_bench": read_bench,
    "read_fast": read_fast,
    "limits": limits,
    "checks": lambda found: checks_block(),
    "real": lambda found: real.table_block(stored("real")),
    "claims": claims_table,
    "claims_page": lambda found: claims_table(found, "../"),
    "worth": worth,
    "read_restore": read_restore,
    "read_headline": read_headline,
    "read_continued": read_continued,
    "read_adaptation": read_adaptation,
    "read_evidence": read_evidence,
    "not_to_adapt": not_to_adapt,
}


def filled(text: str, found: dict[str, Number]) -> str:
    """A page's text with every block made anew. Raises KeyError for a mark of an unknown name."""
    return MARK.sub(lambda mark: f"{mark[1]}{BLOCKS[mark[2]](found)}{mark[4]}", text)


def pictured(cell: dict) -> dict:
    """A Markdown cell with the drawings that it names attached, so that a notebook is complete alone."""
    names = re.findall(r"\(attachment:(\w+\.svg)\)", "".join(cell["source"]))
    drawn = {name: (ROOT / "docs" / "drawings" / name).read_bytes() for name in names}
    held = {name: {"image/svg+xml": base64.b64encode(image).decode()} for name, image in drawn.items()}
    kept = {key: value for key, value in cell.items() if key != "attachments"}
    return dict(sorted((kept | ({"attachments": held} if held else {})).items()))


def in_cells(text: str, found: dict[str, Number]) -> str:
    """A notebook's JSON with the blocks and the drawings of its Markdown cells made anew."""
    notebook, before = json.loads(text), json.loads(text)
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            source = filled("".join(cell["source"]), found)
            notebook["cells"][place] = pictured(cell | {"source": source.splitlines(keepends=True)})
    return text if notebook == before else json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[Path, str]:
    """Every page with marks or drawings, as it should be."""
    found = measured()
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
    made = {path: in_cells if path.suffix == ".ipynb" else filled for path in texts}
    return {path: make(path.read_text(encoding="utf-8"), found) for path, make in made.items()}


def main() -> None:
    for path, text in pages().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
