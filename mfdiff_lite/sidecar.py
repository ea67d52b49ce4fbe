"""What a PET image comes with and in: its BIDS sidecar, its frames, its SUV factor; a DICOM series becomes such a pair.

    folder of DICOM --dcm2niix--> image.nii.gz + image.json        image (X, Y, Z, T) --frame or mean--> (X, Y, Z)

Fields and their units are those of BIDS ("Positron Emission Tomography"): activities in MBq unless said otherwise,
times in s after `TimeZero`, weight in kg. dcm2niix applies every slice's own rescale slope and writes the same fields.
"""

from __future__ import annotations

import json
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np

BECQUEREL = {"Bq": 1.0, "kBq": 1e3, "MBq": 1e6, "GBq": 1e9, "mCi": 3.7e7}
HALF_LIFE = {"C11": 1221.8, "N13": 597.9, "O15": 122.2, "F18": 6586.2, "Cu64": 45723.6, "Ga68": 4062.6}  # s
Frames = int | str | None  # one frame from 0, "mean", or None for an image without frames


def sidecar_of(path: Path) -> dict[str, Any]:
    """The JSON beside a NIfTI file, {} if there is none. Raises ValueError if it is not JSON."""
    path = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: expected JSON, found something else; fetch the sidecar again, or move it") from None
    return content if isinstance(content, dict) else {}


def chosen_frames(image: Any, path: object, frames: Frames, sidecar: dict[str, Any]) -> Any:
    """An image (X, Y, Z, T) with the frame asked for, or with its frames' mean weighted by `FrameDuration`; read one by
    one. An image without frames comes back as it is."""
    if len(image.shape) < 4 and frames in (None, 0, "mean"):
        return image
    total = np.zeros(image.shape[:3])
    weights = _weights(image.shape[3] if len(image.shape) > 3 else 1, path, frames, sidecar)
    try:
        for number, weight in weights.items():
            total += weight * np.asarray(image.dataobj[..., number]).reshape(total.shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{path}: expected a whole NIfTI file, found a truncated one ({reason}); copy or export it again"
        ) from None
    picked = nib.Nifti1Image(
        total.astype(np.float32), image.affine, image.header if isinstance(image, nib.Nifti1Image) else None
    )
    picked.set_data_dtype(np.float32)
    return picked


def _weights(count: int, path: object, frames: Frames, sidecar: dict[str, Any]) -> dict[int, float]:
    """Frame number -> its weight."""
    if frames != "mean":
        if not isinstance(frames, int) or not 0 <= frames < count:
            raise ValueError(
                f"{path}: expected a frame from 0 to {count - 1}, or 'mean', found {frames!r}; choose another"
            )
        return {frames: 1.0}
    seconds = sidecar.get("FrameDuration")
    if not (isinstance(seconds, list) and len(seconds) == count and all(map(_positive, seconds))):
        raise ValueError(
            f"{path}: expected the seconds of each of its {count} frames (FrameDuration) in a sidecar beside it, found "
            "none to weight the mean by; add it, or choose one frame (--frame)"
        )
    return {number: duration / sum(seconds) for number, duration in enumerate(seconds)}


def suv_factor(sidecar: dict[str, Any]) -> tuple[float, list[str]]:
    """(SUV per unit of the image, what is missing to know it): NaN while something is missing.

    SUV = activity [Bq/mL] * weight [g] / (dose [Bq] * 2^(-(decay-correction time - injection) / half-life))
    """
    if str(sidecar.get("Units", "")).upper() in ("SUV", "G/ML"):
        return 1.0, []
    unit = str(sidecar.get("Units", "")).replace("BQML", "Bq/mL").split("/")[0]
    dose_unit = str(sidecar.get("InjectedRadioactivityUnits", "MBq"))
    nuclide = str(sidecar.get("TracerRadionuclide", "")).replace("-", "")
    nuclide = nuclide if nuclide in HALF_LIFE else "".join(sorted(nuclide, key=str.isdigit))  # 18F is F18
    values = {
        "Units (Bq/mL)": BECQUEREL.get(unit),
        "InjectedRadioactivity": sidecar.get("InjectedRadioactivity"),
        "InjectedRadioactivityUnits": BECQUEREL.get(dose_unit),
        "BodyWeight (kg)": sidecar.get("BodyWeight", sidecar.get("PatientWeight")),
        "RadionuclideHalfLife": sidecar.get("RadionuclideHalfLife", HALF_LIFE.get(nuclide)),
    }
    missing = [name for name, value in values.items() if not _positive(value)]
    times = {name: sidecar.get(name) for name in ("ImageDecayCorrectionTime", "InjectionStart")}
    missing += [name for name, value in times.items() if not isinstance(value, (int, float))]
    if sidecar.get("ImageDecayCorrected") is not True:
        missing.append("ImageDecayCorrected (true)")
    if missing:
        return float("nan"), missing
    per_unit, dose, dose_scale, weight, half_life = (float(v) for v in values.values())  # type: ignore[arg-type]
    waited = float(times["ImageDecayCorrectionTime"]) - float(times["InjectionStart"])  # type: ignore[arg-type]
    return per_unit * weight * 1e3 / (dose * dose_scale * 2 ** (-waited / half_life)), []


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


# --- DICOM -------------------------------------------------------------------------------------------------------


def is_dicom(path: Path) -> bool:
    """Whether it is a DICOM file, or a folder whose first files hold one."""
    files = sorted(p for p in path.iterdir() if p.is_file())[:20] if path.is_dir() else [path]
    return any(_starts_as_dicom(file) for file in files)


def _starts_as_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


@contextmanager
def converted(series: Path) -> Iterator[Path]:
    """`with converted(folder) as nifti:` a DICOM series as a NIfTI file with its sidecar, in a folder that goes again.

    Raises ImportError without the extra `dicom`, ValueError when the folder holds no series or more than one."""
    try:
        import dcm2niix
    except ImportError:
        raise ImportError(
            f"{series}: expected dcm2niix to read DICOM, found it not installed; run: pip install 'mfdiff_lite[dicom]'"
        ) from None
    with TemporaryDirectory(prefix="mfdiff-") as folder:
        options = ["-z", "y", "-b", "y", "-ba", "n", "-w", "2", "-f", "%s_%d", "-o", folder, str(series)]
        subprocess.run([dcm2niix.bin, *options], capture_output=True)
        found = sorted(Path(folder).glob("*.nii.gz"))
        if len(found) != 1:
            names = ", ".join(path.name.removesuffix(".nii.gz") for path in found[:4])
            what = f"{len(found)}: {names}" if found else "none that dcm2niix can convert"
            raise ValueError(
                f"{series}: expected the DICOM files of one series, found {what}; put one series into a folder of its "
                "own"
            )
        sidecar = sidecar_of(found[0])
        sidecar |= _times_of_injection(series, sidecar)
        found[0].with_name(found[0].name.removesuffix(".nii.gz") + ".json").write_text(json.dumps(sidecar))
        yield found[0]


def _times_of_injection(series: Path, sidecar: dict[str, Any]) -> dict[str, Any]:
    """BIDS times of a PET series, s after its start: when it was injected and what its decay is corrected to."""
    if sidecar.get("Modality") != "PT":
        return {}
    import pydicom

    first = next(p for p in (sorted(series.iterdir()) if series.is_dir() else [series]) if _starts_as_dicom(p))
    header = pydicom.dcmread(first, stop_before_pixels=True)
    corrected = str(header.get("DecayCorrection", "NONE"))
    found: dict[str, Any] = {"ImageDecayCorrected": corrected in ("START", "ADMIN")}
    drug = (header.get("RadiopharmaceuticalInformationSequence") or [{}])[0]
    start, given = (_seconds(v) for v in (header.get("SeriesTime"), drug.get("RadiopharmaceuticalStartTime")))
    if start is not None and given is not None:
        found["InjectionStart"] = (given - start) if given <= start else given - start - 86400  # before midnight
        found["ImageDecayCorrectionTime"] = 0.0 if corrected == "START" else found["InjectionStart"]
    return found


def _seconds(clock: object) -> float | None:
    """DICOM's HHMMSS.ffffff in seconds."""
    text = str(clock or "")
    return int(text[:2]) * 3600 + int(text[2:4]) * 60 + float(text[4:]) if len(text) >= 6 else None
