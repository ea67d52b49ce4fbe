"""The patients of the second simulator (second_simulator.py): a head painted on 1 mm labels, and its MR.

Only the labels of the anatomies are `mfdiff_lite`'s; warp, uptake, lesions, MR contrast and grids are made here anew.

Shapes: (264, 264, Z) at 1 mm, LPS: the first axis runs to the patient's left, the second to the back, the third up.
Units: kBq/mL, 1/cm, mm. World: mm RAS, 0 = centre of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import fft, ndimage

from mfdiff_lite.anatomy import CSF, WHITE, Anatomy, embedded_anatomy
from mfdiff_lite.scan import Lesion

FIELD = 264  # mm, side of the square that every grid covers in the axial plane
SLICE = 2.4  # mm
GUARD = 4  # slices simulated beyond either end of the scan, so that blur and filter see a whole head
SKULL, SCALP, SINUS = 110, 111, 112  # labels beyond those of `Anatomy`
FWHM_TO_SIGMA = 1 / np.sqrt(8 * np.log(2))


@dataclass(frozen=True)
class Tracer:
    """Mean activities [kBq/mL]; pattern: region (of either hemisphere) -> factor on grey in a typical patient."""

    grey: float
    white: float
    csf: float
    blood: float
    scalp: float
    skull: float
    pattern: dict[str, float]


MEDIAL_TEMPORAL = ("hippocampus", "amygdala", "entorhinal", "parahippocampal", "temporalpole")
MEDIAL_POSTERIOR = ("pericalcarine", "cuneus", "lingual", "precuneus", "posteriorcingulate")
FRONTAL = ("superiorfrontal", "rostralmiddlefrontal", "medialorbitofrontal", "lateralorbitofrontal")
PARIETAL = ("precuneus", "posteriorcingulate", "isthmuscingulate", "inferiorparietal", "middletemporal")
FDG = dict.fromkeys(MEDIAL_TEMPORAL, 0.7) | dict.fromkeys(MEDIAL_POSTERIOR, 1.2) | {"putamen": 1.2}
PLAQUE = dict.fromkeys(FRONTAL, 1.8) | dict.fromkeys(PARIETAL, 2.0)
STRIATUM = {"caudate": 3.2, "putamen": 3.5, "accumbensarea": 2.5, "pallidum": 1.8}
TRACERS = {  # chosen by eye, after clinical images
    "fdg": Tracer(grey=24, white=8, csf=1, blood=5, scalp=4, skull=2.5, pattern=FDG),
    "amyloid": Tracer(grey=5, white=8, csf=1.5, blood=3, scalp=3, skull=2.5, pattern=PLAQUE),
    "fdopa": Tracer(grey=4, white=3.4, csf=1.2, blood=6, scalp=3.5, skull=2, pattern=STRIATUM),
}
SOFT, BONE = 0.0975, 0.13  # attenuation at 511 keV, 1/cm
# T1 at 3 T [ms] (grey and white: Wansapura et al., JMRI 9:531, 1999; the rest rounded) and relative proton density.
T1 = {"grey": 1331.0, "white": 832.0, "csf": 4000.0, "scalp": 370.0, "bone": 400.0, "blood": 1650.0}
PROTONS = {"grey": 0.83, "white": 0.71, "csf": 1.0, "scalp": 0.6, "bone": 0.06, "blood": 0.3}


@dataclass(frozen=True, eq=False)
class Head:
    """The object on the fine grid: activity [kBq/mL], attenuation [1/cm], MR signal, (264, 264, Z) float32; labels as
    in `Anatomy` plus SKULL, SCALP, SINUS; lesions 0 or `Lesion.label`, uint8."""

    activity: np.ndarray
    attenuation: np.ndarray
    signal: np.ndarray
    labels: np.ndarray
    lesions: np.ndarray
    lesion_table: tuple[Lesion, ...]
    affine: np.ndarray
    name: str


def second_head(name: str, seed: int, tracer: str, slices: int | None = 24) -> Head:
    """Patient `seed` of an anatomy: `slices` of SLICE mm through the deep nuclei (`None`: the whole head above its
    lowest fifth), and GUARD slices more at either end."""
    if tracer not in TRACERS:
        raise ValueError(f"tracer: expected one of {', '.join(TRACERS)}, found {tracer!r}")
    anatomy, rng = embedded_anatomy(name), np.random.default_rng([seed, *f"{tracer} {name}".encode()])
    axes, affine = _fine_grid(anatomy, slices, rng)
    labels = _enveloped(_warped(anatomy, axes, rng), axes, rng)
    activity = _uptake(anatomy, TRACERS[tracer], rng)[labels]
    activity *= np.exp(0.07 * waves(rng, axes, 40.0) + 0.07 * waves(rng, axes, 250.0))
    signal = _by_label(_inversion_recovery(rng.uniform(900.0, 1100.0)))[labels]
    signal *= np.exp(0.03 * waves(rng, axes, 15.0))
    lesions, table = _add_lesions(labels, activity, signal, rng)
    attenuation = _by_label(dict.fromkeys(T1, SOFT) | {"bone": BONE})[labels]
    return Head(activity, attenuation, signal, labels, lesions, table, affine, f"second-{tracer}-{name}-{seed}")


def waves(rng: np.random.Generator, axes: list[np.ndarray], length: float, count: int = 24) -> np.ndarray:
    """A smooth random field of mean 0 and SD 1: a sum of plane waves of random directions and phases, wavelengths
    `length` to twice that [mm] (Shinozuka & Jan 1972)."""
    k = rng.normal(size=(3, count))
    k *= 2 * np.pi / (length * rng.uniform(1, 2, count) * np.linalg.norm(k, axis=0))
    x, y, z = (np.exp(1j * np.outer(axis, along)).astype(np.complex64) for axis, along in zip(axes, k, strict=True))
    z *= np.sqrt(2 / count) * np.exp(1j * rng.uniform(0, 2 * np.pi, count)).astype(np.complex64)
    return np.einsum("xn,yn,zn->xyz", x, y, z, optimize=True).real


def _fine_grid(anatomy: Anatomy, slices: int | None, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """World coordinates [mm] along each axis of the fine grid, and its affine."""
    height = float(np.ptp(np.flatnonzero(anatomy.labels.any((0, 1)))))
    count = int((0.8 * height + 10) / SLICE) if slices is None else slices  # 10 mm of fluid and bone on top
    low = (rng.uniform(0.2, 0.35) if slices else 0.2) * height - height / 2
    depth = int(np.ceil((count + 2 * GUARD) * SLICE))
    plane = (FIELD - 1) / 2 - np.arange(FIELD)
    up = low + count * SLICE / 2 + np.arange(depth) - (depth - 1) / 2
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = plane[0], plane[0], up[0]
    return [plane, plane, up], affine


def _warped(anatomy: Anatomy, axes: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Labels of the anatomy, turned, scaled and bent (SD 2.5 mm over 60 to 120 mm, 0.7 mm over 18 to 36 mm)."""
    where = np.argwhere(anatomy.labels)
    centre = (where.min(0) + where.max(0)) / 2
    turn, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.06, (3, 3)))
    turn *= np.sign(np.diag(turn)) / rng.uniform(0.94, 1.04, 3)
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    points = np.stack([row[0] * x + row[1] * y + row[2] * z + c for row, c in zip(turn, centre, strict=True)])
    for point in points:
        point += 2.5 * waves(rng, axes, 60.0) + 0.7 * waves(rng, axes, 18.0)
    return ndimage.map_coordinates(anatomy.labels, points, order=0)


def _enveloped(labels: np.ndarray, axes: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Fluid, skull and scalp as shells round the brain, and the superior sagittal sinus in the midline."""
    hull = ndimage.gaussian_filter((labels > 0).astype(np.float32), 4.0) > 0.35
    distance = ndimage.distance_transform_edt(~(hull | (labels > 0))).astype(np.float32)
    distance *= np.exp(0.15 * waves(rng, axes, 60.0))
    midline = (np.abs(axes[0]) < 6)[:, None, None] & (axes[1] < 30)[:, None]
    shells = [(17.0, SCALP), (10.5, SKULL), (4.5, np.where(midline, SINUS, CSF)), (1.5, CSF)]
    envelope = np.zeros_like(labels)
    for edge, label in shells:
        envelope = np.where(distance < edge * rng.uniform(0.85, 1.15), label, envelope)
    return np.where(labels > 0, labels, envelope).astype(np.uint8)


def _by_label(value: dict[str, float]) -> np.ndarray:
    """Label -> value, a table (256,) float32."""
    table = np.zeros(256, np.float32)
    table[1:WHITE] = value["grey"]
    table[[WHITE, CSF, SKULL, SCALP, SINUS]] = [value[name] for name in ("white", "csf", "bone", "scalp", "blood")]
    return table


def _uptake(anatomy: Anatomy, tracer: Tracer, rng: np.random.Generator) -> np.ndarray:
    """Activity of every label: the pattern at a strength of the patient's own, weaker on one side, and 6 % SD between
    regions."""
    level = {"grey": tracer.grey, "white": tracer.white, "csf": tracer.csf, "blood": tracer.blood}
    level |= {"scalp": tracer.scalp, "bone": tracer.skull}
    table = _by_label({name: value * rng.uniform(0.85, 1.15) for name, value in level.items()})
    strength, weaker, side = rng.uniform(0.7, 1.1), rng.uniform(0.6, 1.0), rng.choice(["L", "R"])
    for label, region in sorted(anatomy.regions.items()):
        if label < WHITE:
            share = strength * (weaker if region.startswith(side) else 1)
            table[label] *= tracer.pattern.get(region.split(" ")[-1], 1.0) ** share * np.exp(rng.normal(0, 0.06))
    return table


def _inversion_recovery(inversion: float, repetition: float = 2300.0) -> dict[str, float]:
    """Magnitude PD |1 - 2 exp(-TI / T1) + exp(-TR / T1)| of every tissue; times in ms."""
    return {
        name: PROTONS[name] * abs(1 - 2 * np.exp(-inversion / t1) + np.exp(-repetition / t1)) for name, t1 in T1.items()
    }


def _add_lesions(labels, activity, signal, rng) -> tuple[np.ndarray, tuple[Lesion, ...]]:
    """Paint one of each kind per 150 mL of tissue into activity and MR signal, in place. Half are ellipsoids, half
    irregular; half are hot; a matched one may be bright or dark in the MR."""
    tissue = (labels > 0) & (labels <= WHITE)
    margin = int(GUARD * SLICE)
    places = np.argwhere(tissue[..., margin:-margin]) + [0, 0, margin]
    typical, lesions, table, taken = float(np.median(activity[tissue])), np.zeros_like(labels), [], []
    for kind in ("pet-only", "mr-only", "matched") * max(1, round(len(places) / 150e3)):
        radius = rng.uniform(3.0, 9.0)
        centre = next(
            c for c in rng.permutation(places)[:500] if all(np.linalg.norm(c - o) > radius + r + 8 for o, r in taken)
        )
        near, shape = _blob(centre, radius, rng)
        inside = shape[tuple(map(slice, tissue[near].shape))] & tissue[near]
        local, hot, bright = float(activity[near][inside].mean()), rng.random() < 0.5, rng.random() < 0.5
        if kind != "mr-only":
            value = max(local, typical) * rng.uniform(1.4, 2.4) if hot else local * rng.uniform(0.2, 0.7)
            activity[near][inside] = value
        if kind != "pet-only":
            signal[near][inside] *= rng.uniform(1.25, 1.7) if bright else rng.uniform(0.45, 0.75)
        lesions[near][inside] = len(table) + 1
        size = float(np.cbrt(inside.sum() * 3 / (4 * np.pi)))
        table.append(Lesion(len(table) + 1, kind, bool(bright if kind == "mr-only" else hot), size))
        taken.append((centre, radius))
    return lesions, tuple(table)


def _blob(centre: np.ndarray, radius: float, rng: np.random.Generator) -> tuple[tuple[slice, ...], np.ndarray]:
    """A turned ellipsoid or an irregular blob of `radius` [mm] and where it lies: slices and (n, n, n) bool."""
    reach = int(2 * radius) + 1
    line = np.arange(-reach, reach + 1.0)
    semi = np.exp(rng.normal(0, 0.2, 3))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    points = np.einsum("ij,jxyz->ixyz", turn, np.stack(np.meshgrid(line, line, line, indexing="ij")))
    distance = np.sqrt(np.sum((points / (radius * semi / np.cbrt(semi.prod()))[:, None, None, None]) ** 2, axis=0))
    if rng.random() < 0.5:
        distance += 0.25 * waves(rng, [line] * 3, 1.5 * radius)
    near = tuple(slice(max(c - reach, 0), c + reach + 1) for c in centre)
    return near, (distance < 1)[tuple(slice(max(reach - c, 0), None) for c in centre)]


# --- the MR ----------------------------------------------------------------------------------------------------------


def mr_image(head: Head, rng: np.random.Generator) -> nib.Nifti1Image:
    """The MR at 1 mm on its own grid, RAS and tilted by some degrees: bias field, noise in k-space, and Gibbs ringing,
    because only 3/4 of k-space is acquired in the plane. Its affine is 0.7 mm SD off: the registration's error."""
    tilt, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.03, (3, 3)))
    affine, shape = np.eye(4), np.array(head.signal.shape)
    affine[:3, :3] = tilt * np.sign(np.diag(tilt))
    affine[:3, 3] = nib.affines.apply_affine(head.affine, (shape - 1) / 2) - affine[:3, :3] @ (shape - 1) / 2
    fine = nib.Nifti1Image(head.signal, head.affine)
    image = np.asarray(resample_from_to(fine, (shape, affine), order=1, mode="nearest").dataobj)
    axes = [np.arange(n, dtype=float) for n in shape]
    noise = rng.uniform(0.02, 0.05) * np.median(head.signal[head.labels == WHITE])
    image = image * np.exp(0.2 * waves(rng, axes, 150.0)) + 1j * rng.normal(0, noise, shape)
    image.real += rng.normal(0, noise, shape)
    spectrum = fft.fft2(image.astype(np.complex64), axes=(0, 1))
    acquired = np.abs(fft.fftfreq(FIELD)) < 0.375
    image = np.abs(fft.ifft2(spectrum * acquired[:, None, None] * acquired[:, None], axes=(0, 1)))
    affine[:3, 3] += rng.normal(0, 0.7, 3)
    return nib.Nifti1Image(image.astype(np.float32), affine)


def on_grid(mr: nib.Nifti1Image, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Resampled as `mfdiff_lite.load_scan` does: low-pass to the target's voxels, then linear."""
    fine, coarse = nib.affines.voxel_sizes(mr.affine), nib.affines.voxel_sizes(affine)
    sigma = np.sqrt(np.maximum(coarse.min() ** 2 - fine**2, 0)) * FWHM_TO_SIGMA / fine
    smooth = ndimage.gaussian_filter(mr.get_fdata(dtype=np.float32), sigma, mode="nearest")
    return np.asarray(resample_from_to(nib.Nifti1Image(smooth, mr.affine), (shape, affine), order=1).dataobj)
