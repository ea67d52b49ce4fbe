"""Measure the shipped weights on test patients: `make results` (about 10 minutes on 2 cores; `--quick` for a look).

Writes results/*.json, results/*.png and the rows of group "restore" in results/targets.json. Anything tuned is tuned on
the validation anatomy; the test anatomy is touched once, with those values.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer
from tqdm import tqdm

from mfdiff_lite import metrics
from mfdiff_lite.baselines import gaussian, tune
from mfdiff_lite.config import TEST_ANATOMIES, VALIDATION_ANATOMIES
from mfdiff_lite.diffusion import NoiseSchedule, sample
from mfdiff_lite.evaluation import COLUMNS, Table, evaluate, written
from mfdiff_lite.model import FIDELITY, START, STEPS, load_pretrained
from mfdiff_lite.phantom import Randomisation, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.revision import code_revision
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner

matplotlib.use("Agg")
RESULTS = Path(__file__).parents[1] / "results"
DOSE = 20
SLICES = {True: 8, False: 12}  # of each test patient, by `quick`
SHIFTS = {"default scanner": None, "edge scanner": "edge-scanner"}
# id: (relation, unit, sense, must, aim)
GOALS = {
    "gain_over_lpet_default": ("PSNR of the K=8 mean over the LPET, default scanner", "dB", ">=", 5.0, 7.0),
    "gain_over_lpet_edge": ("PSNR of the K=8 mean over the LPET, edge scanner", "dB", ">=", 5.0, 7.0),
    "gain_over_gaussian_default": ("... over the best 3-D Gaussian, tuned on validation", "dB", ">=", 1.5, None),
    "gain_over_gaussian_edge": ("... over the best 3-D Gaussian on the edge scanner", "dB", ">=", 1.0, None),
    "sampler_steps": ("PSNR lost by the warm-started steps against 50 DDIM steps from noise", "dB", "<=", 0.1, None),
    "slice_seconds": ("one 128 x 128 slice, one sample", "s", "<=", 0.25, None),
    "volume_seconds": ("64-slice volume, one sample", "s", "<=", 15.0, None),
    "peak_memory": ("peak memory of a 64-slice volume", "GB", "<=", 1.5, None),
    "memory_growth": ("peak memory of 64 slices minus that of 32", "GB", "<=", 0.1, None),
    "adjoint": ("relative adjoint error of the projector", "", "<=", 1e-6, None),
    "gaussian_sampler": ("DPM-Solver++ on a closed-form Gaussian, 100 steps, relative SD error", "", "<=", 1e-3, None),
    "ddim_parity": ("largest difference to the diffusers DDIM trajectory", "", "<=", 1e-5, None),
}
for _scanner in ("default", "edge"):
    GOALS |= {
        f"activity_{_scanner}": (f"|brain activity / the LPET's - 1|, {_scanner} scanner", "%", "<=", 2.0, None),
        f"contrast_kept_{_scanner}": (f"PET-only contrast kept (SPET = 1), {_scanner} scanner", "", ">=", 0.7, 0.9),
        f"contrast_vs_gaussian_{_scanner}": (f"... minus the best Gaussian's, {_scanner} scanner", "", ">=", 0.0, None),
        f"mr_leak_{_scanner}": (f"false contrast at MR-only lesions minus the LPET's, {_scanner}", "", "<=", 0.0, None),
    }
COST = ("slice_seconds", "volume_seconds", "peak_memory", "memory_growth")
LESIONS = Randomisation(
    lesion_radius=(3.0, 7.0), lesions_per_100ml=(0.8, 1.2)
)  # what the issue of PET-only lesions is judged on


def scans(
    anatomies: tuple[str, ...], count: int, slices: int, shift: str | None, first: int, dose_reduction: float = DOSE
) -> list[Scan]:
    """Scans of new virtual patients."""
    scanner, made = Scanner.shifted(shift), []
    for index in tqdm(range(count), desc=f"{shift or 'default'} scans", unit="patient"):
        patient = virtual_patient(
            load_anatomy(anatomies[index % len(anatomies)]), first + index, slices=slices, randomisation=LESIONS
        )
        made.append(scanner.scan(patient, dose_reduction))
    return made


def second_spet(scan: Scan, shift: str | None) -> np.ndarray:
    """Another standard-dose image of the same patient of `scans`: how well two of them agree."""
    anatomy, _, seed = scan.name.rpartition("-")
    slices = scan.lpet.shape[2]
    patient = virtual_patient(load_anatomy(anatomy), int(seed), slices=slices, randomisation=LESIONS)
    scanner = Scanner.shifted(shift)
    return scanner.reconstruct(scanner.acquire(patient.activity, patient.attenuation, patient.seed + 77_777))


def choose_on_validation(model, quick: bool) -> dict:
    """The Gaussian's width for each scanner and the curve of fidelity: PSNR against contrast kept and leak."""
    chosen: dict = {"patients": {}, "gaussian_fwhm_mm": {}, "fidelity": []}
    for name, shift in SHIFTS.items():
        cases = scans(VALIDATION_ANATOMIES, 2 if quick else 4, 8 if quick else 12, shift, first=500_000)
        chosen["gaussian_fwhm_mm"][name] = tune(gaussian, cases, fwhm=np.arange(2.0, 10.01, 0.5))["fwhm"]
        chosen["patients"][name] = len(cases)
        if shift is None:
            width = chosen["gaussian_fwhm_mm"][name]
            gaussians = evaluate({"gaussian": lambda s, w=width: gaussian(s, w)}, cases)
            for fidelity in (0.0, 0.25, 0.5, 0.75, 1.0):
                table = evaluate({"mean": lambda s, f=fidelity: model.restore(s, 2, fidelity=f).mean}, cases)
                row = {key: value["mean"] for key, value in table["summary"]["spet"]["mean"].items()}
                chosen["fidelity"].append({"fidelity": fidelity, **row})
            chosen["gaussian"] = {key: value["mean"] for key, value in gaussians["summary"]["spet"]["gaussian"].items()}
    chosen["default_fidelity"] = FIDELITY
    return chosen


def measure(model, cases: list[Scan], fwhm: float, samples: int, shift: str | None) -> dict:
    """All rows of the table for each patient, against SPET and against truth."""
    restored = {}

    def once(scan: Scan):
        if scan.name not in restored:
            restored.clear()
            restored[scan.name] = model.restore(scan, samples)
        return restored[scan.name]

    methods = {
        "Gaussian": lambda s: gaussian(s, fwhm),
        "coarse": lambda s: once(s).coarse,
        "one sample": lambda s: once(s).samples[0],
        f"mean of {samples}": lambda s: once(s).mean,
        "second SPET": lambda s: second_spet(s, shift),
    }
    return evaluate(methods, tqdm(cases, desc="restoring", unit="patient"))


def paired(
    table: dict, better: str, worse: str, metric: str, against: str = "spet"
) -> tuple[float, tuple[float, float]]:
    """Mean difference over patients with its 95 % interval."""
    return metrics.mean_ci([p[against][better][metric] - p[against][worse][metric] for p in table["patients"]])


def sampler_agreement(model, cases: list[Scan], slices: int) -> tuple[float, tuple[float, float]]:
    """PSNR of `STEPS` warm-started steps minus 50 steps of DDIM from noise, K = 8 means, per patient."""
    differences = []
    for scan in tqdm(cases, desc="50-step DDIM", unit="patient"):
        middle = scan.lpet.shape[2] // 2
        cut = slice(middle - slices // 2, middle - slices // 2 + slices)
        part = Scan(
            scan.lpet[..., cut],
            scan.mr[..., cut],
            scan.spet[..., cut],
            mask=scan.mask[..., cut],
            affine=scan.affine,
            dose_reduction=DOSE,
        )
        fast = model.restore(part, 8).mean
        slow = model.restore(part, 8, steps=50, start=1.0, method="ddim").mean
        differences.append(metrics.psnr(fast, part.spet, part.mask) - metrics.psnr(slow, part.spet, part.mask))
    return metrics.mean_ci(differences)


def seconds_per_slice(model) -> float:
    """Median time of one 128 x 128 slice, one sample, the whole field of view."""
    lpet, mr = (torch.rand(1, model.fusion.context, 128, 128) for _ in range(2))
    times = []
    for _ in range(9):
        began = time.perf_counter()
        model.restore_slices(lpet, mr, torch.tensor([float(DOSE)]), torch.randn(1, 1, 128, 128))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def volume_cost(slices: int) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of restoring a volume with one sample, in a process of its own."""
    code = (
        "import sys, time, resource, numpy as np\n"
        "import mfdiff_lite as mf\n"
        "n = int(sys.argv[1]); rng = np.random.default_rng(0)\n"
        "x = np.indices((128, 128)) - 63.5; head = ((x[0] / 38) ** 2 + (x[1] / 46) ** 2 < 1)[..., None]\n"
        "lpet = (rng.gamma(2, 5, (128, 128, n)) * head).astype('float32')\n"
        "mr = (rng.random((128, 128, n)) * head).astype('float32')\n"
        "model = mf.load_pretrained('cpu'); began = time.perf_counter(), time.process_time()\n"
        "model.restore(mf.Scan(lpet, mr), n_samples=1)\n"
        "print(time.perf_counter() - began[0], time.process_time() - began[1],\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(slices)], capture_output=True, text=True, check=True)
    seconds, of_cpu, gigabytes = map(float, done.stdout.split())
    return {"slices": slices, "seconds": seconds, "cpu_seconds": of_cpu, "peak_gb": gigabytes}


def measure_cost(model, targets: Targets) -> list[dict[str, float]]:
    """The rows of COST; other work on the machine spoils them."""
    costs = [volume_cost(n) for n in (32, 64)]
    targets.add("slice_seconds", seconds_per_slice(model))
    targets.add("volume_seconds", costs[1]["seconds"])
    targets.add("peak_memory", costs[1]["peak_gb"])
    targets.add("memory_growth", costs[1]["peak_gb"] - costs[0]["peak_gb"])
    return costs


def adjoint_error() -> float:
    """|<A x, y> - <x, A' y>| / |<A x, y>| with dot products in float64."""
    scanner, rng = Scanner(), np.random.default_rng(0)
    x = rng.random((128, 128, 2), dtype=np.float32)
    y = rng.random((scanner.angles, 128, 2), dtype=np.float32)
    left, right = (
        np.vdot(scanner.forward(x).astype(float), y.astype(float)),
        np.vdot(x.astype(float), scanner.adjoint(y).astype(float)),
    )
    return abs(left - right) / abs(left)


def gaussian_sampler_error() -> float:
    """DPM-Solver++ in 100 steps on x0 ~ N(0, 0.5^2), whose optimal denoiser is known: relative error of the SD it
    generates."""
    schedule, sd = NoiseSchedule(), 0.5

    def optimal(xt, t):
        a = schedule.alpha_bar(t, xt)
        x0 = a.sqrt() * sd**2 / (a * sd**2 + 1 - a) * xt
        return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    noise = torch.ones(1, 1, dtype=torch.float64)
    return abs(float(sample(optimal, noise, schedule, steps=100)) / sd - 1)


def ddim_parity() -> float:
    """Largest difference to the DDIM trajectory of `diffusers`, 50 steps, with a deterministic dummy model."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(50)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dummy = lambda x, t: 0.3 * torch.tanh(x) + 0.1 * x  # noqa: E731
    image = start
    for t in theirs.timesteps:
        image = theirs.step(dummy(image, t), t, image, eta=0.0).prev_sample
    return float((sample(dummy, start, NoiseSchedule(), steps=50, method="ddim") - image).abs().max())


class Targets:
    """Rows of results/targets.json for one group; all others stay as they are.

    goals: id -> (relation, unit, sense, must, aim or None).
    """

    def __init__(self, group: str, goals: dict[str, tuple], command: str = "make results"):
        self.group, self.goals, self.command, self.rows = group, goals, command, []
        self.revision = code_revision()

    def add(self, name: str, value: float, ci95: Iterable[float] | None = None) -> None:
        relation, unit, sense, must, aim = self.goals[name]
        self.rows.append(
            {
                "id": f"{self.group}.{name}",
                "relation": relation,
                "value": round(float(value), 9),
                "ci95": None if ci95 is None else [round(float(c), 6) for c in ci95],
                "unit": unit,
                "sense": sense,
                "must": must,
                "aim": aim,
                "met": bool(value >= must if sense == ">=" else value <= must),
                "command": self.command,
                "revision": self.revision,
            }
        )

    def show(self) -> None:
        for row in self.rows:
            verdict = "met   " if row["met"] else "MISSED"
            print(f"{verdict}  {row['id']:40} {row['value']:.4g} {row['unit']} ({row['sense']} {row['must']:g})")

    def write(self) -> None:
        missing = sorted(set(self.goals) - {row["id"].partition(".")[2] for row in self.rows})
        if missing:
            raise RuntimeError(f"targets of group {self.group} that were never measured: {', '.join(missing)}")
        path = RESULTS / "targets.json"
        held = json.loads(path.read_text()) if path.exists() else []
        mine = {row["id"]: row for row in self.rows}
        for old in held:  # a number that has not changed keeps the revision that it was measured at
            if mine.get(old["id"], {}) | {"revision": old["revision"]} == old:
                mine[old["id"]] = old
        write_json("targets.json", [mine.pop(old["id"], old) for old in held] + list(mine.values()))


def write_json(name: str, content: object) -> None:
    (RESULTS / name).write_text(json.dumps(content, indent=1) + "\n")


def picture(model, scan: Scan) -> None:
    """The README's case."""
    from mfdiff_lite.look import figure

    figure(scan, model.restore(scan, 8)).savefig(RESULTS / "restored.png", dpi=80, bbox_inches="tight")


def fidelity_picture(chosen: dict) -> None:
    """PSNR against lesion contrast kept, on validation patients."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), facecolor="white")
    points = chosen["fidelity"]
    axes.plot([p["contrast_kept"] for p in points], [p["psnr"] for p in points], "o-", label="mean of 2, by fidelity")
    for p in points:
        axes.annotate(f"{p['fidelity']:g}", (p["contrast_kept"], p["psnr"]), textcoords="offset points", xytext=(6, 4))
    axes.plot(
        chosen["gaussian"]["contrast_kept"], chosen["gaussian"]["psnr"], "s", color="black", label="best 3-D Gaussian"
    )
    axes.set(
        xlabel="contrast of PET-only lesions kept (SPET = 1)",
        ylabel="PSNR against SPET [dB]",
        title=f"Fidelity, validation anatomy, DRF {DOSE}",
    )
    axes.legend()
    figure.savefig(RESULTS / "fidelity.png", dpi=100, bbox_inches="tight")


def table_block(tables: dict, setting: dict) -> str:
    """The tables of docs/results.md, in Markdown: mean over patients and 95 % interval."""
    columns = {key: name for key, name in COLUMNS.items() if key != "nrmse"}
    lines = []
    for scanner, table in tables.items():
        for against, reference in (("spet", "SPET"), ("truth", "the truth")):
            n = len(table["patients"])
            lines += [
                f"**{scanner.capitalize()}, DRF {setting['dose_reduction']}, n = {n} patients, against {reference}**",
                "",
            ]
            lines += ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
            for method, row in table["summary"][against].items():
                cells = [
                    f"{written(k, row[k]['mean'])} [{', '.join(written(k, c) for c in row[k]['ci95'])}]"
                    for k in columns
                ]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def as_table(title: str, summary: dict) -> Table:
    return Table(title, {method: {key: value["mean"] for key, value in row.items()} for method, row in summary.items()})


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="2 patients, few slices, nothing written: a look at the tables")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="measure the first patient again and compare with results/restore.json")
    ] = False,
    cost: Annotated[bool, typer.Option("--cost", help="measure seconds and memory alone, on an idle machine")] = False,
) -> None:
    """Measure the shipped weights on the test anatomy."""
    RESULTS.mkdir(exist_ok=True)
    model, samples = load_pretrained("cpu"), 8
    if check:
        return check_stored(model)
    if cost:
        targets = Targets("restore", {name: GOALS[name] for name in COST}, "make results ARGS=--cost")
        stored = json.loads((RESULTS / "restore.json").read_text())
        stored |= {"cost": measure_cost(model, targets), "torch_threads": torch.get_num_threads()}
        targets.show()
        write_json("restore.json", stored)
        return targets.write()
    targets, mean = Targets("restore", GOALS), f"mean of {samples}"
    chosen = choose_on_validation(model, quick)
    tables = {}
    for name, shift in SHIFTS.items():
        cases = scans(TEST_ANATOMIES, 2 if quick else 6, SLICES[quick], shift, first=900_000)
        tables[name] = measure(model, cases, chosen["gaussian_fwhm_mm"][name], samples, shift)
        for against in ("spet", "truth"):
            title = f"{name}, DRF {DOSE}, n = {len(cases)}, against {against}"
            print(f"\n{as_table(title, tables[name]['summary'][against])}")
        judge(targets, tables[name], mean, name.split()[0])
        if shift is None:
            agreement, ci = sampler_agreement(model, cases[:2], 4)
            targets.add("sampler_steps", -agreement, sorted(-c for c in ci))
            if not quick:
                picture(model, cases[0])
    costs = measure_cost(model, targets)
    targets.add("adjoint", adjoint_error())
    targets.add("gaussian_sampler", gaussian_sampler_error())
    targets.add("ddim_parity", ddim_parity())
    print()
    targets.show()
    if quick:
        return
    targets.write()
    fidelity_picture(chosen)
    setting = {"dose_reduction": DOSE, "samples": samples, "steps": STEPS, "start": START, "fidelity": FIDELITY}
    setting["revision"] = targets.revision
    threads = torch.get_num_threads()
    write_json("restore.json", {"setting": setting, "tables": tables, "cost": costs, "torch_threads": threads})
    write_json("validation.json", chosen)


def check_stored(model, tolerance: float = 0.05) -> None:
    """Fail unless the first patient of each scanner scores again what is stored, within `tolerance` [dB] of PSNR."""
    stored, worst = json.loads((RESULTS / "restore.json").read_text()), 0.0
    widths = json.loads((RESULTS / "validation.json").read_text())["gaussian_fwhm_mm"]
    for name, shift in SHIFTS.items():
        cases = scans(TEST_ANATOMIES, 1, SLICES[False], shift, first=900_000)
        found = measure(model, cases, widths[name], stored["setting"]["samples"], shift)["patients"][0]
        held = stored["tables"][name]["patients"][0]
        for against in ("spet", "truth"):
            for method, row in found[against].items():
                difference = row["psnr"] - held[against][method]["psnr"]
                worst = max(worst, abs(difference))
                print(f"{name}, {method}, against {against}: {row['psnr']:.3f} dB, stored {difference:+.3f} dB away")
    if worst > tolerance:
        sys.exit(f"results differ by {worst:.3f} dB, more than {tolerance}: run make results, and say why")
    print(f"the stored results stand: largest difference {worst:.4f} dB")


def judge(targets: Targets, table: dict, mean: str, scanner: str) -> None:
    """The targets of one scanner, from its table of patients."""
    targets.add(f"gain_over_lpet_{scanner}", *paired(table, mean, "LPET", "psnr"))
    targets.add(f"gain_over_gaussian_{scanner}", *paired(table, mean, "Gaussian", "psnr"))
    rows = [p["spet"] for p in table["patients"]]
    bias, ci = metrics.mean_ci([abs(r[mean]["activity_bias"] - r["LPET"]["activity_bias"]) for r in rows])
    targets.add(f"activity_{scanner}", 100 * bias, np.multiply(ci, 100))
    targets.add(f"contrast_vs_gaussian_{scanner}", *paired(table, mean, "Gaussian", "contrast_kept"))
    own = table["summary"]["spet"][mean]["contrast_kept"]
    targets.add(f"contrast_kept_{scanner}", own["mean"], own["ci95"])
    targets.add(f"mr_leak_{scanner}", *paired(table, mean, "LPET", "mr_leak", "truth"))


if __name__ == "__main__":
    typer.run(main)
