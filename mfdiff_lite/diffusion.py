"""Denoising diffusion, and nothing of PET: schedule, forward process, targets, samplers.

Contract for the functions below. x0, x_t, noise, v: (B, ...) tensors of one shape. t: (B,) integer times, 0 .. T - 1,
and -1 for "clean". alpha_bar(t) is the share of signal *variance* left at t, alpha_bar(-1) = 1. A denoiser is any
callable (x_t, t) -> v.

    forward    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise          (Ho et al. 2020, eq. 4)
    target     v   = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0          (Salimans & Ho 2022, app. D)
    inverse    x0  = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v
               noise = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]


class NoiseSchedule:
    """Cosine schedule: alpha_bar(t) falls from 1 to 0 as cos^2 (Nichol & Dhariwal 2021, eq. 17, betas capped at
    0.999)."""

    def __init__(self, length: int = 1000):
        grid = torch.arange(length + 1, dtype=torch.float64) / length
        f = torch.cos((grid + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.length = length
        self._alpha_bar = torch.cat([torch.cumprod(1 - betas, 0), torch.ones(1)]).float()  # the last entry is t = -1

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_bar at times t (B,), shaped to broadcast over `like` (B, ...)."""
        return self._alpha_bar.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)

    def times(self, steps: int, start: float = 1.0) -> list[int]:
        """`steps` + 1 falling times from `start` (a share of T) to -1, evenly spaced and ending in "clean" ("trailing"
        spacing)."""
        if not (0 < start <= 1 and 1 <= steps <= start * self.length):
            raise ValueError(
                f"sampler: expected 1 to {int(start * self.length)} steps from a start in (0, 1], "
                f"found {steps} from {start}"
            )
        return [round(float(t)) - 1 for t in torch.linspace(start * self.length, 0, steps + 1, dtype=torch.float64)]


def diffuse(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The forward process: x_t."""
    a = schedule.alpha_bar(t, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The training target v."""
    a = schedule.alpha_bar(t, x0)
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def invert_velocity(xt: Tensor, v: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(x0, noise) that x_t and v belong to."""
    a = schedule.alpha_bar(t, xt)
    return a.sqrt() * xt - (1 - a).sqrt() * v, (1 - a).sqrt() * xt + a.sqrt() * v


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int = 6,
    start: float = 1.0,
    method: str = "dpm++",
    x0: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate x0 (B, ...) from `noise` (B, ...) in `steps` evaluations of the denoiser.

    method   sampler                                        random after the start
    "ddim"   Song et al. 2021, eq. 12 with sigma = 0        no
    "dpm++"  DPM-Solver++(2M), Lu et al. 2022, algorithm 2  no
    "ddpm"   ancestral, Song et al. 2021, eq. 16, eta = 1   yes (`generator`)

    `start` < 1 is the warm start: the process begins at that share of T with the guess `x0`, noised to there.
    """
    if method not in ("ddim", "dpm++", "ddpm"):
        raise ValueError(f"method: expected 'ddim', 'dpm++' or 'ddpm', found {method!r}")
    times = schedule.times(steps, start)
    stamp = [torch.full((noise.shape[0],), t, device=noise.device) for t in times]
    xt = diffuse(torch.zeros_like(noise) + x0, noise, stamp[0], schedule)
    previous: tuple[Tensor, Tensor] | None = None  # (x0 estimate, log-SNR) one step ago, for the multistep method
    for now, following in zip(stamp[:-1], stamp[1:], strict=True):
        # 1. What the denoiser thinks is signal, and what noise.
        guess, eps = invert_velocity(xt, denoise(xt, now), now, schedule)
        a, b = schedule.alpha_bar(now, xt), schedule.alpha_bar(following, xt)
        if method == "dpm++":
            # 2. Extrapolate the signal linearly in log-SNR; the last step has nothing to extrapolate to.
            snr = 0.5 * (torch.log(a) - torch.log1p(-a))
            direction = guess
            if previous is not None and times[-1] != int(following[0]):
                next_snr = 0.5 * (torch.log(b) - torch.log1p(-b))
                ratio = (snr - previous[1]) / (next_snr - snr)
                direction = guess + (guess - previous[0]) / (2 * ratio)
            previous = (guess, snr)
            # 3. Exact solution of the linear part of the ODE between the two times.
            ratio_sigma = ((1 - b) / (1 - a)).sqrt()
            xt = ratio_sigma * xt + (b.sqrt() - ratio_sigma * a.sqrt()) * direction
        else:
            # 2. Re-noise the signal to the next time: with the same noise (DDIM), or part of it fresh (DDPM); none at
            # the end.
            sigma = ((1 - b) / (1 - a) * (1 - a / b)).sqrt() if method == "ddpm" else torch.zeros_like(a)
            xt = b.sqrt() * guess + (1 - b - sigma**2).clamp(min=0).sqrt() * eps
            if method == "ddpm":
                xt = xt + sigma * torch.randn(xt.shape, generator=generator, device=xt.device, dtype=xt.dtype)
    return xt
