"""Cohorts: many virtual patients on many scanners, split by anatomy, cached on disk, served as batches of slices.

Split by anatomy, because two deformations of one head share it: a model tested on them has seen the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from . import anatomy as anatomy_module
from . import phantom as phantom_module
from . import scan as scan_module
from . import scanner as scanner_module
from .anatomy import load_anatomy
from .config import TRAIN_ANATOMIES, VALIDATION_ANATOMIES, Profile
from .phantom import virtual_patient
from .scan import ActivityScale, scale_mr, whole_file
from .scanner import Scanner

ARRAYS = ("lpet", "mr", "spet", "weight", "dose")
SCANNER_RANGES = {
    "psf_fwhm": (3.0, 6.5),
    "contamination": (0.25, 0.6),
    "trues_per_mm3": (20.0, 100.0),
    "iterations": (1.6, 6.4),
    "post_filter": (0.0, 5.0),
}


def cache_folder() -> Path:
    """Where cohorts are kept: $MFDIFF_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("MFDIFF_CACHE", Path(base) / "mfdiff_lite"))


def random_scanner(rng: np.random.Generator) -> Scanner:
    """A scanner and reconstruction drawn from SCANNER_RANGES; half of them without post-filter, one in five without
    resolution recovery."""
    low, high = (np.array([r[i] for r in SCANNER_RANGES.values()], float) for i in (0, 1))
    psf, contamination, trues, iterations, post_filter = rng.uniform(low, high)
    return Scanner(
        psf_fwhm=psf,
        contamination=contamination,
        trues_per_mm3=trues,
        iterations=round(iterations),
        model_psf=bool(rng.random() > 0.2),
        post_filter=post_filter if rng.random() < 0.5 else 0.0,
    )


@dataclass(eq=False)
class Cohort:
    """Slabs of scaled slices, read from disk as they are used. lpet: (patients, doses, Z, X, Y) float16 in units of the
    LPET's brain mean; mr: (patients, Z, X, Y), spet: like lpet (the same SPET in each LPET's unit); weight: (patients,
    Z, X, Y) uint8, 0 air, 1 brain, 2 lesion (those in MR alone too: what must not leak in); dose: (patients, doses)."""

    lpet: np.ndarray
    mr: np.ndarray
    spet: np.ndarray
    weight: np.ndarray
    dose: np.ndarray
    folder: Path


def make_cohort(profile: Profile, part: str = "train", workers: int | None = None) -> Cohort:
    """The training or validation cohort of a profile: made once, then read from the cache.

    The key of the cache holds the settings and the source of everything that makes the data; a change of either makes a
    new cohort. Patients are written one by one and whole, so an interrupted build goes on where it stopped; then they
    are put together in one file for each kind of image, which training maps into memory. Raises OSError if the cache
    cannot be written.
    """
    anatomies = {"train": TRAIN_ANATOMIES, "validation": VALIDATION_ANATOMIES}[part]
    count = {"train": profile.patients, "validation": profile.validation_patients}[part]
    settings = {
        "part": part,
        "slab": profile.slab,
        "doses": profile.doses,
        "dose_range": profile.dose_range,
        "seed": profile.seed,
    }
    settings["anatomies"] = anatomies
    folder = cache_folder() / f"cohort-{_key(settings)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise OSError(
            f"{folder}: expected a writable cache, found {error.strerror}; set MFDIFF_CACHE to a folder you can write"
        ) from None
    jobs = [(folder / f"patient-{i:05d}.npz", anatomies[i % len(anatomies)], i, settings) for i in range(count)]
    missing = [job for job in jobs if not job[0].exists()]
    for _ in tqdm(
        _mapped(missing, workers),
        total=len(missing),
        desc=f"{part} cohort",
        unit="patient",
        disable=not missing,
        file=sys.stdout,
    ):
        pass
    return Cohort(*_together(folder, jobs), folder)


def _key(settings: dict) -> str:
    modules = (anatomy_module, phantom_module, scan_module, scanner_module, sys.modules[__name__])
    made_by = json.dumps(settings, sort_keys=True) + "".join(inspect.getsource(m) for m in modules)
    made_by += (Path(anatomy_module.__file__).parent / "anatomies" / "card.json").read_text()
    return hashlib.sha256(made_by.encode()).hexdigest()[:12]


def _mapped(jobs: list, workers: int | None) -> Iterator[None]:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1 or len(jobs) < 8:
        yield from map(_make_patient, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_patient, jobs)


def _together(folder: Path, jobs: list) -> list[np.ndarray]:
    """The images of all patients, mapped: `ARRAYS` of them, (patients, ...)."""
    paths = [folder / f"{name}-{len(jobs)}.npy" for name in ARRAYS]
    with contextlib.suppress(FileNotFoundError, EOFError, ValueError):  # not put together yet, or a damaged file
        return [np.load(path, mmap_mode="r") for path in paths]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(stack.enter_context(whole_file(path)).open("wb")) for path in paths]
        for index, job in enumerate(jobs):
            patient = _read_patient(job)
            for name, stream in zip(ARRAYS, streams, strict=True):
                one = np.ascontiguousarray(patient[name])
                if index == 0:
                    layout = {"descr": one.dtype.str, "fortran_order": False, "shape": (len(jobs), *one.shape)}
                    np.lib.format.write_array_header_1_0(stream, layout)
                stream.write(one.data)  # not through a mapped file: a full disk would end the process
    return [np.load(path, mmap_mode="r") for path in paths]


def _read_patient(job: tuple) -> dict[str, np.ndarray]:
    for attempt in range(2):
        try:
            with job[0].open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                return dict(stored)
        except Exception:  # a damaged cache file is made again, once
            if attempt:
                raise
            _make_patient(job)
    raise AssertionError


def _make_patient(job: tuple[Path, str, int, dict]) -> None:
    path, anatomy, index, settings = job
    rng = np.random.default_rng([settings["seed"], index, settings["part"] == "train"])
    seed = int(rng.integers(2**31))
    patient = virtual_patient(load_anatomy(anatomy), seed, slices=settings["slab"])
    scanner = random_scanner(rng)
    standard = scanner.acquire(patient.activity, patient.attenuation, seed)
    spet = scanner.reconstruct(standard)
    low, high = np.log(settings["dose_range"])
    doses = np.exp(rng.uniform(low, high, settings["doses"]))
    lpets = [scanner.reconstruct(standard.thin(dose, int(rng.integers(2**31)))) for dose in doses]
    scales = [ActivityScale(lpet, (2.0, 2.0, 2.0)) for lpet in lpets]
    weight = np.where(patient.lesions > 0, 2, patient.mask).astype(np.uint8)

    def slices(volumes: list[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(np.stack(volumes), -1, -3)).astype(np.float16)

    arrays = {
        "lpet": slices([scale.apply(lpet) for scale, lpet in zip(scales, lpets, strict=True)]),
        "spet": slices([scale.apply(spet) for scale in scales]),
        "mr": slices([scale_mr(patient.mr, scales[0].mask)])[0],
        "weight": np.ascontiguousarray(np.moveaxis(weight, -1, 0)),
        "dose": doses.astype(np.float32),
    }
    with whole_file(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


class SliceDataset:
    """Batches of 2.5-D training slices from a cohort; batch number `step` is always the same, so a resumed run sees
    what an uncut one sees."""

    def __init__(self, cohort: Cohort, profile: Profile, augment: bool = True):
        self.cohort, self.profile, self.augment = cohort, profile, augment

    def batch(self, step: int, size: int | None = None) -> dict[str, torch.Tensor]:
        """lpet, mr: (B, context, H, W); spet, weight: (B, 1, H, W); dose: (B,)."""
        rng = np.random.default_rng([self.profile.seed, step, 17])
        items = [self._item(rng) for _ in range(size or self.profile.batch)]
        return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}

    def _item(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        c, half, crop = self.cohort, self.profile.context // 2, self.profile.crop
        patient, dose = rng.integers(c.lpet.shape[0]), rng.integers(c.lpet.shape[1])
        z = int(rng.integers(half, c.lpet.shape[2] - half))
        near = slice(z - half, z + half + 1)
        lpet, spet = c.lpet[patient, dose, near].astype(np.float32), c.spet[patient, dose, z : z + 1].astype(np.float32)
        weight, mr = c.weight[patient, z : z + 1], c.mr[patient, near].astype(np.float32)
        if self.augment:
            mr = self._disturbed(mr, rng)
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
            "dose": np.float32(c.dose[patient, dose])
        }

    def _loss_weight(self, kind: np.ndarray) -> np.ndarray:
        return np.array([0.2, 1.0, 1.0 + self.profile.lesion_weight], np.float32)[kind]

    def _disturbed(self, mr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """MR dropped, swapped with another patient's, or shifted by up to 4 mm, in a small share of the slices."""
        draw, p = rng.random(), self.profile
        if draw < p.no_mr:
            return np.zeros_like(mr)
        if draw < p.no_mr + p.wrong_mr:
            z = int(rng.integers(0, self.cohort.mr.shape[1] - p.context + 1))
            return self.cohort.mr[rng.integers(len(self.cohort.mr)), z : z + p.context].astype(np.float32)
        if draw < p.no_mr + p.wrong_mr + 0.1:
            return np.roll(mr, rng.integers(-2, 3, 2), axis=(1, 2))
        return mr
