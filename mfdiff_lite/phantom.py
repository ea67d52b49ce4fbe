"""Virtual patients: a real anatomy and a seed become a head with uptake, lesions and an MR, that nobody was irradiated
for.

Everything that PET and MR do not share in life is drawn independently here (regional uptake, lesions of one modality,
bias field, resolution), because a phantom whose two images are painted from the same labels flatters every method that
looks at the MR.

Volumes are (128, 128, Z) at 2 mm, RAS+. Each voxel averages 2 x 2 x 2 samples of the 1 mm labels: that is its partial
volume. Values and their sources: FDG grey : white : CSF 4 : 1 : 0.05 (Schramm); T1 and T2 signals, lesion contrasts and
sizes, attenuation at 511 keV as in FBSEM and casperdcl/brainweb. Ranges are wider than life on purpose: see
`Randomisation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from einops import reduce
from scipy import ndimage

from .anatomy import CSF, WHITE, Anatomy
from .config import FWHM_TO_SD, check, one_of, within

MATRIX, VOXEL = 128, 2.0  # in-plane size, mm
LOWEST = 0.2  # share of the head left out at the bottom: the individual anatomies have no cerebellum or brain stem
AIR = 0  # of `VirtualPatient.tissues`
T1_SIGNAL = {"csf": 48.0, "grey": 106.0, "white": 154.0, "bone": 15.0, "scalp": 180.0}
T2_SIGNAL = {"csf": 250.0, "grey": 100.0, "white": 70.0, "bone": 10.0, "scalp": 120.0}
LESION_KINDS = ("pet-only", "mr-only", "matched")

Range = tuple[float, float]


@dataclass(frozen=True)
class Lesion:
    """One lesion of a virtual patient. label: its value in `Scan.lesions`; kind: "pet-only", "mr-only" or "matched";
    radius in mm; hot: whether its activity lies above its surroundings (for MR-only lesions: its MR signal)."""

    label: int
    kind: str
    hot: bool
    radius: float


@dataclass(frozen=True)
class Randomisation:
    """What varies between virtual patients, as (low, high) of a uniform draw unless said otherwise. Lengths in mm."""

    rotation: Range = within((-8.0, 8.0), -180, 180)  # degrees, about each axis
    size: Range = within((0.92, 1.08), 0.5, 1.08)  # of the head, each axis; larger ones leave the field of view
    bend: Range = within((1.0, 4.0), 0, 20)  # SD of the displacement with 40 mm correlation length
    folding: Range = within((0.3, 1.5), 0, 5)  # SD of the displacement with 14 mm correlation length
    white_activity: Range = within((2.5, 8.0), 0.01, 1e6)  # kBq/mL
    grey_to_white: Range = within((2.0, 5.5), 0.01, 100)
    regional_sd: Range = within((0.04, 0.14), 0, 1)  # between named regions, half of it shared by both hemispheres
    atrophy: float = within(0.0, 0, 10)  # width of grey and white matter lost wherever they border on CSF or outside
    field_sd: Range = within((0.05, 0.12), 0, 1)  # low-frequency variation of grey and white uptake
    scalp_to_white: Range = within((0.2, 1.0), 0, 100)
    lesions_per_100ml: Range = within((0.3, 1.5), 0, 20)  # of each kind
    lesion_radius: Range = within((2.0, 8.0), 1, 50)
    hot_to_grey: Range = within((1.2, 2.2), 1, 100)  # of the tissue that takes up more
    cold_to_white: Range = within((0.2, 0.8), 0, 1)  # of the tissue that takes up less
    mr_lesion: Range = within((0.5, 1.6), 0, 10)  # signal relative to the surroundings
    mr_contrast: str = one_of("any", ("any", "t1", "t2"))  # "any": mostly T1-like, sometimes T2-like or arbitrary
    mr_noise: Range = within((0.01, 0.06), 0, 1)  # Rician, relative to white matter
    mr_bias_sd: Range = within((0.02, 0.2), 0, 1)
    mr_blur: Range = within((0.0, 3.5), 0, 20)  # mm FWHM beyond the voxel
    mr_offset: float = within(0.6, 0, 50)  # SD of the residual misregistration, each axis
    skull_stripped: float = within(0.4, 0, 1)  # probability

    def __post_init__(self) -> None:
        check(self)


# Named OOD emulations: what each changes in the patient and in the scanner. They emulate a shift; none is in-vivo data.
# "a+b" is both together. Ranges of training: `Randomisation` and `cohort.SCANNER_RANGES`.
SHIFTS: dict[str, dict[str, dict[str, Any]]] = {
    "edge-scanner": {
        "patient": {},
        "scanner": {"psf_fwhm": 6.2, "contamination": 0.55, "trues_per_mm3": 30.0, "iterations": 2, "post_filter": 2.5},
    },
    "low-contrast": {"patient": {"grey_to_white": (1.6, 2.0)}, "scanner": {}},
    "amyloid": {"patient": {"grey_to_white": (0.55, 0.8)}, "scanner": {}},  # more uptake in white matter than in grey
    "t2-mr": {"patient": {"mr_contrast": "t2", "mr_bias_sd": (0.2, 0.3), "mr_offset": 1.7}, "scanner": {}},
    "large-lesions": {"patient": {"lesion_radius": (8.0, 12.0)}, "scanner": {}},
    "wide-psf": {"patient": {}, "scanner": {"psf_fwhm": 7.5}},
    "few-counts": {"patient": {}, "scanner": {"trues_per_mm3": 50.0 / 10}},  # DRF 20 of it is 200 of the default
    "old-reconstruction": {"patient": {}, "scanner": {"iterations": 1, "post_filter": 6.0, "model_psf": False}},
    "atrophy": {"patient": {"atrophy": 1.0}, "scanner": {}},  # wide ventricles and sulci, as in no head of training
    "scatter": {"patient": {}, "scanner": {"contamination": 0.65, "scatter_fwhm": 60.0}},
}


def shift_settings(shift: str | None) -> dict[str, dict[str, Any]]:
    """The settings of a named OOD emulation, or of several ("wide-psf+t2-mr"); `None` is no shift. Raises ValueError
    for a name not in `SHIFTS`."""
    settings: dict[str, dict[str, Any]] = {"patient": {}, "scanner": {}}
    for name in [] if shift is None else shift.split("+"):
        if name not in SHIFTS:
            raise ValueError(f"shift: expected one of {', '.join(SHIFTS)}, found {name!r}; choose a listed name")
        settings = {side: settings[side] | SHIFTS[name][side] for side in settings}
    return settings


@dataclass(frozen=True, eq=False)
class VirtualPatient:
    """activity [kBq/mL], attenuation [1/cm], mr [arbitrary]: (128, 128, Z) float32; mask: brain; tissues: 1 grey, 2
    white, 3 CSF; lesions: 0 or `Lesion.label`; truth: the settings drawn for this patient."""

    activity: np.ndarray
    attenuation: np.ndarray
    mr: np.ndarray
    mask: np.ndarray
    tissues: np.ndarray
    lesions: np.ndarray
    lesion_table: tuple[Lesion, ...]
    affine: np.ndarray
    seed: int
    name: str
    truth: dict[str, float] = field(default_factory=dict)


def virtual_patient(
    anatomy: Anatomy,
    seed: int,
    shift: str | None = None,
    slices: int | None = None,
    randomisation: Randomisation | None = None,
) -> VirtualPatient:
    """Draw the virtual patient number `seed` of an anatomy: the same arguments always give the same patient.

    slices: axial slices to make (a slab at a drawn height); `None` makes the whole head. shift: a name in `SHIFTS`.
    """
    ranges = replace(randomisation or Randomisation(), **shift_settings(shift)["patient"])
    rng = np.random.default_rng([seed, *anatomy.name.encode()])
    labels, points, affine = _posed_labels(anatomy, ranges, slices, rng)
    if ranges.atrophy:
        tissue = (labels > 0) & (labels != CSF)
        labels = np.where(tissue & (ndimage.distance_transform_edt(tissue) <= ranges.atrophy), CSF, labels)
    fractions = {
        "grey": _to_voxels((labels > 0) & (labels < WHITE)),
        "white": _to_voxels(labels == WHITE),
        "csf": _to_voxels(labels == CSF),
    }
    brain = fractions["grey"] + fractions["white"] + fractions["csf"]
    fractions |= _envelope(brain, rng)
    mask = fractions["grey"] + fractions["white"] > 0.5
    tissues = _dominant(fractions, brain)

    uptake, levels = _uptake(labels, anatomy, fractions, ranges, rng)
    mr = _mr_signal(anatomy, points, fractions, brain, ranges, rng)
    lesions, table = _add_lesions(mask, uptake, mr, levels, ranges, rng)
    return VirtualPatient(
        activity=uptake.astype(np.float32),
        attenuation=_attenuation(fractions, brain),
        mr=_mr_image(mr, brain, ranges, rng),
        mask=mask,
        tissues=tissues,
        lesions=lesions,
        lesion_table=table,
        affine=affine,
        seed=seed,
        name=f"{anatomy.name}-{seed}",
        truth=levels,
    )


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], length: float, voxel: float = VOXEL) -> np.ndarray:
    """A random field of mean 0 and SD about 1 with correlation length `length` [mm]: coarse normal noise, cubic
    interpolation."""
    coarse = [int(np.ceil(n * voxel / length)) + 3 for n in shape]
    knots = ndimage.spline_filter(rng.standard_normal(coarse), order=3, mode="nearest").astype(np.float32)
    axes = [1 + rng.random() + np.arange(n) * voxel / length for n in shape]
    # Separable cubic resampling, one axis at a time.
    for axis, position in enumerate(axes):
        knots = _spline_along(knots, axis, position)
    return (knots * 1.4).astype(np.float32)  # interpolation between knots lowers the SD to about 0.7


def _spline_along(knots: np.ndarray, axis: int, position: np.ndarray) -> np.ndarray:
    low = np.floor(position).astype(int)
    f = position - low
    weights = (
        np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3]) / 6
    )  # cubic B-spline
    taps = np.clip(low[None, :] + np.arange(-1, 3)[:, None], 0, knots.shape[axis] - 1)
    matrix = np.zeros((len(position), knots.shape[axis]), np.float32)
    np.add.at(matrix, (np.arange(len(position))[None, :].repeat(4, 0), taps), weights)
    return np.moveaxis(np.tensordot(matrix, knots, axes=(1, axis)), 0, axis)


def _posed_labels(anatomy: Anatomy, ranges: Randomisation, slices: int | None, rng: np.random.Generator):
    """The deformed anatomy on a 1 mm grid, (256, 256, 2 Z) labels, with the sampled voxel coordinates and the affine of
    the 2 mm grid."""
    extent = np.array(
        [np.flatnonzero((anatomy.labels > 0).any(axis=tuple({0, 1, 2} - {a})))[[0, -1]] for a in range(3)]
    ).astype(float)
    centre = extent.mean(1)
    extent[2, 0] += LOWEST * (extent[2, 1] - extent[2, 0])
    height = int(np.ceil((extent[2, 1] - extent[2, 0]) * 1.08 / VOXEL)) + 1
    count = height if slices is None else min(slices, height)
    first = (
        0 if slices is None else int(rng.integers(0, max(1, height - count - 5)))
    )  # leave out the very top, where little brain is
    shape = (MATRIX * 2, MATRIX * 2, count * 2)
    axes = [np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in shape]
    axes[2] += 2 * (first + count / 2 - height / 2) + extent[2].mean() - centre[2]
    turn = _rotation(rng.uniform(*ranges.rotation, 3)) @ np.diag(1 / rng.uniform(*ranges.size, 3))
    turn = turn.astype(np.float32)
    bend, folding = rng.uniform(*ranges.bend), rng.uniform(*ranges.folding)
    x, y, z = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    points = []
    for axis in range(3):
        line = turn[axis, 0] * x + turn[axis, 1] * y + turn[axis, 2] * z + np.float32(centre[axis])
        line += bend * smooth_field(rng, shape, 40.0, voxel=1.0)
        line += folding * smooth_field(rng, shape, 14.0, voxel=1.0)
        points.append(line)
    labels = _nearest(anatomy.labels, points)
    affine = np.diag([VOXEL, VOXEL, VOXEL, 1.0])
    affine[:3, 3] = [axes[0][0] + 0.5, axes[1][0] + 0.5, axes[2][0] + 0.5]
    return labels, points, affine


def _rotation(degrees: np.ndarray) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        c, s = np.cos(angle), np.sin(angle)
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = np.eye(3)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        matrix = matrix @ turn
    return matrix


def _nearest(volume: np.ndarray, points: list[np.ndarray]) -> np.ndarray:
    """Nearest-neighbour look-up, 0 outside."""
    index = [np.rint(p).astype(np.int32) for p in points]
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, volume.shape, strict=True)])
    return np.where(inside, volume[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, volume.shape, strict=True))], 0)


def _to_voxels(fine: np.ndarray) -> np.ndarray:
    """1 mm samples -> means over 2 mm voxels: partial volume."""
    return reduce(fine.astype(np.float32), "(x i) (y j) (z k) -> x y z", "mean", i=2, j=2, k=2)


def _envelope(brain: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Outer CSF, skull and scalp as shells round the brain, of slowly varying thickness; fractions in [0, 1]."""
    closed = ndimage.binary_closing(np.pad(brain > 0.3, ((0, 0), (0, 0), (4, 4)), mode="edge"), iterations=4)[
        ..., 4:-4
    ] | (brain > 0.3)
    distance = ndimage.distance_transform_edt(~closed) * VOXEL if closed.any() else np.full(brain.shape, 1e3)
    wobble = np.exp(0.15 * smooth_field(rng, brain.shape, 50.0))
    edges = np.cumsum([rng.uniform(0.5, 3.0), rng.uniform(4.0, 8.0), rng.uniform(3.0, 7.0)])
    inside = [np.clip((edge * wobble - distance) / VOXEL + 0.5, 0, 1) for edge in edges]
    outer_csf, skull, scalp = (
        np.clip(inside[0] - brain, 0, 1),
        np.clip(inside[1] - np.maximum(inside[0], brain), 0, 1),
        np.clip(inside[2] - inside[1], 0, 1),
    )
    return {"outer_csf": outer_csf, "bone": skull, "scalp": scalp}


def _dominant(fractions: dict[str, np.ndarray], brain: np.ndarray) -> np.ndarray:
    stack = np.stack([fractions["grey"], fractions["white"], fractions["csf"]])
    return np.where(brain > 0.5, stack.argmax(0) + 1, AIR).astype(np.uint8)


def _uptake(labels, anatomy, fractions, ranges, rng) -> tuple[np.ndarray, dict[str, float]]:
    """Activity [kBq/mL] with named regions, a low-frequency field and partial volume."""
    white = rng.uniform(*ranges.white_activity)
    grey = white * rng.uniform(*ranges.grey_to_white)
    sd = rng.uniform(*ranges.regional_sd)
    pairs: dict[str, float] = {}
    level = np.zeros(256, np.float32)
    level[1:WHITE] = grey
    for label, name in sorted(anatomy.regions.items()):
        shared = pairs.setdefault(name.split(" ", 1)[-1], rng.normal())
        level[label] = grey * max(0.4, 1 + sd * (shared + rng.normal()) / np.sqrt(2))
    level[WHITE], level[CSF], level[0] = white, 0.05 * white, 0
    fine = _to_voxels(level[labels])
    shape = fine.shape
    fine *= np.exp(rng.uniform(*ranges.field_sd) * smooth_field(rng, shape, 30.0))
    scalp = white * rng.uniform(*ranges.scalp_to_white)
    fine += fractions["scalp"] * scalp * np.exp(0.3 * smooth_field(rng, shape, 20.0)) + fractions["bone"] * 0.2 * scalp
    return fine + fractions["outer_csf"] * 0.05 * white, {"grey": float(grey), "white": float(white)}


def _attenuation(fractions: dict[str, np.ndarray], brain: np.ndarray) -> np.ndarray:
    """511 keV: soft tissue 0.0975 / cm, bone 0.13 / cm."""
    soft = np.clip(brain + fractions["outer_csf"] + fractions["scalp"], 0, 1)
    return (0.0975 * soft + 0.13 * fractions["bone"]).astype(np.float32)


def _add_lesions(mask, uptake, mr, levels, ranges, rng):
    """PET-only, MR-only and matched lesions, half of them hot, at places that keep clear of each other; painted into
    `uptake` and `mr`. Returns their labels and table."""
    lesions, table, taken = np.zeros(mask.shape, np.uint8), [], []
    places = np.argwhere(mask)
    volume_ml = len(places) * VOXEL**3 / 1000
    counts = [rng.poisson(volume_ml / 100 * rng.uniform(*ranges.lesions_per_100ml)) for _ in LESION_KINDS]
    for kind in rng.permutation(np.repeat(LESION_KINDS, counts))[:80] if len(places) else []:
        radius = rng.uniform(*ranges.lesion_radius)
        centre = free_place(places, taken, radius, rng)
        if centre is None:
            continue
        hot = bool(rng.random() < 0.5)
        near, inside = ellipsoid(mask.shape, centre, radius, rng.uniform(0.85, 1.18, 3))
        if kind != "mr-only":
            value = _lesion_uptake(hot, levels, ranges, rng)
            uptake[near] += inside * (value - uptake[near])
        if kind != "pet-only":
            low, high = ranges.mr_lesion
            factor = rng.uniform(1.15, high) if hot else rng.uniform(low, 0.85)
            mr[near] += inside * (factor - 1) * mr[near]
        core = inside > 0.5
        if core.any():
            lesions[near][core] = len(table) + 1
            table.append(Lesion(len(table) + 1, str(kind), hot, float(radius)))
            taken.append((centre, radius))
    return lesions, tuple(table)


def free_place(places, taken, radius, rng) -> np.ndarray | None:
    """A voxel at which a lesion keeps 6 mm from all others; None if twenty draws find none."""
    for _ in range(20):
        centre = places[rng.integers(len(places))]
        if all(np.linalg.norm(centre - other) * VOXEL > radius + gap + 6 for other, gap in taken):
            return centre
    return None


def ellipsoid(shape, centre, radius, stretch) -> tuple[tuple[slice, ...], np.ndarray]:
    """Where a lesion lies, and how much of each voxel there it fills, [0, 1]."""
    reach = int(np.ceil(radius * 1.2 / VOXEL)) + 2
    near = tuple(slice(max(0, c - reach), min(n, c + reach + 1)) for c, n in zip(centre, shape, strict=True))
    grid = np.meshgrid(*(np.arange(s.start, s.stop, dtype=np.float32) for s in near), indexing="ij")
    distance = np.sqrt(sum((stretch[a] * (grid[a] - centre[a]) * VOXEL) ** 2 for a in range(3)))
    return near, np.clip((radius - distance) / VOXEL + 0.5, 0, 1)


def _lesion_uptake(hot, levels, ranges, rng) -> float:
    """Above the tissue that takes up more, or below the one that takes up less: for an amyloid tracer that is not grey
    matter but white."""
    if hot:
        return max(levels.values()) * rng.uniform(*ranges.hot_to_grey)
    return min(levels.values()) * rng.uniform(*ranges.cold_to_white)


def _mr_signal(anatomy, points, fractions, brain, ranges, rng) -> np.ndarray:
    """Noise-free MR signal: tissue signals with partial volume and some texture, or the anatomy's own T1 where it has
    one."""
    own = anatomy.t1 is not None and ranges.mr_contrast in ("any", "t1") and not ranges.atrophy
    if own and rng.random() < 0.5:
        return _to_voxels(_nearest(anatomy.t1, points).astype(np.float32))
    draw = rng.random() if ranges.mr_contrast == "any" else {"t1": 0.0, "t2": 0.8}[ranges.mr_contrast]
    base = T1_SIGNAL if draw < 0.7 else T2_SIGNAL
    signal = {name: value * rng.uniform(0.85, 1.15) for name, value in base.items()}
    if draw > 0.9:  # an arbitrary contrast, so that no tissue order can be relied on
        signal = {name: rng.uniform(20, 250) for name in base}
    shape = brain.shape
    texture = {name: np.exp(0.04 * smooth_field(rng, shape, 12.0)) for name in ("grey", "white")}
    image = sum(fractions[name] * signal[name] * texture.get(name, 1) for name in ("grey", "white", "csf"))
    return (
        image
        + fractions["outer_csf"] * signal["csf"]
        + fractions["bone"] * signal["bone"]
        + fractions["scalp"] * signal["scalp"]
    )


def _mr_image(signal: np.ndarray, brain: np.ndarray, ranges: Randomisation, rng: np.random.Generator) -> np.ndarray:
    """Resolution, residual misregistration, bias field, Rician noise, and sometimes a stripped skull."""
    image = ndimage.gaussian_filter(signal, rng.uniform(*ranges.mr_blur) * FWHM_TO_SD / VOXEL)
    image = ndimage.shift(image, rng.normal(0, ranges.mr_offset, 3) / VOXEL, order=1, mode="nearest")
    image *= np.exp(rng.uniform(*ranges.mr_bias_sd) * smooth_field(rng, image.shape, 80.0))
    sd = rng.uniform(*ranges.mr_noise) * 150
    real, imaginary = rng.normal(0, sd, (2, *image.shape))
    image = np.hypot(image + real, imaginary)  # Rician
    if rng.random() < ranges.skull_stripped:
        image *= ndimage.binary_dilation(brain > 0.5, iterations=int(rng.integers(1, 3)))
    return image.astype(np.float32)
