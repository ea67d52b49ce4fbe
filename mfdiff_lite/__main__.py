"""The command line: `mfdiff COMMAND --help`, or `python -m mfdiff_lite COMMAND --help`.

Exit status 0 on success; 2 on bad usage or bad input, with one sentence on stderr; 1 on an internal fault; 130 on
Ctrl-C. Warnings are sentences on stderr too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .config import LARGEST_SEED

if TYPE_CHECKING:
    from .checks import Finding
    from .loop import TrainingState
    from .model import MFdiff, Restoration
    from .readers.register import Registered
    from .scan import Scan

app = typer.Typer(
    help="Restore a standard-dose PET image from low-dose PET and MR. For teaching and research; not a medical device.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
DoseReduction = Annotated[
    float | None,
    typer.Option(
        help="dose-reduction factor: standard-dose counts / counts of the LPET, 1 to 200 (learned: 4 to 100); without "
        "it 20 is assumed"
    ),
]
Force = Annotated[bool, typer.Option("--force", help="replace output files that exist; go on where a check refuses")]
Quality = Annotated[
    str,
    typer.Option(
        help="fast: the coarse estimate, no samples; standard: mean and SD of 8; full: of 32, single precision"
    ),
]
Mr = Annotated[
    Path | None,
    typer.Option(help="MR of the same head, registered to the PET; any grid; without it the PET alone is used"),
]
Register = Annotated[bool, typer.Option("--register", help="move the MR rigidly to the PET first (extra `register`)")]
Frame = Annotated[int | None, typer.Option(help="one frame, from 0, of a dynamic PET")]
Frames = Annotated[str | None, typer.Option(help="'mean': of all frames of a dynamic PET, by their durations")]
Suv = Annotated[bool, typer.Option("--suv", help="activities as SUV; weight, dose and times are the sidecar's")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what can go wrong into one sentence and an exit status, and warnings, if it went well, into sentences."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function(*args, **{k: v.expanduser() if isinstance(v, Path) else v for k, v in kwargs.items()})
            for message in dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning):
                _say(f"warning: {message}")
        except typer.Exit:
            raise
        except (ValueError, OSError, ImportError) as error:
            _stop(f"{error}", 2)
        except KeyboardInterrupt:
            _stop("stopped by Ctrl-C; nothing half-written was left behind", 130)
        except MemoryError:
            _stop("not enough memory for this volume; crop it to the head or free some memory", 1)
        except Exception as error:
            if os.environ.get("MFDIFF_DEBUG"):
                raise
            fault = f"{type(error).__name__}: {error}"
            _stop(f"internal fault ({fault}); set MFDIFF_DEBUG=1 for the traceback and report it", 1)

    return app.command()(run)


def _say(sentence: str) -> None:
    print(f"mfdiff_lite: {' '.join(sentence.split())}", file=sys.stderr)


def _stop(sentence: str, status: int) -> NoReturn:
    _say(sentence)
    raise typer.Exit(status)


@app.callback(invoke_without_command=True)
def _main(show_version: Annotated[bool, typer.Option("--version", help="version and revision")] = False) -> None:
    if show_version:
        from .revision import code_revision

        print(f"mfdiff_lite {__version__} (revision {code_revision()})")
        raise typer.Exit


# --- what several commands ask -----------------------------------------------------------------------------------


def _between(low: int, high: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name}: expected {low} to {high}, found {value}")


def _ready(outputs: list[Path | None], inputs: list[Path | None], force: bool) -> None:
    """Refuse before any work what saving would refuse after it; never write over an input, not even with --force."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in (path for path in outputs if path is not None):
        if path.resolve() in taken:
            raise ValueError(
                f"{path}: expected outputs that differ from each other and from the inputs, found it twice; "
                "choose another name"
            )
        taken.add(path.resolve())
        _ready_for(path, force)


def _ready_for(path: Path, force: bool) -> None:
    from .files import partial_of, refuse_to_write

    refuse_to_write(path, force)
    probe = partial_of(path)
    try:
        probe.touch()
    except OSError as error:
        raise OSError(f"{path}: expected a place to write to, found {error.strerror}; choose another --out") from None
    probe.unlink()


def _ready_for_folder(path: Path) -> None:
    """Refuse before any work a folder that could not be made; make nothing yet."""
    found = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not found.is_dir() or not os.access(found, os.W_OK):
        reason = "one that is read-only" if found.is_dir() else "a file"
        raise OSError(f"{path}: expected a folder to write into, found {reason} at {found}; choose another --out")


def _known_dose(dose_reduction: float | None) -> float | None:
    if dose_reduction is not None and math.isnan(dose_reduction):
        raise ValueError("dose_reduction: expected SPET counts / LPET counts, 1 to 200, found nan")
    return dose_reduction


def _model(weights: Path | None, device: str) -> MFdiff:
    from .model import load_model, load_pretrained

    return load_pretrained(device) if weights is None else load_model(weights, device)


def _weights_line(model: MFdiff, path: Path | None) -> str:
    card, target = model.card, ""
    if "parent" in card:
        target = f", stage 2 by {card['adaptation']['objective']!r} on {', '.join(card['target'])}"
    return f"{path or 'shipped weights'} (revision {card.get('revision')}, {card.get('steps')} steps{target})"


def _pairs(settings: list[str] | None, command: str) -> dict[str, str]:
    """key=value arguments as a dict."""
    pairs = [item.partition("=") for item in settings or []]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected key=value, found no '='; see `{command} --help`")
    return {key: value for key, _, value in pairs}


def _followed(
    states: Generator[TrainingState, None, None], title: str, words: Callable[[TrainingState], str], again: str
) -> Iterator[TrainingState]:
    """The states of a training, with a progress bar; Ctrl-C ends in the sentence `again`."""
    from tqdm import tqdm

    bar = None
    try:
        with contextlib.closing(states):
            for state in states:
                bar = bar or tqdm(total=state.steps, initial=state.step - 1, desc=title, unit="step", mininterval=1)
                bar.update()
                bar.set_postfix_str(words(state), refresh=False)
                yield state
    except KeyboardInterrupt:
        _stop(f"stopped by Ctrl-C after the step; go on with {again}", 130)
    finally:
        if bar is not None:
            bar.close()


# --- restore -----------------------------------------------------------------------------------------------------


@_command
def restore(
    lpet: Annotated[Path, typer.Option(help="low-dose PET: 3-D NIfTI, any orientation, any voxel size, or DICOM")],
    out: Annotated[Path, typer.Option(help="the restored PET, on the grid and in the unit of the LPET")],
    mr: Mr = None,
    std: Annotated[Path | None, typer.Option(help="also write the voxel-wise SD of the samples")] = None,
    dose_reduction: DoseReduction = None,
    quality: Quality = "standard",
    samples: Annotated[
        int | None, typer.Option(help="samples to average; default: as many as the quality says")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps; default 6")] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="0 to 1, pull towards the measured LPET: more lesion contrast, more noise")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="weights of `train`; default: the shipped ones")] = None,
    seed: Annotated[int, typer.Option(help="seed of the samples")] = 0,
    device: Device = "auto",
    report: Annotated[Path | None, typer.Option(help="also write an HTML page to look at and to send")] = None,
    spet: Annotated[Path | None, typer.Option(help="standard-dose PET, only shown and compared in the report")] = None,
    adapt_first: Annotated[bool, typer.Option("--adapt", help="stage 2 first: adapt to this scan, minutes")] = False,
    register: Register = False,
    frame: Frame = None,
    frames: Frames = None,
    suv: Suv = False,
    force: Force = False,
) -> None:
    """Restore a low-dose PET, with the help of an MR of the same head if there is one."""
    from tqdm import tqdm

    from .checks import check_result, check_scan, speak
    from .record import record_path

    chosen = _chosen(quality, samples)
    _fitting(out, std, spet, report, chosen["n_samples"])
    _between(0, LARGEST_SEED, seed=seed)
    _ready([out, record_path(out), std, report], [lpet, mr, spet, weights], force)
    with _kept_warnings() as hints:
        scan = _scan(lpet, None if register else mr, spet, dose_reduction, frame, frames, suv)
        registered = _registered(scan, mr) if register else None
        scan = registered.scan if registered else scan
        found = check_scan(scan)
        speak([one for one in found if one.severity == "refuse" and not force])  # `restore` warns of the others
    model = _model(weights, device)
    if adapt_first:
        model = _adapted(model, scan, device)
    chosen |= {key: value for key, value in {"steps": steps, "fidelity": fidelity}.items() if value is not None}
    progress = functools.partial(tqdm, desc="restoring", unit="slice", disable=None)
    began = time.monotonic()
    with _kept_warnings() as more:
        restored = model.restore(scan, seed=seed, progress=progress, **chosen)
        seconds = time.monotonic() - began
        speak(after := check_result(scan, restored), force=True)
    sources = {"lpet": lpet, "mr": mr, "weights": weights}
    written = _saved(out, std, sources, scan, restored, model, found + after, force)
    if report is not None:
        lines = _files_lines({"LPET": lpet, "MR": mr, "SPET": spet, "restored": out, "SD": std})
        lines |= {"unit": scan.unit, "dose reduction": f"{scan.dose_reduction:g}", **restored.settings}
        lines |= {} if restored.fit is None else {"MR fit": f"{restored.fit:.2f}"}
        lines |= {"weights": _weights_line(model, weights), "seconds": f"{seconds:.1f}"}
        written.append(_report(report, scan, restored, lines, hints + more, force, registered))
    print(f"restored {scan.lpet.shape} voxels in {seconds:.1f} s with {_weights_line(model, weights)}")
    for path in written:
        print(f"wrote {path}")


def _fitting(out: Path, std: Path | None, spet: Path | None, report: Path | None, samples: int) -> None:
    """Refuse outputs that nothing could be written to, or that ask for what is not there."""
    if std is not None and samples < 2:
        raise ValueError(
            f"--std: expected --samples of at least 2, found {samples}; raise --samples or leave out --std"
        )
    if spet is not None and report is None:
        raise ValueError("--spet: expected --report with it, found none; the standard-dose PET is for the report alone")
    for path in (out, std):
        if path is not None and not path.name.endswith((".nii", ".nii.gz")):
            raise ValueError(f"{path}: expected a name that ends in .nii.gz or .nii; rename the output")


def _chosen(quality: str, samples: int | None) -> dict[str, Any]:
    """Arguments of `MFdiff.restore` for a quality, and for another number of samples."""
    from .model import QUALITIES

    if quality not in QUALITIES:
        raise ValueError(f"--quality: expected one of {', '.join(QUALITIES)}, found {quality!r}")
    return QUALITIES[quality] | ({} if samples is None else {"n_samples": samples})


def _scan(
    lpet: Path,
    mr: Path | None,
    spet: Path | None,
    dose_reduction: float | None,
    frame: int | None,
    frames: str | None,
    suv: bool,
) -> Scan:
    """The scan of the options that name files."""
    from .files import load_scan

    if frames not in (None, "mean") or None not in (frame, frames):
        raise ValueError("--frames: expected 'mean', or --frame and a number, found neither or both; give one of them")
    chosen = frames if frame is None else frame
    return load_scan(lpet, mr, spet, dose_reduction=_known_dose(dose_reduction), frames=chosen, suv=suv)


def _registered(scan: Scan, mr: Path | None) -> Registered:
    from .readers.register import register

    if mr is None:
        raise ValueError("--register: expected an MR to move, found none; name it with --mr, or leave out --register")
    done = register(scan, mr)
    print(f"registered {mr}: moved by {done.distance:.1f} mm and {done.angle:.1f} degrees")
    return done


def _saved(
    out: Path,
    std: Path | None,
    sources: dict[str, Path | None],
    scan: Scan,
    restored: Restoration,
    model: MFdiff,
    findings: list[Finding],
    force: bool,
) -> list[Path]:
    """Write the images, and beside the first what it was made from."""
    from .files import save_volume
    from .record import write_record

    details = {
        "Units": scan.unit,
        "DoseReduction": scan.dose_reduction,
        "Settings": restored.settings,
        "MRFit": restored.fit,
        "Weights": {"fingerprint": model.fingerprint, "card": model.card},
    }
    said = "low-dose PET restored towards the standard dose; for teaching and research, not a medical device"
    count = restored.settings["n_samples"]
    written = [save_volume(out, restored.mean, scan, force, f"mfdiff_lite: mean of {count} samples")]
    if std is not None:
        written.append(save_volume(std, restored.std, scan, force, f"mfdiff_lite: SD of {count} samples"))
    return [*written, write_record(out, said, sources, findings, details, __version__, sys.argv[1:], force)]


def _adapted(model: MFdiff, scan: Scan, device: str) -> MFdiff:
    from .stage2 import train_stage2

    for state in _followed(train_stage2(model, scan, device=device), "stage 2", _gain, "the same command"):
        last = state
    print(_verdict(last))
    return last.model


@contextlib.contextmanager
def _kept_warnings() -> Iterator[list[str]]:
    """The sentences of the warnings inside the block, which are warned of all the same."""
    sentences: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield sentences
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        sentences += [str(one.message)] if one.category is UserWarning else []


def _files_lines(files: dict[str, Path | None]) -> dict[str, str]:
    from .look.report import checksum

    return {what: f"{path} (SHA-256 {checksum(path)}...)" if path else "none" for what, path in files.items()}


def _report(
    path: Path,
    scan: Scan,
    restored: Restoration,
    lines: dict[str, Any],
    hints: list[str],
    force: bool,
    registered: Registered | None,
) -> Path:
    from .evaluation import compare
    from .files import whole_file
    from .look import report_html
    from .revision import code_revision

    made = time.strftime("%Y-%m-%d %H:%M")
    lines |= {"command": " ".join(["mfdiff", *sys.argv[1:]]), "date": made}
    lines |= {"version": f"{__version__} (revision {code_revision()})"}
    table = None if scan.spet is None else compare(scan, restored)
    with whole_file(path, force) as partial:
        partial.write_text(report_html(scan, restored, lines, table, hints, registered), "utf-8")
    return path


@_command
def restore_all(
    cases: Annotated[
        Path,
        typer.Argument(
            help="a CSV table with columns lpet and, as known, mr, dose_reduction, name; or a folder: cases of "
            "`simulate`, or BIDS"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for NAME.nii.gz of each case; what is there already is skipped")],
    dose_reduction: DoseReduction = None,
    quality: Quality = "standard",
    weights: Annotated[Path | None, typer.Option(help="weights of `train`; default: the shipped ones")] = None,
    share: Annotated[str, typer.Option(help="i/n: every n-th case from the i-th, from 0, for n processes")] = "0/1",
    device: Device = "auto",
) -> None:
    """Restore many cases one after the other; go on after a failure, and end with a summary."""
    from .readers.cases import find_cases

    index, count = _share(share)
    _chosen(quality, None)
    _ready_for_folder(out)
    mine = find_cases(cases)[index::count]
    out.mkdir(parents=True, exist_ok=True)
    skipped, failed = 0, []
    for number, case in enumerate(mine, start=1):
        target = out / f"{case.name}.nii.gz"
        if target.exists():  # a file is written whole or not at all
            skipped += 1
            continue
        print(f"{number} of {len(mine)}: {case.name}")
        try:
            dose = dose_reduction if case.dose_reduction is None else case.dose_reduction
            restore(case.lpet, target, case.mr, dose_reduction=dose, quality=quality, weights=weights, device=device)
        except typer.Exit as error:  # its sentence is said already
            if error.exit_code == 130:
                raise
            failed.append(case.name)
    print(f"{len(mine) - skipped - len(failed)} restored into {out}, {skipped} there already, {len(failed)} failed")
    if failed:
        _stop(f"{cases}: expected to restore every case, failed on {', '.join(failed)}; see above, then repeat", 2)


def _share(share: str) -> tuple[int, int]:
    index, _, count = share.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--share: expected i/n with i from 0 to n - 1, e.g. 0/2, found {share!r}")
    return int(index), int(count)


# --- view --------------------------------------------------------------------------------------------------------


@_command
def view(
    images: Annotated[list[Path], typer.Argument(help="NIfTI files; the first one's grid is the grid of all")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("view.html"),
    unit: Annotated[str, typer.Option(help="unit of the images")] = "input unit",
    force: Force = False,
) -> None:
    """Write a page to look at images with: all planes, one window, values, comparing. It needs no network.

    A file whose name begins with mr, sd or gate has a window of its own, as MR, SD or gate.
    """
    from .look import explore

    _ready([out], list(images), force)
    names = [path.name.removesuffix(".gz").removesuffix(".nii") for path in images]
    if len(set(names)) < len(names):
        raise ValueError(f"view: expected files of different names, found {', '.join(names)}; rename one")
    known = {"lpet": "LPET", "spet": "SPET", "mr": "MR", "sd": "SD", "std": "SD"}
    given = {known.get(name.lower(), name): path for name, path in zip(names, images, strict=True)}
    page = explore(given, unit=unit).save(out, force)
    print(f"wrote {page}; open it in a browser: {page.resolve().as_uri()}")


# --- simulate ----------------------------------------------------------------------------------------------------

SIMULATED = ("lpet", "spet", "mr", "activity", "mask", "tissues", "lesions", "half_a", "half_b")


@_command
def simulate(
    out: Annotated[Path, typer.Option(help=f"folder for {', '.join(SIMULATED)} (.nii.gz), scan.json")],
    anatomy: Annotated[
        str, typer.Option(help="an anatomy that `info` lists: embedded, or of BrainWeb once fetched")
    ] = "icbm152",
    seed: Annotated[int, typer.Option(help="number of the virtual patient")] = 0,
    dose_reduction: Annotated[float, typer.Option(help="dose-reduction factor, 1 to 200")] = 20.0,
    shift: Annotated[
        str | None, typer.Option(help="OOD emulation that `info` lists, e.g. edge-scanner; + joins two")
    ] = None,
    slices: Annotated[int | None, typer.Option(help="axial slices; default: the whole head")] = None,
    force: Force = False,
) -> None:
    """Simulate a virtual patient on the virtual scanner: low-dose and standard-dose PET, MR and the truth."""
    from .files import save_volume, whole_file
    from .phantom import virtual_patient
    from .readers.brainweb import load_anatomy
    from .scanner import Scanner

    _between(1, 500, slices=slices)
    _between(0, LARGEST_SEED, seed=seed)
    held = [out / f"{name}.nii.gz" for name in SIMULATED if (out / f"{name}.nii.gz").exists()]
    if held and not force:
        raise FileExistsError(f"{held[0]}: exists already; choose another --out or pass --force to replace it")
    _ready_for_folder(out)
    scanner = Scanner.shifted(shift)
    print("drawing the patient, scanning, reconstructing: a whole head takes about half a minute", file=sys.stderr)
    patient = virtual_patient(load_anatomy(anatomy), seed, shift, slices)
    scan = scanner.scan(patient, dose_reduction, halves=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out}: expected a folder to write into, found {error.strerror}; choose another --out") from None
    images = [getattr(scan, name) for name in SIMULATED[:-2]] + list(scan.halves or ())
    for name, image in zip(SIMULATED, images, strict=True):
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
        partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {', '.join(SIMULATED)} (.nii.gz, {scan.lpet.shape} voxels, {scan.unit}) and scan.json to {out}")


# --- evaluate ----------------------------------------------------------------------------------------------------


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

    from .evaluation import compare
    from .files import load_scan, load_volume, whole_file

    _ready([json_out], [lpet, spet, restored, mask], force)
    scan = load_scan(lpet, spet_path=spet, dose_reduction=math.nan, mask_path=mask)
    image, affine = load_volume(restored)
    if image.shape != scan.lpet.shape or not np.allclose(affine, scan.affine, atol=1e-2):
        raise ValueError(
            f"{restored}: expected the grid of {lpet}, {scan.lpet.shape}, found {image.shape} or another affine; "
            "restore that LPET again"
        )
    if not np.isfinite(image).all():
        raise ValueError(f"{restored}: expected finite values, found NaN or infinite voxels; restore it again")
    if scan.mask is not None and not scan.mask.any():
        raise ValueError(f"{mask}: expected a brain mask, found no voxel above 0.5; check the file")
    table = compare(scan, {"restored": image})
    print(table)
    if json_out is not None:
        rows = {
            name: {key: value if math.isfinite(value) else None for key, value in row.items()}
            for name, row in table.rows.items()
        }  # JSON has no infinity
        note = {"mask": str(mask or "rough, from the LPET"), "against": "spet", "images": rows}
        with whole_file(json_out, force) as partial:
            partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


# --- train -------------------------------------------------------------------------------------------------------


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

    from . import stage1
    from .config import load_profile

    chosen = load_profile(profile, **_pairs(settings, "train"))
    start = None if weights is None else _model(weights, "cpu")
    _ready_for_folder(out)
    again = ["python -m mfdiff_lite train", *(settings or []), f"--profile {profile} --out {out} --resume"]
    again += [] if weights is None else [f"--weights {weights}"]
    states = stage1.train_stage1(chosen, out, resume, device, start=start)
    if os.environ.get("RANK", "0") != "0":  # of the processes that `accelerate launch` starts, one speaks
        for _ in states:
            pass
        return
    for state in _followed(states, "stage 1", _losses, f": {' '.join(again)}"):
        if state.validation:
            tqdm.write(f"step {state.step}: {json.dumps(state.validation)}", file=sys.stderr)
    written = out / stage1.WEIGHTS
    print(f"wrote {written} and its card {written.with_suffix('.json').name}; use it with: restore --weights {written}")


def _losses(state: TrainingState) -> str:
    words = " ".join(f"{key} {value:.3f}" for key, value in state.loss.items())
    if state.curve:
        words += f", validation {state.curve[-1]['mean']:.2f} dB (LPET {state.curve[-1]['lpet']:.2f})"
    return words


# --- adapt -------------------------------------------------------------------------------------------------------


@_command
def adapt(
    lpet: Annotated[Path, typer.Option(help="low-dose PET of the target scanner, 3-D NIfTI")],
    out: Annotated[Path, typer.Option(help="the adapted weights, for `restore --weights`, with a card beside them")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …, e.g. steps=100 learning_rate=2e-4")] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="split: from two count halves; sure: from the LPET and its noise, known from halves or estimated; "
            "paired: from an SPET; auto: split if there are halves, else sure"
        ),
    ] = "auto",
    mr: Mr = None,
    half_a: Annotated[Path | None, typer.Option(help="image of one half of the LPET's counts")] = None,
    half_b: Annotated[Path | None, typer.Option(help="image of the other half")] = None,
    spet: Annotated[Path | None, typer.Option(help="standard-dose PET, for 'paired'")] = None,
    dose_reduction: DoseReduction = None,
    weights: Annotated[Path | None, typer.Option(help="the parent's weights; default: the shipped ones")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an adaptation that was cut")] = False,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Stage 2: adapt the weights to one scan of a scanner never seen (minutes), without a standard-dose image."""
    from .checks import check_scan, speak
    from .config import load_adaptation
    from .files import load_scan
    from .model import save_model
    from .stage2 import train_stage2

    if (half_a is None) != (half_b is None):
        raise ValueError("--half-a, --half-b: expected both halves or none, found one; name the other one too")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected a name that ends in .safetensors; rename the output")
    chosen = load_adaptation(**{"objective": objective} | _pairs(settings, "adapt"))
    if objective not in ("auto", chosen.objective):
        raise ValueError(f"objective: expected one, found --objective {objective} and objective={chosen.objective}")
    _ready([out, out.with_suffix(".json")], [lpet, mr, half_a, half_b, spet, weights], force)
    scan = load_scan(lpet, mr, spet, _known_dose(dose_reduction), half_paths=(half_a, half_b))
    speak(check_scan(scan), force)
    parent, run = _model(weights, device), out.with_suffix(".run")
    states = train_stage2(parent, scan, settings=chosen, out=run, resume=resume, device=device)
    for state in _followed(states, "stage 2", _gain, f"the same command and --resume ({run} holds it)"):
        last = state
    save_model(last.model, out, last.model.card, force)
    shutil.rmtree(run)
    print(_verdict(last))
    print(f"adapted from {_weights_line(parent, weights)}")
    print(f"wrote {out} (step {last.best} of {last.step}) and its card; use it with: restore --weights {out}")


def _verdict(state: TrainingState) -> str:
    """What stage 2 did, and why if nothing."""
    from .stage2 import refusal

    card = state.model.card
    if why := refusal(card):
        return f"refused: {why}; the parent's weights are kept. Two half-count images would help: see `adapt`"
    if state.best == 0:
        return "the held-out loss did not fall: the parent's weights are kept, nothing on this target to gain"
    fall = state.curve[0]["loss"] - next(one["loss"] for one in state.curve if one["step"] == state.best)
    kept = f"step {state.best}" + (f", {card['way']:.0%} of the way there is gone" if card["way"] < 1 else "")
    return f"adapted by {card['adaptation']['objective']!r}: the held-out loss fell by {fall:.4f} ({kept})"


def _gain(state: TrainingState) -> str:
    gain = state.curve[-1]["loss"] - state.curve[0]["loss"]
    return f"held-out loss {gain:+.4f} against the parent, best at step {state.best}"


# --- info --------------------------------------------------------------------------------------------------------


@_command
def info(
    lpet: Annotated[Path | None, typer.Option(help="say instead what the checks find about this low-dose PET")] = None,
    mr: Mr = None,
    dose_reduction: DoseReduction = None,
) -> None:
    """Check the environment; versions, device, anatomies, shifts, the shipped weights' card, the data found. Or, with
    --lpet, check a scan."""
    if lpet is not None:
        return _print_findings(_scan(lpet, mr, None, dose_reduction, None, None, False))
    problems = _missing_packages()
    if problems:  # before anything is imported that needs them
        _stop(f"environment: {'; '.join(problems)}", 2)
    import torch

    from .model import load_pretrained, pick_device
    from .phantom import SHIFTS
    from .readers.brainweb import list_anatomies
    from .revision import code_revision

    print(f"mfdiff_lite {__version__} (revision {code_revision()}), Python {platform.python_version()}, ", end="")
    print(platform.platform())
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "nibabel", "scikit-image")))
    device = pick_device()
    used = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {device}{used}")
    print(f"anatomies: {', '.join(list_anatomies())}")
    print(f"shifts: {', '.join(SHIFTS)}")
    print(_cache_line())
    model = load_pretrained("cpu")
    long = ("validation_psnr_db", "profile", "started_from")  # the JSON file beside the weights has them
    card = {key: value for key, value in model.card.items() if key not in long}
    print(f"shipped weights: {json.dumps(card, indent=1)}")
    print(f"validation at the last step: {model.card['validation_psnr_db'][-1]}")
    print("environment: complete, every package in the range of versions that is asked for")


def _print_findings(scan: Scan) -> None:
    from .checks import check_scan

    for one in check_scan(scan):
        print(f"{one.severity:>6}  {one.name}: {one.value:.3g} (limit {one.threshold:.3g}) {one.sentence}".rstrip())


def _cache_line() -> str:
    from .cohort import cache_folder

    cache = cache_folder()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.R_OK)):
        raise OSError(f"{cache}: expected a cache that can be read; set MFDIFF_CACHE to such a folder")
    written = "" if os.access(nearest, os.W_OK) else ", read-only: complete cohorts serve, new ones cannot be made"
    cohorts = len(list(cache.glob("cohort-*")))
    return f"cache: {cache}, {cohorts} cohorts{written} (delete it to free the space; set MFDIFF_CACHE to move it)"


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
