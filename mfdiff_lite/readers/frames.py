"""Short-frame pairs: low-dose and standard-dose images of one head from the frames of one real dynamic PET.

Every frame has counts of its own, so the mean of few frames is an honest low-dose image of what the mean of many shows.
Layout: BIDS (bids-specification.readthedocs.io, "Positron Emission Tomography"), as in OpenNeuro ds003382: a 4-D image
`..._rec-acdyn_run-001_pet.nii.gz` of 90 frames of 60 s and, beside it, a sidecar of the same name that ends in `.json`;
`data/download.py openneuro-ds003382 --dynamic` fetches both.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..files import on_grid_of, quiet_nibabel, read_image
from ..scan import Scan, activity_of


def short_frame_scan(
    pet_path: str | Path, mr_path: str | Path | None, frames: Sequence[int] = range(70, 90), low: int = 2
) -> Scan:
    """A `Scan` from a window of a dynamic PET (X, Y, Z, T) and an MR on any grid (None: without MR).

    frames: the window, consecutive frame numbers from 0; choose late ones, where the activity changes slowly. low: even
    number of its middle frames that make the LPET; in the middle, a steady rise or decay cancels. With f_t the frames:

        SPET = mean of f_t over the window, dose_reduction = len(frames) / low
        halves a, b = means of every other of the `low` frames, LPET = (a + b) / 2

    The halves share no frame, so their noise is independent; the LPET's frames are also in the SPET, as in list-mode
    thinning. Frames of one duration are asked for and decay-corrected ones assumed; their counts still fall with the
    decay and change with the tracer, so the true ratio of counts is only close to `dose_reduction`. Corrected images of
    real scans can have negative voxels: they are clipped at 0 after averaging, with a warning. Nothing realigns the
    frames, and the MR is placed by the affines alone. The unit is the sidecar's `Units`.

    Frames are read one by one, so memory holds a few volumes, not the series. Raises OSError when a file cannot be
    read, ValueError when its content or the window will not do. Tried on made-up files of this layout only.
    """
    with _one_sentence(pet_path):
        image: Any = nib.load(pet_path, keep_file_open=True)  # else a .gz is unpacked from its start for every frame
    if len(image.shape) != 4:
        raise ValueError(
            f"{pet_path}: expected a dynamic PET (X, Y, Z, frames), found shape {image.shape}; take the 4-D file, or "
            "load_scan for static images"
        )
    sidecar = _sidecar(pet_path, image.shape[3])
    frames = [int(frame) for frame in frames]
    _check_window(pet_path, sidecar["FrameDuration"], frames, low)
    a, b, spet = _means(pet_path, image, frames, low)
    sources = {"lpet": pet_path, "spet": pet_path, "halves": pet_path, "mr": mr_path}
    scan = Scan(
        lpet=(a + b) / 2,
        spet=spet,
        halves=(a, b),
        affine=image.affine,
        dose_reduction=len(frames) / low,
        unit=str(sidecar.get("Units", "input unit")),
        name=Path(pet_path).name.split(".")[0],
        header=image.header,
        sources={kind: str(path) for kind, path in sources.items() if path is not None},
    )  # a bad PET is refused before its MR is blamed
    if mr_path is None:
        return scan
    return replace(scan, mr=on_grid_of(nib.Nifti1Image(spet, image.affine), read_image(mr_path), pet_path, mr_path))


@contextmanager
def _one_sentence(path: str | Path) -> Iterator[None]:
    """Says in one sentence what nibabel and the unpacking raise about a file."""
    try:
        with quiet_nibabel():
            yield
    except (OSError, EOFError, zlib.error, ValueError, TypeError, nib.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"{path}: expected a whole NIfTI file, found none that can be read ({reason}); check the path, or copy the "
            "file again"
        ) from None


def _sidecar(pet_path: str | Path, count: int) -> dict:
    """The BIDS sidecar of a PET of `count` frames."""
    name = Path(pet_path).name
    path = Path(pet_path).with_name(name.removesuffix(".gz").removesuffix(".nii") + ".json")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the BIDS sidecar of {name}, found no such file; fetch it from where the PET came from "
            "(OpenNeuro keeps it beside the image) and put it there"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        durations = content["FrameDuration"]
    except ValueError:
        raise ValueError(f"{path}: expected JSON, found something else; fetch the sidecar again") from None
    except (KeyError, TypeError):
        raise ValueError(
            f"{path}: expected FrameDuration, the seconds of every frame, found no such entry; add it, or take the "
            "sidecar of the dynamic PET"
        ) from None
    numbers = isinstance(durations, list) and all(isinstance(duration, (int, float)) for duration in durations)
    if not numbers or len(durations) != count:
        raise ValueError(
            f"{path}: expected FrameDuration with a number for each of the {count} frames of {name}, found "
            f"{f'{len(durations)} numbers' if numbers else repr(durations)}; take the sidecar that belongs to this PET"
        )
    return content


def _check_window(pet_path: str | Path, durations: list, frames: list[int], low: int) -> None:
    """Raise ValueError unless `frames` are consecutive frames of one duration and `low` of them can be halved."""
    if len(frames) < 3 or frames != list(range(frames[0], frames[0] + len(frames))):
        raise ValueError(
            f"frames: expected at least 3 consecutive frame numbers, found {frames}; give e.g. frames=range(70, 90)"
        )
    if low < 2 or low % 2 or low >= len(frames):
        raise ValueError(
            f"low: expected an even number, at least 2 and less than the {len(frames)} frames of the window, found "
            f"{low}; change low or widen the window"
        )
    if frames[0] < 0 or frames[-1] >= len(durations):
        raise ValueError(
            f"{pet_path}: expected a window within its frames 0 to {len(durations) - 1}, found {frames[0]} to "
            f"{frames[-1]}; choose other frames"
        )
    found = sorted({durations[frame] for frame in frames})
    if len(found) > 1:
        raise ValueError(
            f"{pet_path}: expected frames of one duration from {frames[0]} to {frames[-1]}, found "
            f"{', '.join(map(str, found))} s; choose a window in which they are equal"
        )


def _means(pet_path: str | Path, image: nib.Nifti1Image, frames: list[int], low: int) -> list[np.ndarray]:
    """The two halves and the SPET, (X, Y, Z) float32, clipped at 0."""
    first = frames[(len(frames) - low) // 2]
    groups = [range(first, first + low, 2), range(first + 1, first + low, 2), frames]
    sums = np.zeros((3, *image.shape[:3]))
    with _one_sentence(pet_path):
        for number in frames:
            frame = image.dataobj[..., number]
            for total, group in zip(sums, groups, strict=True):
                if number in group:
                    total += frame
    return [activity_of(total / len(group), str(pet_path)) for total, group in zip(sums, groups, strict=True)]
