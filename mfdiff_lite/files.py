"""NIfTI in and out, and files that are written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage

from .config import FWHM_TO_SD
from .phantom import Lesion
from .scan import Scan, maps_to_mm, without_nan
from .sidecar import Frames, chosen_frames, converted, is_dicom, sidecar_of, suv_factor

ADDRESS = re.compile("^(https?|s3|ftp):/+")
ASSUMED_DOSE_REDUCTION = 20.0  # of files whose user does not say it


def load_scan(
    lpet_path: str | Path,
    mr_path: str | Path | None = None,
    spet_path: str | Path | None = None,
    dose_reduction: float | None = None,
    mask_path: str | Path | None = None,
    half_paths: tuple[str | Path | None, str | Path | None] | None = None,
    frames: Frames = None,
    suv: bool = False,
) -> Scan:
    """Read a case from NIfTI files (or .mgz, or folders that hold one DICOM series each). The MR may lie on any grid:
    it is resampled to the PET by the affines; all else must lie on the PET's.

    dose_reduction: standard-dose counts / counts of the LPET. No file says it: without it 20 is assumed, with a
    warning; NaN leaves it unknown, for a scan that is only looked at or compared. frames: of dynamic PET images, one
    frame from 0, or "mean", weighted by the sidecar's durations. suv: activities as SUV, from weight, dose and times of
    the sidecar; otherwise the unit is the sidecar's. Raises OSError when a file cannot be
    read, ValueError when its content will not do; each in one sentence that says what to do.
    """
    if dose_reduction is None:
        dose_reduction = ASSUMED_DOSE_REDUCTION
        warnings.warn(
            f"{lpet_path}: expected its dose-reduction factor, found none given; {dose_reduction:g} is assumed: "
            "pass dose_reduction (--dose-reduction), standard-dose counts / counts of the LPET",
            stacklevel=2,
        )
    lpet = read_image(lpet_path, frames)
    scale, unit = _unit(lpet.extra["sidecar"], lpet_path, suv)
    sources = {"lpet": lpet_path, "mr": mr_path, "spet": spet_path, "mask": mask_path}
    scan = Scan(
        np.asarray(lpet.dataobj, np.float32) * scale,
        affine=lpet.affine,
        dose_reduction=dose_reduction,
        unit=unit,
        name=Path(lpet_path).name.split(".")[0],
        header=lpet.header,
        sources={key: str(path) for key, path in sources.items() if path is not None},
    )  # a bad PET is refused before its MR is blamed
    pet = nib.Nifti1Image(scan.lpet, lpet.affine)
    spet, a, b = (
        None if path is None else _if_grid_of(lpet, read_image(path, frames), lpet_path, path) * scale
        for path in (spet_path, *(half_paths or (None, None)))
    )
    mask = None if mask_path is None else _if_grid_of(lpet, read_image(mask_path), lpet_path, mask_path)
    return replace(
        scan,
        mr=None if mr_path is None else on_grid_of(pet, read_image(mr_path), lpet_path, mr_path),
        spet=spet,
        mask=None if mask is None else mask > 0.5,
        halves=None if a is None or b is None else (a, b),
    )


def load_example() -> tuple[Scan, dict[str, np.ndarray]]:
    """A whole simulated head that was restored beforehand: the scan with its truth, and "restored", "SD" and "gate".

    To look at, with `explore(*load_example())`; values are rounded to a hundredth of what the brain holds.
    """
    folder = Path(__file__).with_name("example")
    card = json.loads((folder / "example.json").read_text("utf-8"))
    first = read_image(folder / "lpet.nii.gz")
    held = {path.name.split(".")[0]: load_volume(path)[0] for path in sorted(folder.glob("*.nii.gz"))}
    scan = Scan(
        held["lpet"],
        held["mr"],
        spet=held["spet"],
        mask=held["mask"] > 0,
        tissues=held["tissues"],
        lesions=held["lesions"],
        lesion_table=tuple(Lesion(**one) for one in card["lesions"]),
        affine=first.affine,
        dose_reduction=card["dose_reduction"],
        unit=card["unit"],
        name=f"{card['anatomy']}, patient {card['seed']}",
    )
    restored = {"restored": held["restored"], "SD": held["sd"], "gate": held["gate"]}
    return scan, restored


def _unit(sidecar: dict[str, Any], path: object, suv: bool) -> tuple[np.float32, str]:
    """What an image is multiplied by, and the unit that it then has."""
    if not suv:
        return np.float32(1), str(sidecar.get("Units", "input unit"))
    factor, missing = suv_factor(sidecar)
    if missing:
        raise ValueError(
            f"{path}: expected what SUV needs in the sidecar, found no {', '.join(missing)}; add it, or leave out --suv"
        )
    return np.float32(factor), "SUV"


def load_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """One 3-D NIfTI volume and its affine, with the same checks and sentences as `load_scan`."""
    image = read_image(path)
    return np.asarray(image.dataobj, np.float32), image.affine


def read_image(path: str | Path, frames: Frames = None) -> nib.Nifti1Image:
    """A 3-D image, its data read whole so that a truncated file is found here; `extra["sidecar"]` is the JSON beside
    it. frames: as in `load_scan`; a DICOM series is converted first, and a 2-D image becomes one slice."""
    path = Path(path).expanduser()
    if path.exists() and is_dicom(path):
        with converted(path) as nifti:
            return read_image(nifti, frames)
    if not Path(path).is_file():
        called, found, advice = _what_is_there(path)
        raise OSError(f"{called}: expected a NIfTI file, found {found}; {advice}")
    try:
        with quiet_nibabel():
            image: Any = nib.load(path)
        data = np.asanyarray(image.dataobj) if frames is None else None
    except nib.filebasedimages.ImageFileError:
        found, advice = _what_it_is(Path(path))
        raise OSError(f"{path}: expected a NIfTI file (.nii or .nii.gz), found {found}; {advice}") from None
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, nib.spatialimages.HeaderDataError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{path}: expected a whole NIfTI file, found a truncated or damaged one ({reason}); copy or export it again"
        ) from None
    sidecar = sidecar_of(path)
    if data is None:
        image = chosen_frames(image, path, frames, sidecar)
        data = np.asanyarray(image.dataobj)
    if data.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected real numbers, found {data.dtype}; save one real-valued channel")
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    data = data[..., None] if data.ndim == 2 else data
    if data.ndim != 3:
        raise ValueError(
            f"{path}: expected one 3-D volume, found shape {data.shape}; extract one time frame or channel first, or "
            "choose (--frame)"
        )
    if not maps_to_mm(image.affine):
        raise ValueError(f"{path}: expected an affine that maps voxels to mm, found a singular one; repair the header")
    header = image.header if isinstance(image, nib.Nifti1Image) else None
    with quiet_nibabel():
        read = nib.Nifti1Image(data, image.affine, header, extra={"sidecar": sidecar})
    _one_orientation(read, path, stated=isinstance(image, (nib.Nifti1Image, nib.MGHImage)))
    return read


def _one_orientation(image: nib.Nifti1Image, path: object, stated: bool) -> None:
    """Warn of a header without orientation, or with two (sform and qform) of which the sform is taken; what is written
    from this header carries one."""
    header, affine = image.header, image.affine
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not stated or not (sform or qform):
        warnings.warn(
            f"{path}: expected an orientation in the header (sform or qform), found none; left and right may be "
            "exchanged: check it, or convert the original again",
            stacklevel=4,
        )
        return
    if not sform:
        return
    corners = np.array(list(itertools.product(*((0, n - 1) for n in image.shape))))
    places = [nib.affines.apply_affine(one, corners) for one in (affine, header.get_qform() if qform else affine)]
    apart = float(np.linalg.norm(places[0] - places[1], axis=1).max())
    sizes = nib.affines.voxel_sizes(affine)
    if not apart <= max(1.0, 0.5 * sizes.min()):
        warnings.warn(
            f"{path}: expected one orientation, found an sform (code {sform}) and a qform (code {qform}) that are up "
            f"to {apart:.0f} mm apart; the sform is taken, also for what is written: check that it is the right one",
            stacklevel=4,
        )
        header.set_qform(affine, qform)
    elif not np.allclose(header.get_zooms()[:3], sizes, rtol=0.02):
        warnings.warn(
            f"{path}: expected one voxel size, found {np.round(sizes, 3).tolist()} mm in the sform and "
            f"{np.round(header.get_zooms()[:3], 3).tolist()} mm in pixdim; the sform is taken, also for what is "
            "written",
            stacklevel=4,
        )
        header.set_zooms(sizes)


def _what_is_there(path: Path) -> tuple[str, str, str]:
    """The name, what stands where a file was expected, and what to do."""
    if ADDRESS.match(str(path)):
        return ADDRESS.sub(r"\1://", str(path)), "an address of the network", "download it first and name the file"
    if path.is_symlink():
        if "annex" in str(path.readlink()):
            return str(path), "a git-annex link whose content is not here", "fetch it, e.g. with datalad get"
        return str(path), "a link to nothing", "check where it leads"
    return str(path), ("a folder" if path.is_dir() else "nothing"), "check the path"


SIGNATURES = (  # (offset, bytes, what it is, what to do)
    (0, b"version https://git-lfs", "a git-lfs pointer", "fetch its content with git lfs pull"),
    (0, b"/annex/objects", "a git-annex pointer", "fetch its content, e.g. with datalad get"),
    (0, b"<", "a web page or XML text", "download it again: a login page or proxy may stand in between"),
    (0, b"\x1f\x8b", "gzip data under another name", "rename it so that it ends in .nii.gz if it is a NIfTI file"),
    (344, b"n+1\0", "unpacked NIfTI data under another name", "rename it so that it ends in .nii"),
    (4, b"n+2\0", "unpacked NIfTI data under another name", "rename it so that it ends in .nii"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it first"),
    (0, b"\x89PNG", "a picture", "give the image that it shows"),
    (0, b"\xff\xd8\xff", "a picture", "give the image that it shows"),
)


def _what_it_is(path: Path) -> tuple[str, str]:
    """What a file that is no NIfTI is, by its first bytes, and what to do."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "an empty file", "copy or fetch it again"
    for offset, mark, found, advice in SIGNATURES:
        if start[offset:].startswith(mark) and not (mark == b"\x1f\x8b" and path.name.endswith(".gz")):
            return found, advice
    return "something else", "convert it first, e.g. with dcm2niix"


@contextmanager
def quiet_nibabel() -> Iterator[None]:
    """Nibabel logs a line of its own about a header that it then raises about."""
    logger = nib.imageglobals.logger
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _if_grid_of(pet: nib.Nifti1Image, image: nib.Nifti1Image, pet_path: object, path: object) -> np.ndarray:
    """The data of an image that must lie on the PET grid already; a mirrored one of the same shape would pass
    unnoticed."""
    if image.shape != pet.shape or not np.allclose(image.affine, pet.affine, atol=1e-2):
        raise ValueError(
            f"{path}: expected the grid of {pet_path}, {pet.shape}, found {image.shape} or another affine; "
            "resample it to the PET first"
        )
    return np.asarray(image.dataobj, np.float32)


def on_grid_of(pet: nib.Nifti1Image, mr: nib.Nifti1Image, pet_path: object, mr_path: object) -> np.ndarray:
    """MR resampled to the PET grid: low-pass to the PET's voxels, then linear."""
    active = np.argwhere(np.asarray(pet.dataobj) > 0.2 * np.max(pet.dataobj))
    points = nib.affines.apply_affine(np.linalg.inv(mr.affine) @ pet.affine, active[:: max(1, len(active) // 20000)])
    overlap = np.mean(np.all((points > -1) & (points < np.array(mr.shape)), axis=1)) if len(points) else 1.0
    if overlap < 0.5:
        raise ValueError(
            f"{mr_path}: expected an MR that covers the head in {pet_path}, found {overlap:.0%} of the active "
            "voxels inside it; "
            "register the MR to the PET, or check both affines"
        )
    data = np.asarray(mr.dataobj, np.float32)
    if mr.shape == pet.shape and np.allclose(mr.affine, pet.affine, atol=1e-3):
        return data
    data = without_nan(data, str(mr_path))  # before interpolation spreads them
    if not np.isfinite(data).all():
        raise ValueError(f"{mr_path}: expected finite values, found infinite voxels; replace them first")
    fine, coarse = nib.affines.voxel_sizes(mr.affine), nib.affines.voxel_sizes(pet.affine)
    sigma = np.sqrt(np.maximum(coarse.min() ** 2 - fine**2, 0)) * FWHM_TO_SD / fine
    smooth = ndimage.gaussian_filter(data, sigma, mode="nearest")
    return np.asarray(resample_from_to(nib.Nifti1Image(smooth, mr.affine), pet, order=1, cval=0).dataobj, np.float32)


def save_volume(
    path: str | Path, volume: np.ndarray, scan: Scan, force: bool = False, description: str = "mfdiff_lite"
) -> Path:
    """Write a volume on the scan's grid as float32 NIfTI: whole or not at all, and never over an existing file unless
    `force`. The header is the scan's, with its sform and qform; description: what was done, at most 79 bytes."""
    path = Path(path).expanduser()
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii.gz or .nii; rename the output")
    volume = np.asarray(volume, np.float32)
    image = nib.Nifti1Image(volume[..., None] if volume.ndim == 2 else volume, scan.affine, scan.header)
    image.set_data_dtype(np.float32)
    image.header.set_slope_inter(1, 0)
    if scan.header is None:
        image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[:79]
    with whole_file(path, force) as partial:
        image.to_filename(partial)
    return path


@contextmanager
def whole_file(path: str | Path, force: bool = True) -> Iterator[Path]:
    """`with whole_file(path, force) as partial:` write to `partial`; it becomes `path` only if the block succeeds."""
    path = Path(path)
    refuse_to_write(path, force)
    partial = partial_of(path)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # some writers make files that only their owner can read
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            f"{path}: could not be written ({error.strerror or error}); check space and permissions"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where a file is written before it is whole, beside its place; another one in every process and thread."""
    return path.with_name(f".{os.getpid()}-{threading.get_ident()}-part-{path.name}")


def refuse_to_write(path: Path, force: bool) -> None:
    """Raise an OSError in one sentence if `path` is a folder, exists already and `force` is off, or has no folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, found a folder; choose another name")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; choose another name or pass --force to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent}: expected a folder to write {path.name} into, found none; create it first"
        )
