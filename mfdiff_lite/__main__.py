"""The command line: `python -m mfdiff_lite COMMAND --help`.

Exit status 0 on success; 2 on bad usage or bad input, with one sentence on stderr; 1 on an internal fault; 130 on
Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Restore a standard-dose PET image from low-dose PET and MR. For teaching and research; not a medical device.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
DoseReduction = Annotated[
    float, typer.Option(help="dose-reduction factor: standard-dose counts / counts of the LPET, at least 1")
]
Force = Annotated[bool, typer.Option("--force", help="replace output files that exist")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what can go wrong into one sentence and an exit status."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except (ValueError, OSError) as error:
            _stop(f"{error}", 2)
        except KeyboardInterrupt:
            _stop("stopped by Ctrl-C; nothing half-written was left behind", 130)
        except MemoryError:
            _stop("not enough memory for this volume; crop it to the head or free some memory", 1)
        except Exception as error:
            if os.environ.get("MFDIFF_DEBUG"):
                raise
            _stop(
                f"internal fault ({type(error).__name__}: {error}); set MFDIFF_DEBUG=1 for the traceback and report it",
                1,
            )

    return app.command()(run)


def _stop(sentence: str, status: int) -> None:
    print(f"mfdiff_lite: {' '.join(sentence.split())}", file=sys.stderr)
    raise typer.Exit(status)


@_command
def restore(
    lpet: Annotated[Path, typer.Option(help="low-dose PET, 3-D NIfTI, any orientation and voxel size")],
    mr: Annotated[Path, typer.Option(help="MR of the same head, registered to the PET; any grid")],
    out: Annotated[Path, typer.Option(help="the restored PET, on the grid and in the unit of the LPET")],
    std: Annotated[Path | None, typer.Option(help="also write the voxel-wise SD of the samples")] = None,
    dose_reduction: DoseReduction = 20.0,
    samples: Annotated[int, typer.Option(help="samples to average; 1 is fastest, 8 gives mean and SD")] = 8,
    steps: Annotated[int | None, typer.Option(help="sampler steps; default 6")] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="0 to 1, pull towards the measured LPET: more lesion contrast, more noise")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="weights of `train`; default: the shipped ones")] = None,
    seed: Annotated[int, typer.Option(help="seed of the samples")] = 0,
    device: Device = "auto",
    report: Annotated[Path | None, typer.Option(help="also write an HTML page with pictures")] = None,
    force: Force = False,
) -> None:
    """Restore a low-dose PET with the help of an MR of the same head."""
    from tqdm import tqdm

    from .model import load_model, load_pretrained
    from .scan import load_scan, save_volume, whole_file

    if std is not None and samples < 2:
        raise ValueError(
            f"--std: expected --samples of at least 2, found {samples}; raise --samples or leave out --std"
        )
    outputs = [path for path in (out, std, report) if path is not None]
    _all_different(outputs, [lpet, mr, weights])
    if seed < 0:
        raise ValueError(f"--seed: expected at least 0, found {seed}")
    for path in (out, std):
        if path is not None and not path.name.endswith((".nii", ".nii.gz")):
            raise ValueError(f"{path}: expected a name that ends in .nii.gz or .nii; rename the output")
    for path in outputs:
        _ready_for(path, force)
    scan = load_scan(lpet, mr, dose_reduction=dose_reduction)
    model = load_pretrained(device) if weights is None else load_model(weights, device)
    chosen = {"steps": steps, "fidelity": fidelity}
    began = time.monotonic()
    restored = model.restore(
        scan,
        samples,
        seed=seed,
        progress=functools.partial(tqdm, desc="restoring", unit="slice", disable=None),
        **{key: value for key, value in chosen.items() if value is not None},
    )
    seconds = time.monotonic() - began
    written = [save_volume(out, restored.mean, scan, force)]
    if std is not None:
        written.append(save_volume(std, restored.std, scan, force))
    if report is not None:
        from .explorer import report_html

        lines = {
            "LPET": str(lpet),
            "MR": str(mr),
            "restored": str(out),
            "dose reduction": f"{dose_reduction:g}",
            "weights": _weights_line(model, weights),
        }
        lines |= {key: str(value) for key, value in restored.settings.items()} | {"seconds": f"{seconds:.1f}"}
        with whole_file(report, force) as partial:
            partial.write_text(report_html(scan, restored, lines), encoding="utf-8")
        written.append(report)
    print(f"restored {scan.lpet.shape} voxels in {seconds:.1f} s with {_weights_line(model, weights)}")
    for path in written:
        print(f"wrote {path}")


def _weights_line(model: object, path: Path | None) -> str:
    card, target = model.card, ""
    if "parent" in card:
        target = f", stage 2 by {card['adaptation']['objective']!r} on {', '.join(card['target'])}"
    return f"{path or 'shipped weights'} (revision {card.get('revision')}, {card.get('steps')} steps{target})"


def _all_different(outputs: list[Path], inputs: list[Path | None]) -> None:
    """Never write over an input, not even with --force."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path.resolve() in taken:
            raise ValueError(
                f"{path}: expected outputs that differ from each other and from the inputs, found it twice; "
                "choose another name"
            )
        taken.add(path.resolve())


def _ready_for_folder(path: Path) -> None:
    """Refuse before any work a folder that could not be made; make nothing yet."""
    found = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not found.is_dir() or not os.access(found, os.W_OK):
        reason = "one that is read-only" if found.is_dir() else "a file"
        raise OSError(f"{path}: expected a folder to write into, found {reason} at {found}; choose another --out")


def _ready_for(path: Path, force: bool) -> None:
    """Refuse before any work what saving would refuse after it."""
    from .scan import whole_file

    partial = whole_file(path, force).__enter__()
    try:
        partial.touch()
    except OSError as error:
        raise OSError(f"{path}: expected a place to write to, found {error.strerror}; choose another --out") from None
    partial.unlink()


@_command
def simulate(
    out: Annotated[
        Path,
        typer.Option(
            help="folder for lpet, spet, mr, activity, mask, tissues, lesions, half_a, half_b (.nii.gz), scan.json"
        ),
    ],
    anatomy: Annotated[
        str, typer.Option(help="an anatomy that `info` lists: embedded, or of BrainWeb once fetched")
    ] = "icbm152",
    seed: Annotated[int, typer.Option(help="number of the virtual patient")] = 0,
    dose_reduction: DoseReduction = 20.0,
    shift: Annotated[
        str | None, typer.Option(help="OOD emulation that `info` lists, e.g. edge-scanner; + joins two")
    ] = None,
    slices: Annotated[int | None, typer.Option(help="axial slices; default: the whole head")] = None,
    force: Force = False,
) -> None:
    """Simulate a virtual patient on the virtual scanner: low-dose and standard-dose PET, MR and the truth."""
    import dataclasses

    from .anatomy import load_anatomy
    from .phantom import virtual_patient
    from .scan import save_volume, whole_file
    from .scanner import Scanner

    if slices is not None and slices < 1:
        raise ValueError(f"--slices: expected at least 1, found {slices}")
    if seed < 0:
        raise ValueError(f"--seed: expected at least 0, found {seed}")
    names = ("lpet", "spet", "mr", "activity", "mask", "tissues", "lesions", "half_a", "half_b")
    held = [out / f"{name}.nii.gz" for name in names if (out / f"{name}.nii.gz").exists()]
    if held and not force:
        raise FileExistsError(f"{held[0]}: exists already; choose another --out or pass --force to replace it")
    _ready_for_folder(out)
    scanner = Scanner.shifted(shift)
    print("drawing the patient, scanning, reconstructing: a whole head takes about half a minute", file=sys.stderr)
    patient = virtual_patient(load_anatomy(anatomy), seed, shift, slices)
    scan = scanner.scan(patient, dose_reduction, halves=True)
    images = {name: getattr(scan, name) for name in names[:-2]} | dict(zip(names[-2:], scan.halves, strict=True))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out}: expected a folder to write into, found {error.strerror}; choose another --out") from None
    for name, image in images.items():
        save_volume(out / f"{name}.nii.gz", image, scan, force)
    note = {
        "anatomy": anatomy,
        "seed": seed,
        "dose_reduction": dose_reduction,
        "shift": shift,
        "unit": scan.unit,
        "scanner": dataclasses.asdict(scanner),
        "truth": patient.truth,
        "lesions": [dataclasses.asdict(one) for one in scan.lesion_table],
        "note": "real anatomy, simulated images; teaching and research only",
    }
    with whole_file(out / "scan.json") as partial:
        partial.write_text(json.dumps(note, indent=1) + "\n")
    print(f"wrote {', '.join(names)} (.nii.gz, {scan.lpet.shape} voxels, {scan.unit}) and scan.json to {out}")


@_command
def evaluate(
    lpet: Annotated[Path, typer.Option(help="low-dose PET")],
    spet: Annotated[Path, typer.Option(help="standard-dose PET, the reference, on the LPET's grid")],
    restored: Annotated[Path, typer.Option(help="the restored PET, on the LPET's grid")],
    mask: Annotated[Path | None, typer.Option(help="brain mask; default: a rough one from the LPET")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the numbers as JSON")] = None,
    force: Force = False,
) -> None:
    """Compare a restored PET with the standard-dose PET: PSNR, SSIM, NRMSE, activity bias; the LPET and a Gaussian
    beside it."""
    import numpy as np

    from .evaluation import brain_mask, compare
    from .scan import load_scan, load_volume, whole_file

    if json_out is not None:
        _all_different([json_out], [lpet, spet, restored, mask])
        _ready_for(json_out, force)
    scan = load_scan(lpet, spet_path=spet, mask_path=mask)
    image, affine = load_volume(restored)
    if image.shape != scan.lpet.shape or not np.allclose(affine, scan.affine, atol=1e-2):
        raise ValueError(
            f"{restored}: expected the grid of {lpet}, {scan.lpet.shape}, found {image.shape} or another affine; "
            "restore that LPET again"
        )
    if not np.isfinite(image).all():
        raise ValueError(f"{restored}: expected finite values, found NaN or infinite voxels; restore it again")
    if not brain_mask(scan).any():
        raise ValueError(f"{mask}: expected a brain mask, found no voxel above 0.5; check the file")
    scan.dose_reduction = float("nan")  # files do not say it
    table = compare(scan, {"restored": image})
    table.title = f"{scan.name}, against SPET"
    print(table)
    if json_out is not None:
        images = {
            name: {k: v if np.isfinite(v) else None for k, v in row.items()} for name, row in table.rows.items()
        }  # JSON has no infinity
        with whole_file(json_out, force) as partial:
            partial.write_text(
                json.dumps({"mask": str(mask or "rough, from the LPET"), "against": "spet", "images": images}, indent=1)
                + "\n"
            )


def _pairs(settings: list[str] | None, command: str) -> dict[str, str]:
    """key=value arguments as a dict."""
    pairs = [item.partition("=") for item in settings or []]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected key=value, found no '='; see `{command} --help`")
    return {key: value for key, _, value in pairs}


@_command
def train(
    out: Annotated[Path, typer.Option(help="folder for checkpoints and the final weights")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …, replacing values of the profile")] = None,
    profile: Annotated[str, typer.Option(help="smoke (seconds), cpu (an afternoon), gpu")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the checkpoint in --out, to the same weights as an uncut run")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="start from these weights, of the same shape, instead of random ones")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train stage 1 on the simulated cohort (made first, and cached)."""
    from tqdm import tqdm

    from .config import load_profile
    from .model import load_model
    from .training import WEIGHTS, train_stage1

    chosen = load_profile(profile, **_pairs(settings, "train"))
    start = None if weights is None else load_model(weights, "cpu")
    _ready_for_folder(out)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that `accelerate launch` starts, one speaks
    bar = None
    try:
        for state in train_stage1(chosen, out, resume, device, start=start):
            if not first:
                continue
            bar = bar or tqdm(total=state.steps, initial=state.step - 1, desc="stage 1", unit="step", mininterval=1)
            bar.update()
            loss = " ".join(f"{key} {value:.3f}" for key, value in state.loss.items())
            psnr = (
                f", validation {state.curve[-1]['mean']:.2f} dB (LPET {state.curve[-1]['lpet']:.2f})"
                if state.curve
                else ""
            )
            bar.set_postfix_str(loss + psnr, refresh=False)
            if state.validation:
                tqdm.write(f"step {state.step}: {json.dumps(state.validation)}", file=sys.stderr)
    except KeyboardInterrupt:
        again = " ".join(
            ["python -m mfdiff_lite train", *(settings or []), f"--profile {profile} --out {out} --resume"]
            + ([] if weights is None else [f"--weights {weights}"])
        )
        _stop(f"stopped by Ctrl-C after the step; go on with: {again}", 130)
    finally:
        if bar is not None:
            bar.close()
    if first:
        print(
            f"wrote {out / WEIGHTS} and its card {(out / WEIGHTS).with_suffix('.json').name}; "
            f"use it with: restore --weights {out / WEIGHTS}"
        )


@_command
def adapt(
    lpet: Annotated[Path, typer.Option(help="low-dose PET of the target scanner, 3-D NIfTI")],
    objective: Annotated[
        str,
        typer.Option(
            help="split: from two count halves; sure: from the LPET and its noise, known from halves or estimated; "
            "paired: from an SPET"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the adapted weights, for `restore --weights`, with a card beside them")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …, e.g. steps=100 learning_rate=2e-4")] = None,
    mr: Annotated[Path | None, typer.Option(help="MR of the same head, registered to the PET; any grid")] = None,
    half_a: Annotated[Path | None, typer.Option(help="image of one half of the LPET's counts")] = None,
    half_b: Annotated[Path | None, typer.Option(help="image of the other half")] = None,
    spet: Annotated[Path | None, typer.Option(help="standard-dose PET, for 'paired'")] = None,
    dose_reduction: DoseReduction = 20.0,
    weights: Annotated[Path | None, typer.Option(help="the parent's weights; default: the shipped ones")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an adaptation that was cut")] = False,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Stage 2: adapt the weights to one scan of a scanner never seen (minutes), without a standard-dose image."""
    import shutil

    from tqdm import tqdm

    from .adaptation import train_stage2
    from .config import load_adaptation
    from .model import load_model, load_pretrained, save_model
    from .scan import load_scan

    if (half_a is None) != (half_b is None):
        raise ValueError("--half-a, --half-b: expected both halves or none, found one; name the other one too")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected a name that ends in .safetensors; rename the output")
    chosen = load_adaptation(**_pairs(settings, "adapt"), objective=objective)
    _all_different([out], [lpet, mr, half_a, half_b, spet, weights])
    _ready_for(out, force)
    halves = None if half_a is None else (half_a, half_b)
    scan = load_scan(lpet, mr, spet, dose_reduction, half_paths=halves)
    parent = load_pretrained(device) if weights is None else load_model(weights, device)
    run = out.with_suffix(".run")
    bar = None
    try:
        for state in train_stage2(parent, scan, objective, settings=chosen, out=run, resume=resume, device=device):
            bar = bar or tqdm(total=state.steps, initial=state.step - 1, desc="stage 2", unit="step", mininterval=1)
            bar.update()
            gain = state.held_out[-1]["loss"] - state.held_out[0]["loss"]
            bar.set_postfix_str(
                f"held-out loss {gain:+.4f} against the parent, best at step {state.best}", refresh=False
            )
    except KeyboardInterrupt:
        _stop(f"stopped by Ctrl-C after the step; go on with the same command and --resume ({run} holds it)", 130)
    finally:
        if bar is not None:
            bar.close()
    save_model(state.model, out, state.model.card)
    shutil.rmtree(run)
    assumed = state.model.card["assumed_about_noise"]
    if assumed:
        print(f"the noise was estimated from the LPET alone; assumed: {assumed}")
    if state.best == 0:
        print("the held-out loss did not fall: these are the parent's weights, nothing on this target to gain")
    print(f"adapted from {_weights_line(parent, weights)}")
    print(f"wrote {out} (step {state.best} of {state.step}) and its card; use it with: restore --weights {out}")


@_command
def info() -> None:
    """Check the environment; versions, device, anatomies, shifts, the shipped weights' card, the data found."""
    problems = _missing_packages()
    if problems:  # before anything is imported that needs them
        _stop(f"environment: {'; '.join(problems)}", 2)
    import torch

    from . import __version__
    from .anatomy import list_anatomies
    from .cohort import cache_folder
    from .model import load_pretrained, pick_device
    from .phantom import SHIFTS

    print(f"mfdiff_lite {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "nibabel", "scikit-image", "accelerate")))
    device = pick_device()
    print(
        f"device: {device}"
        + (f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else f", {torch.get_num_threads()} threads")
    )
    print(f"anatomies: {', '.join(list_anatomies())}")
    print(f"shifts: {', '.join(SHIFTS)}")
    cohorts = sorted(cache_folder().glob("cohort-*"))
    nearest = next(folder for folder in (cache_folder(), *cache_folder().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise OSError(f"{cache_folder()}: expected a cache that can be written; set MFDIFF_CACHE to such a folder")
    print(
        f"cache: {cache_folder()}, {len(cohorts)} cohorts (delete the folder to free the space; "
        "set MFDIFF_CACHE to move it)"
    )
    model = load_pretrained("cpu")
    long = ("validation_psnr_db", "profile", "started_from")  # the JSON file beside the weights has them
    card = {key: value for key, value in model.card.items() if key not in long}
    print(f"shipped weights: {json.dumps(card, indent=1)}")
    print(f"validation at the last step: {model.card['validation_psnr_db'][-1]}")
    print("environment: complete, every package in the range of versions that is asked for")


def _missing_packages() -> list[str]:
    """Requirements that are not met, a sentence each."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("mfdiff_lite") or []]
    except PackageNotFoundError:
        return ["mfdiff_lite: expected an installed package, found only its folder; run: pip install -e ."]
    problems = []
    for one in wanted:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(one.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not one.specifier.contains(found, prereleases=True):
            problems.append(f"{one.name}: expected {one.specifier}, found {found}; run: pip install '{one}'")
    return problems


if __name__ == "__main__":
    app()
