"""The scanner's reconstruction in PyTorch: for a GPU, and for stacks of slices on a CPU.

The same mathematics as `Scanner.reconstruct`, which stays the reference: all slices of a stack in one sparse product.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from mfdiff_lite.config import FWHM_TO_SD
from mfdiff_lite.scanner import Scanner, Sinogram, blur_matrix, field_of_view, subset_matrix, subset_order


def reconstruct(scanner: Scanner, sinogram: Sinogram, device: str | torch.device = "cpu") -> np.ndarray:
    """`Scanner.reconstruct` on a device: activity [kBq/mL], (X, Y, N), equal to it but for rounding."""
    side, slices = scanner.matrix, sinogram.counts.shape[-1]

    def lines(stack: np.ndarray, subset: slice) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(stack[subset], np.float32)).to(device).reshape(-1, slices)

    def blurred(image: Tensor) -> Tensor:  # (X Y, N), along both axes
        if not scanner.model_psf:
            return image
        blur = _blur(side, scanner.psf_fwhm / scanner.pixel_size, str(device))
        along_x = (blur @ image.reshape(side, -1)).reshape(side, side, slices)
        return torch.matmul(blur, along_x).reshape(-1, slices)

    subsets = [slice(first, None, scanner.subsets) for first in subset_order(scanner.subsets)]
    data = [
        [lines(stack, s) for stack in (sinogram.sensitivity, sinogram.counts, sinogram.background)] for s in subsets
    ]
    systems = [_system(side, scanner.pixel_size, scanner.angles, s.start, s.step, str(device)) for s in subsets]
    norms = [blurred(back @ gain) for (_, back), (gain, _, _) in zip(systems, data, strict=True)]
    floor = 1e-6 * max(float(norm.max()) for norm in norms)
    image = torch.from_numpy(field_of_view(side)).to(device).reshape(-1, 1).repeat(1, slices)
    for _ in range(scanner.iterations):
        for (forward, back), (gain, counts, background), norm in zip(systems, data, norms, strict=True):
            expected = gain * (forward @ blurred(image)) + background
            image *= blurred(back @ (gain * counts / expected.clamp(min=1e-9))) / norm.clamp(min=floor)
    found = image.reshape(side, side, slices).cpu().numpy()
    if scanner.post_filter:
        found = ndimage.gaussian_filter(found, scanner.post_filter * FWHM_TO_SD / scanner.pixel_size, mode="nearest")
    return found


@lru_cache(maxsize=64)
def _blur(side: int, fwhm: float, device: str) -> Tensor:
    return torch.from_numpy(blur_matrix(side, fwhm).toarray()).to(device)


@lru_cache(maxsize=256)
def _system(side: int, pixel: float, angles: int, first: int, step: int, device: str) -> tuple[Tensor, Tensor]:
    """A subset's rows of the system matrix, and their transpose in rows of its own: products by rows are fast."""
    rows = subset_matrix(side, pixel, angles, first, step)
    forward, back = (
        torch.sparse_csr_tensor(
            torch.from_numpy(one.indptr),
            torch.from_numpy(one.indices),
            torch.from_numpy(one.data),
            one.shape,
            check_invariants=False,
        ).to(device)
        for one in (rows, rows.T.tocsr())
    )
    return forward, back
