"""A second PET simulator, for evaluation only: the stand-in for scans of another site. Nothing is ever trained on it.

    scan = second_scan("ahba-15697", seed=3, tracer="amyloid", dose_reduction=20)

Independent of `mfdiff_lite`'s scanner: other object (second_head.py), projector, background, reconstruction and grid.
It is a simulation all the same, and shows nothing about in-vivo scans that only in-vivo scans can show.

    counts  ~ Poisson(gain * P(G(activity)) + scatter + randoms), from the 1 mm object
    G         Gaussian point-spread function, 3-D
    P         integrals over strips, exact for square pixels, a sparse matrix
    gain      scale * axial sensitivity * crystal efficiencies * attenuation
    image     OSEM without resolution model on 2.2 x 2.2 x 2.4 mm, then a 3-D Gaussian filter

Shapes: fine images (264, 264, Z) at 1 mm, PET images (X, Y, N), sinograms (angles, bins, N); all LPS. Units: kBq/mL,
1/cm, mm. World: mm RAS, 0 = isocentre = centre of the head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
from scipy import ndimage, sparse

from mfdiff_lite.anatomy import CSF, WHITE
from mfdiff_lite.scan import Scan
from second_head import FIELD, FWHM_TO_SIGMA, GUARD, SLICE, Head, mr_image, on_grid, second_head


@dataclass(frozen=True)
class Acquisition:
    """Counts, and the background and gain [counts per kBq/mL mm] that the reconstruction believes in: (angles, bins, N)
    each."""

    counts: np.ndarray
    background: np.ndarray
    gain: np.ndarray

    def thin(self, share: float, rng: np.random.Generator) -> Acquisition:
        """Keep each count with probability `share`."""
        counts = rng.binomial(self.counts.astype(np.int64), share).astype(np.float32)
        return Acquisition(counts, self.background * share, self.gain * share)

    def split(self, rng: np.random.Generator) -> tuple[Acquisition, Acquisition]:
        """Two halves; their counts add up."""
        half = self.thin(0.5, rng)
        return half, dataclasses.replace(half, counts=self.counts - half.counts)


@dataclass(frozen=True)
class SecondScanner:
    """A whole-body PET/MR scanner (ring, crystals, axial field and 4.3 mm PSF of the Biograph mMR, Delso 2011).

    counts_per_slice: prompts of the standard dose, mean over the slices; scatter, randoms: shares of the prompts;
    scatter_error: relative error of the scatter estimate; efficiency_sd, normalisation_error: SD of a line's
    sensitivity and of what the reconstruction knows of it; post_filter [mm FWHM, 3-D], 0 = none.
    """

    counts_per_slice: float = 3e6
    psf_fwhm: float = 4.3
    scatter: float = 0.22
    randoms: float = 0.2
    scatter_error: float = 0.05
    efficiency_sd: float = 0.1
    normalisation_error: float = 0.02
    iterations: int = 3
    subsets: int = 16
    post_filter: float = 4.0
    matrix: int = 120
    bins: int = 120
    bin_width: float = 2.25
    angles: int = 144
    crystals: int = 448
    ring_radius: float = 328.0  # mm
    axial_field: float = 258.0  # mm

    @property
    def voxel(self) -> tuple[float, float, float]:
        return FIELD / self.matrix, FIELD / self.matrix, SLICE

    def _back(self, matrix: int, first: int = 0, step: int = 1) -> sparse.csr_matrix:
        return strip_matrix(matrix, FIELD / matrix, self.bins, self.bin_width, self.angles, first, step)

    def forward(self, image: np.ndarray, first: int = 0, step: int = 1) -> np.ndarray:
        """Mean line integrals [value * mm] over each bin: (X, X, N) -> (angles, bins, N), every `step`th angle."""
        lines = self._back(len(image), first, step).T @ image.reshape(-1, image.shape[-1])
        return lines.reshape(-1, self.bins, image.shape[-1])

    def adjoint(self, sinogram: np.ndarray, first: int = 0, step: int = 1) -> np.ndarray:
        """The transpose of `forward`: (angles, bins, N) -> (matrix, matrix, N)."""
        image = self._back(self.matrix, first, step) @ sinogram.reshape(-1, sinogram.shape[-1])
        return image.reshape(self.matrix, self.matrix, -1)

    def to_grid(self, fine: np.ndarray) -> np.ndarray:
        """Means of a fine image over the voxels of the PET grid."""
        plane = overlap(FIELD, self.matrix, FIELD / self.matrix)
        return np.einsum("xi,yj,ijn->xyn", plane, plane, _slices(fine), optimize=True)

    def acquire(self, head: Head, rng: np.random.Generator) -> Acquisition:
        """One scan at standard dose of (264, 264, Z) -> int(Z / SLICE) slices."""
        activity = _slices(ndimage.gaussian_filter(head.activity, self.psf_fwhm * FWHM_TO_SIGMA))
        heights = nib.affines.apply_affine(head.affine, [[0, 0, (head.activity.shape[2] - 1) / 2]])[0, 2]
        heights = heights + SLICE * (np.arange(activity.shape[2]) - (activity.shape[2] - 1) / 2)
        ends, crystal = self._ends(), np.exp(rng.normal(0, self.efficiency_sd / np.sqrt(2), self.crystals))
        axial = np.maximum(1 - np.abs(heights) / (self.axial_field / 2), 0.05)
        gain = axial * crystal[ends].prod(0)[..., None] * np.exp(-self.forward(_slices(head.attenuation)) / 10)
        trues = gain * self.forward(activity)
        scatter = self._scatter_shape(trues)
        randoms = axial * (crystal * self._singles(activity.mean(-1)))[ends].prod(0)[..., None]
        total = self.counts_per_slice * activity.shape[2]
        scale = total * (1 - self.scatter - self.randoms) / trues.sum()
        scatter *= total * self.scatter / scatter.sum()
        randoms *= total * self.randoms / randoms.sum()
        counts = rng.poisson(scale * trues + scatter + randoms)
        known = np.exp(rng.normal(0, self.normalisation_error / np.sqrt(2), self.crystals))[ends].prod(0)
        background = (1 + self.scatter_error) * scatter + randoms
        return Acquisition(*(a.astype(np.float32) for a in (counts, background, scale * known[..., None] * gain)))

    def _ends(self) -> np.ndarray:
        """(2, angles, bins): the two crystals of each line x cos + y sin = s."""
        angle, s = np.pi * np.arange(self.angles)[:, None] / self.angles, _centred(self.bins, self.bin_width)
        ends = np.stack([angle - np.arccos(s / self.ring_radius), angle + np.arccos(s / self.ring_radius)])
        return np.rint(ends / (2 * np.pi) * self.crystals).astype(int) % self.crystals

    def _singles(self, activity: np.ndarray) -> np.ndarray:
        """(crystals,): activity seen under the inverse square of the distance, absorption left out."""
        around = 2 * np.pi * np.arange(self.crystals)[:, None] / self.crystals
        x, y = (_centred(FIELD, 1.0)[::4][i] for i in np.indices(activity[::4, ::4].shape).reshape(2, -1))
        square = (x - self.ring_radius * np.cos(around)) ** 2 + (y - self.ring_radius * np.sin(around)) ** 2
        return (1 / square) @ activity[::4, ::4].ravel()

    def _scatter_shape(self, trues: np.ndarray) -> np.ndarray:
        """Trues spread by 40 mm SD across and 20 mm along the axis, and tilted by up to 25 %."""
        sigma = (0, 40 / self.bin_width, 20 / SLICE)
        spread = ndimage.gaussian_filter(trues, sigma, mode=("wrap", "constant", "nearest"))
        angle = np.pi * np.arange(self.angles)[:, None, None] / self.angles
        return spread * (1 + 0.25 * np.cos(angle - 0.6) * np.linspace(-1, 1, self.bins)[:, None])

    def reconstruct(self, data: Acquisition) -> np.ndarray:
        """OSEM (Hudson & Larkin 1994) and the 3-D post-filter: activity [kBq/mL], (matrix, matrix, N)."""
        order = [(7 * i) % self.subsets for i in range(self.subsets)]
        norms = [self.adjoint(data.gain[first :: self.subsets], first, self.subsets) for first in order]
        image = (sum(norms) > 0).astype(np.float32)
        for _ in range(self.iterations):
            for first, norm in zip(order, norms, strict=True):
                counts, background, gain = (a[first :: self.subsets] for a in (data.counts, data.background, data.gain))
                expected = gain * self.forward(image, first, self.subsets) + background
                update = self.adjoint(gain * counts / np.maximum(expected, 1e-9), first, self.subsets)
                image *= update / np.maximum(norm, 1e-6 * norm.max())
        sigma = [self.post_filter * FWHM_TO_SIGMA / v for v in self.voxel]
        return ndimage.gaussian_filter(image, sigma, mode="nearest") if self.post_filter else image

    def scan(self, head: Head, seed: int, dose_reduction: float = 20, halves: bool = False) -> Scan:
        """SPET, LPET thinned from its counts, the MR and the truth, without the GUARD slices."""
        rng = np.random.default_rng([seed, *head.name.encode()])
        standard = self.acquire(head, rng)
        low = standard.thin(1 / dose_reduction, rng)
        inner = (..., slice(GUARD, -GUARD))
        tissues, brain, lesions = (labels[inner] for labels in self._labels(head))
        affine = np.diag([-self.voxel[0], -self.voxel[1], SLICE, 1.0])
        centre = nib.affines.apply_affine(head.affine, (np.array(head.labels.shape) - 1) / 2)
        affine[:3, 3] = centre - affine[:3, :3] @ (np.array(brain.shape) - 1) / 2
        mr = mr_image(head, np.random.default_rng([seed, 1, *head.name.encode()]))
        return Scan(
            lpet=self.reconstruct(low)[inner],
            spet=self.reconstruct(standard)[inner],
            mr=on_grid(mr, brain.shape, affine),
            activity=self.to_grid(head.activity)[inner],
            mask=brain,
            tissues=tissues,
            lesions=lesions,
            lesion_table=tuple(one for one in head.lesion_table if (lesions == one.label).any()),
            halves=[self.reconstruct(half)[inner] for half in low.split(rng)] if halves else None,
            affine=affine,
            dose_reduction=dose_reduction,
            unit="kBq/mL",
            name=head.name,
        )

    def _labels(self, head: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """On the PET grid: 1 grey, 2 white, 3 CSF by majority; the brain, more than half grey and white; the lesions
        that fill more than half of a voxel."""
        tissues = (head.labels > 0) & (head.labels < WHITE), head.labels == WHITE, head.labels == CSF
        grey, white, csf = fractions = [self.to_grid(tissue) for tissue in tissues]
        lesions = np.zeros(grey.shape, np.uint8)
        for one in head.lesion_table:
            lesions[self.to_grid(head.lesions == one.label) > 0.5] = one.label
        return np.where(grey + white + csf > 0.5, np.argmax(fractions, 0) + 1, 0), grey + white > 0.5, lesions


def second_scan(
    anatomy: str,
    seed: int,
    tracer: str = "fdg",
    dose_reduction: float = 20,
    counts_per_slice: float = SecondScanner.counts_per_slice,
    post_filter: float = SecondScanner.post_filter,
    slices: int | None = 24,
    halves: bool = False,
) -> Scan:
    """A patient on the second scanner; the same arguments always give the same scan. Patient and standard-dose counts
    do not depend on the dose reduction or the filter. halves: as in `Scan`."""
    scanner = SecondScanner(counts_per_slice=counts_per_slice, post_filter=post_filter)
    return scanner.scan(second_head(anatomy, seed, tracer, slices), seed, dose_reduction, halves)


def _slices(fine: np.ndarray) -> np.ndarray:
    """Means over slices of SLICE mm: (X, Y, Z) at 1 mm -> (X, Y, N)."""
    return (fine @ overlap(fine.shape[2], int(fine.shape[2] / SLICE), SLICE).T).astype(np.float32)


def _centred(count: int, width: float) -> np.ndarray:
    return (np.arange(count) - (count - 1) / 2) * width


def overlap(fine: int, coarse: int, width: float) -> np.ndarray:
    """(coarse, fine) float32: how much of each coarse cell of `width` [mm] each fine cell of 1 mm fills, both rows of
    cells centred on the same point."""
    low, high = (np.subtract.outer(_centred(coarse, width), _centred(fine, 1.0)) + e * width / 2 for e in (-1, 1))
    return ((np.clip(high, -0.5, 0.5) - np.clip(low, -0.5, 0.5)) / width).astype(np.float32)


@lru_cache(maxsize=64)
def strip_matrix(
    matrix: int, pixel: float, bins: int, width: float, angles: int, first: int, step: int
) -> sparse.csr_matrix:
    """The back-projector (pixels, rays); its transpose integrates over strips, exactly for square pixels.

    Seen at an angle, a pixel is a trapezoid: a box of width pixel |cos| convolved with one of pixel |sin|. An entry is
    the trapezoid's area inside the bin over the bin's width. Pixels outside the circular field of view are empty.
    """
    x, y = np.meshgrid(_centred(matrix, pixel), _centred(matrix, pixel), indexing="ij")
    inside = np.hypot(x, y) <= matrix * pixel / 2
    turns = np.pi * np.arange(first, angles, step) / angles
    reach = int(np.ceil(np.sqrt(2) * pixel / width)) + 1  # bins that one pixel may touch
    rays = np.empty((inside.sum(), len(turns), reach), np.int32)
    areas = np.empty(rays.shape, np.float32)
    for index, turn in enumerate(turns):
        cos, sin = np.cos(turn), np.sin(turn)
        middle = x[inside] * cos + y[inside] * sin
        a, b = (max(pixel * abs(v), 1e-3 * pixel) for v in (cos, sin))
        lowest = np.floor((middle - (a + b) / 2) / width + bins / 2)
        edges = (lowest[:, None] + np.arange(reach + 1) - bins / 2) * width - middle[:, None]
        corners = [((a + b) / 2, 1), ((a - b) / 2, -1), ((b - a) / 2, -1), (-(a + b) / 2, 1)]
        below = sum(sign * np.maximum(edges + corner, 0) ** 2 for corner, sign in corners) / (2 * a * b)
        touched = lowest[:, None].astype(int) + np.arange(reach)
        areas[:, index] = np.diff(below) * ((touched >= 0) & (touched < bins)) * pixel**2 / width
        rays[:, index] = index * bins + np.clip(touched, 0, bins - 1)
    starts = np.concatenate([[0], np.cumsum(inside.ravel()) * len(turns) * reach])
    return sparse.csr_matrix((areas.ravel(), rays.ravel(), starts), shape=(matrix**2, len(turns) * bins))
