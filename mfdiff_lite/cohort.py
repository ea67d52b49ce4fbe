"""Cohorts: many virtual patients on many scanners, split by anatomy, cached on disk, served as batches of slices.

Split by anatomy, because two deformations of one head share it: a model tested on them has seen the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from tqdm.auto import tqdm

from .anatomy import embedded_anatomy
from .config import FWHM_TO_SD, TRAIN_ANATOMIES, VALIDATION_ANATOMIES, Profile
from .files import whole_file
from .phantom import VOXEL, Randomisation, virtual_patient
from .scanner import Scanner
from .view import ActivityScale, neighbours, scale_mr

DATA_VERSION = 3  # of what makes the data (anatomy, phantom, scanner, view, this file): raise it when that changes
ARRAYS = ("lpet", "mr", "spet", "weight", "dose", "height")
AIR, BRAIN, LESION, SMALL_LESION = range(4)  # kinds of voxels in `Cohort.weight`
SMALL = 5.0  # mm radius: PET lesions below it are small
TRAINING = Randomisation(lesions_per_100ml=(0.6, 3.0))  # more lesions than a head has: they are what is rare
SCANNER_RANGES = {
    "psf_fwhm": (3.0, 6.5),
    "contamination": (0.25, 0.6),
    "trues_per_mm3": (8.0, 100.0),
    "iterations": (1.6, 6.4),
    "post_filter": (0.0, 8.0),
}


def cache_folder() -> Path:
    """Where cohorts are kept: $MFDIFF_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("MFDIFF_CACHE", Path(base) / "mfdiff_lite"))


def random_scanner(rng: np.random.Generator) -> Scanner:
    """A scanner and reconstruction drawn from SCANNER_RANGES, its counts in their logarithm; half of them without
    post-filter, one in five without resolution recovery."""
    ranges = SCANNER_RANGES | {"trues_per_mm3": np.log(SCANNER_RANGES["trues_per_mm3"])}
    low, high = (np.array([r[i] for r in ranges.values()], float) for i in (0, 1))
    psf, contamination, trues, iterations, post_filter = rng.uniform(low, high)
    return Scanner(
        psf_fwhm=psf,
        contamination=contamination,
        trues_per_mm3=np.exp(trues),
        iterations=round(iterations),
        model_psf=bool(rng.random() > 0.2),
        post_filter=post_filter if rng.random() < 0.5 else 0.0,
    )


@dataclass(frozen=True, eq=False)
class Cohort:
    """Slabs of scaled slices, read from disk as they are used. lpet: (patients, doses, Z, X, Y) float16 in units of the
    LPET's brain mean; mr: (patients, Z, X, Y), spet: like lpet (the same SPET in each LPET's unit); weight: (patients,
    Z, X, Y) uint8, AIR, BRAIN, LESION (those in MR alone too: what must not leak in) or SMALL_LESION (in PET); dose:
    (patients, doses); height: (patients, 1), of the lowest slice above the middle of the head [mm]. key: what decided
    the data, as in the name of its folder."""

    lpet: np.ndarray
    mr: np.ndarray
    spet: np.ndarray
    weight: np.ndarray
    dose: np.ndarray
    height: np.ndarray
    key: str


def make_cohort(profile: Profile, part: str = "train", workers: int | None = None) -> Cohort:
    """The training or validation cohort of a profile: made once, then read from the cache.

    The key of the cache holds the settings, the anatomies and `DATA_VERSION`; a change of any makes a new cohort, and
    cohorts of older versions are removed. Patients are written one by one and whole, so an interrupted build goes on
    where it stopped; then they are put together in one file for each kind of image, which training maps into memory.
    What is complete is only read, so one user's cache serves all who can read it. Raises OSError if something is
    missing and the cache cannot be written.
    """
    anatomies = {"train": TRAIN_ANATOMIES, "validation": VALIDATION_ANATOMIES}[part]
    count = {"train": profile.patients, "validation": profile.validation_patients}[part]
    settings = {"part": part, "anatomies": anatomies}
    settings |= {name: getattr(profile, name) for name in ("slab", "doses", "dose_range", "seed")}
    key = _key(settings)
    folder = cache_folder() / f"cohort-{key}"
    arrays = _stored(folder, count)
    if arrays is None:
        _prepare(folder, settings)
        jobs = [Job(folder / f"patient-{i:05d}.npz", anatomies[i % len(anatomies)], i, settings) for i in range(count)]
        known = _stored(folder) or []  # fewer patients, put together earlier
        new = jobs[len(known[0]) if known else 0 :]
        _make([job for job in new if not job.path.exists()], part, workers)
        arrays = _stored(folder, count) or _together(folder, count, known, new)
    lpet, mr, spet, weight, dose, height = (array[:count] for array in arrays)
    return Cohort(lpet, mr, spet, weight, dose, height, key)


class Job(NamedTuple):
    """One patient to make: its file, its head, its number, and the settings of its cohort."""

    path: Path
    anatomy: str
    number: int
    settings: dict[str, Any]


def _key(settings: dict[str, Any]) -> str:
    card = (Path(__file__).parent / "anatomies" / "card.json").read_text(encoding="utf-8")
    made_by = json.dumps([DATA_VERSION, settings, json.loads(card)], sort_keys=True)
    return f"v{DATA_VERSION}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"


def _stored(folder: Path, count: int = 0) -> list[np.ndarray] | None:
    """The images of at least `count` patients put together, mapped: the largest set, None if there is none."""
    last = folder.glob(f"{ARRAYS[0]}-*.npy")  # the first of the arrays gets its name last
    for size in sorted((int(path.stem.rpartition("-")[2]) for path in last), reverse=True):
        with contextlib.suppress(OSError, EOFError, ValueError):  # taken away by another process, or damaged
            arrays = [np.load(path, mmap_mode="r") for path in _files(folder, size)]
            return arrays if size >= count else None
    return None


def _files(folder: Path, count: int) -> list[Path]:
    return [folder / f"{name}-{count}.npy" for name in ARRAYS]


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """A folder to write into, open to whom the cache is open to, and none of older versions beside it."""
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)  # another process may be as far
            folder.chmod(folder.parent.stat().st_mode & 0o7777)
        if not (folder / "settings.json").is_file():
            with _shared_file(folder / "settings.json") as partial:
                partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "one that is incomplete and read-only")
    except OSError as error:
        raise OSError(
            f"{folder}: expected a writable cache, found {error.strerror or error}; set MFDIFF_CACHE to a folder you "
            "can write"
        ) from None
    for older in folder.parent.glob("cohort-*"):
        version = older.name.removeprefix("cohort-").partition("-")[0]
        if not version.startswith("v") or version[1:].isdigit() and int(version[1:]) < DATA_VERSION:
            shutil.rmtree(older, ignore_errors=True)


@contextlib.contextmanager
def _shared_file(path: Path) -> Iterator[Path]:
    """`whole_file`, readable and writable by whom its folder is."""
    with whole_file(path) as partial:
        yield partial
    path.chmod(path.parent.stat().st_mode & 0o666)


def _make(missing: list[Job], part: str, workers: int | None) -> None:
    done = _mapped(missing, workers)
    for _ in tqdm(
        done, total=len(missing), desc=f"{part} cohort", unit="patient", disable=not missing, file=sys.stdout
    ):
        pass


def _mapped(jobs: list[Job], workers: int | None) -> Iterator[None]:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1 or len(jobs) < 8:
        yield from map(_make_patient, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_patient, jobs)


def _together(folder: Path, count: int, known: list[np.ndarray], new: list[Job]) -> list[np.ndarray]:
    """Put the images of all patients together, those in `known` first: `ARRAYS` of them, (patients, ...), mapped. The
    files of single patients and smaller sets are of no use after it."""
    old = [dict(zip(ARRAYS, images, strict=True)) for images in zip(*known, strict=True)]
    patients, paths = itertools.chain(old, map(_read_patient, new)), _files(folder, count)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(stack.enter_context(_shared_file(path)).open("wb")) for path in paths]
        for number, patient in enumerate(patients):
            for name, stream in zip(ARRAYS, streams, strict=True):
                image = np.ascontiguousarray(patient[name])
                if number == 0:
                    layout = {"descr": image.dtype.str, "fortran_order": False, "shape": (count, *image.shape)}
                    np.lib.format.write_array_header_1_0(stream, layout)
                stream.write(image.data)  # not through a mapped file: a full disk would end the process
    arrays = [np.load(path, mmap_mode="r") for path in paths]
    for path in [job.path for job in new] + [path for path in folder.glob("*-*.npy") if path not in paths]:
        with contextlib.suppress(OSError):  # on some systems a file that another process maps cannot go
            path.unlink(missing_ok=True)
    return arrays


def _read_patient(job: Job) -> dict[str, np.ndarray]:
    try:
        return _images(job.path)
    except Exception:  # a damaged cache file is made again, once
        _make_patient(job)
    return _images(job.path)


def _images(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        return dict(stored)


def _make_patient(job: Job) -> None:
    settings = job.settings
    rng = np.random.default_rng([settings["seed"], job.number, settings["part"] == "train"])
    seed = int(rng.integers(2**31))
    patient = virtual_patient(embedded_anatomy(job.anatomy), seed, slices=settings["slab"], randomisation=TRAINING)
    scanner = random_scanner(rng)
    standard = scanner.acquire(patient.activity, patient.attenuation, seed)
    spet = scanner.reconstruct(standard)
    low, high = np.log(settings["dose_range"])
    doses = np.exp(rng.uniform(low, high, settings["doses"]))
    lpets = [scanner.reconstruct(standard.thin(dose, int(rng.integers(2**31)))) for dose in doses]
    scales = [ActivityScale(lpet, (VOXEL,) * 3) for lpet in lpets]
    weight = np.where(patient.lesions > 0, LESION, patient.mask * BRAIN).astype(np.uint8)
    small = [lesion.label for lesion in patient.lesion_table if lesion.kind != "mr-only" and lesion.radius < SMALL]
    weight[np.isin(patient.lesions, small)] = SMALL_LESION

    def slices(volumes: list[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(np.stack(volumes), -1, -3)).astype(np.float16)

    arrays = {
        "lpet": slices([scale.apply(lpet) for scale, lpet in zip(scales, lpets, strict=True)]),
        "spet": slices([scale.apply(spet) for scale in scales]),
        "mr": slices([scale_mr(patient.mr, scales[0].mask)])[0],
        "weight": np.ascontiguousarray(np.moveaxis(weight, -1, 0)),
        "dose": doses.astype(np.float32),
        "height": patient.affine[2:3, 3].astype(np.float32),
    }
    with _shared_file(job.path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


class SliceDataset:
    """Batches of 2.5-D training slices from a cohort; batch number `step` is always the same, so a resumed run sees
    what an uncut one sees."""

    def __init__(self, cohort: Cohort, profile: Profile, augment: bool = True):
        self.cohort, self.profile, self.augment = cohort, profile, augment

    def batch(self, step: int, size: int | None = None) -> dict[str, torch.Tensor]:
        """lpet, mr: (B, context, H, W); spet, weight: (B, 1, H, W); dose, fits: (B,), see `_disturbed`."""
        rng = np.random.default_rng([self.profile.seed, step, 17])
        items = [self._item(rng) for _ in range(size or self.profile.batch)]
        return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}

    def _item(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        c, crop = self.cohort, self.profile.crop
        patient, dose = int(rng.integers(c.lpet.shape[0])), int(rng.integers(c.lpet.shape[1]))
        z, near = self._near(rng, c.weight[patient])
        lpet, mr = (volume[near].astype(np.float32) for volume in (c.lpet[patient, dose], c.mr[patient]))
        spet, weight = c.spet[patient, dose, z : z + 1].astype(np.float32), c.weight[patient, z : z + 1]
        fits = float(mr.any())
        if self.augment:
            mr, fits = self._disturbed(mr, patient, near, rng)
            if rng.random() < self.profile.other_noise:
                lpet = made_up_noise(c.spet[patient, dose], near, rng)
        x, y = (
            (n - crop) // 2 + (int(rng.integers(-8, 9)) if self.augment and crop <= 112 else 0) for n in lpet.shape[1:]
        )
        cut = (slice(None), slice(x, x + crop), slice(y, y + crop))
        gain = np.exp(rng.normal(0, 0.07)) if self.augment else 1.0
        item = {
            "lpet": lpet[cut] * gain,
            "mr": mr[cut],
            "spet": spet[cut] * gain,
            "weight": self._loss_weight(weight[cut]),
        }
        if self.augment and rng.random() < 0.5:
            item = {key: value[:, ::-1] for key, value in item.items()}
        return {k: np.ascontiguousarray(v, np.float32) for k, v in item.items()} | {
            "dose": np.float32(c.dose[patient, dose]),
            "fits": np.float32(fits),
        }

    def _near(self, rng: np.random.Generator, kind: np.ndarray) -> tuple[int, np.ndarray]:
        """A slice, and the slices (context,) that the model sees round it: mostly all there; in a share `thin` of the
        slices those of a slab of 1 to context - 1 slices round it, whose ends repeat as they do in restoring. Every
        other slice is the one of two that shows more of small lesions. kind: `Cohort.weight` of the patient."""
        context, last = self.profile.context, self.cohort.lpet.shape[2] - 1
        half = context // 2
        drawn = rng.integers(half, last + 1 - half, 2)
        pick = 0
        if self.augment and rng.random() < 0.5:
            pick = int(np.argmax([np.count_nonzero(kind[z] == SMALL_LESION) for z in drawn]))
        z = int(drawn[pick])
        low, high = 0, last
        if self.augment and context > 1 and rng.random() < self.profile.thin:
            depth = int(rng.integers(1, context))
            low = z - int(rng.integers(depth))
            high = low + depth - 1
        return z, neighbours(z, context, low, high)

    def _loss_weight(self, kind: np.ndarray) -> np.ndarray:
        """Small lesions weigh twice as much as others."""
        lesion = self.profile.lesion_weight
        return np.array([0.2, 1.0, 1.0 + lesion, 1.0 + 2 * lesion], np.float32)[kind]

    def _disturbed(
        self, mr: np.ndarray, patient: int, near: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """In a small share of the slices MR dropped, another patient's, its own turned or far out of place, or shifted
        by up to 4 mm. Also whether it fits: 1, 0, or -1 where neither can be said (dropped, or shifted a little)."""
        draw, p = rng.random(), self.profile
        if draw < p.no_mr:
            return np.zeros_like(mr), -1.0
        if draw < p.no_mr + 2 / 3 * p.wrong_mr:
            return self._another(patient, near, rng), 0.0
        if draw < p.no_mr + p.wrong_mr:
            return misplaced(mr, rng), 0.0
        if draw < p.no_mr + p.wrong_mr + 0.1:
            return np.roll(mr, rng.integers(-2, 3, 2), axis=(1, 2)), -1.0
        return mr, float(mr.any())

    def _another(self, patient: int, near: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The MR of another patient, half of the time at about the same height of the head."""
        patients = len(self.cohort.mr)
        others = (patient + rng.integers(1, max(patients, 2), 12)) % patients
        away = np.abs(self.cohort.height[others, 0] - self.cohort.height[patient, 0])
        pick, room = int(rng.integers(len(others))), self.cohort.mr.shape[1] - 1
        first = int(rng.integers(0, room - (near.max() - near.min()) + 1))
        if rng.random() < 0.5:
            pick = int(np.argmin(away))
            up = (self.cohort.height[patient, 0] - self.cohort.height[others[pick], 0]) / VOXEL
            first = int(np.clip(round(float(up)) + near.min(), 0, room - (near.max() - near.min())))
        return self.cohort.mr[others[pick]][first + near - near.min()].astype(np.float32)


def misplaced(mr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """MR slices (context, X, Y) turned by 8 to 40 degrees, or moved by 10 to 32 mm."""
    if rng.random() < 0.5:
        angle = float(rng.uniform(8, 40) * rng.choice([-1, 1]))
        return ndimage.rotate(mr, angle, axes=(1, 2), reshape=False, order=1)
    direction = rng.uniform(0, 2 * np.pi)
    step = rng.uniform(5, 16) * np.array([np.cos(direction), np.sin(direction)])  # voxels
    return ndimage.shift(mr, (0, *np.rint(step)), order=0)


def made_up_noise(spet: np.ndarray, near: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The slices `near` of an SPET (Z, X, Y) with noise of 8 to 60 % correlated over 1 to 9 mm in three dimensions,
    growing with the activity or with its square root: what no scanner of training makes, and some filters do."""
    image = spet[near.min() : near.max() + 1].astype(np.float32)
    sd = rng.uniform(1, 9) * FWHM_TO_SD / VOXEL
    margin = int(np.ceil(3 * sd))
    noise = rng.standard_normal((len(image) + 2 * margin, *image.shape[1:]), dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sd, mode="wrap")[margin : margin + len(image)]
    local = ndimage.gaussian_filter(image, 2.0).clip(min=0) ** rng.choice([0.5, 1.0])
    level = np.exp(rng.uniform(np.log(0.08), np.log(0.6)))
    return (image + level * local * noise / noise.std()).clip(min=0)[near - near.min()]
