"""MFdiff, the three ideas together: fusion, conditional diffusion of the residual, restoration of a whole scan.

    F, coarse = fusion(LPET, MR)
    x0        = (SPET - coarse) / s                        what the diffusion generates; s = residual_sd(dose)
    loss      = |coarse - SPET|^2 / s^2 + |D(x_t, t, LPET, F, dose) - v|^2
    sample    = coarse + s * sampler(noise), warm-started by noising "no residual" to t0
    mean, SD  = over K samples in antithetic pairs (noise and -noise), every second pair of the head seen mirrored

All inside the LPET's own scale (`ActivityScale`); lesions weigh more in both losses, because they are rare.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from .config import Profile
from .denoiser import ConditionalUNet
from .diffusion import NoiseSchedule, diffuse, sample, velocity
from .files import refuse_to_write, whole_file
from .fusion import FUSIONS, Fused
from .scan import Scan
from .view import FIDELITY_SD, ModelView

STEPS, START = 6, 0.9  # sampler steps and warm start, chosen on validation patients (the start: by their spread)
FIT_WEIGHT = 0.1  # of the loss of `fit` beside that of the images
FIDELITY = 0.0  # default pull towards the measured LPET (chosen likewise)


class MFdiff(nn.Module):
    """Fusion module and conditional denoiser under one loss. `card` says where the weights come from.

    fusion: a name in `FUSIONS`, "gated" or one of the baselines. Empty denoiser_widths leave the denoiser out: what
    remains is a regression U-Net whose samples all equal its coarse estimate.
    """

    def __init__(
        self, fusion_widths: tuple[int, ...], denoiser_widths: tuple[int, ...], context: int = 3, fusion: str = "gated"
    ):
        super().__init__()
        self.settings = {
            "fusion_widths": list(fusion_widths),
            "denoiser_widths": list(denoiser_widths),
            "context": context,
            "fusion": fusion,
        }
        self.fusion = FUSIONS[fusion](tuple(fusion_widths), context)
        self.denoiser = ConditionalUNet(tuple(denoiser_widths), fusion_widths[0]) if denoiser_widths else None
        self.schedule = NoiseSchedule()
        self.card: dict[str, Any] = {}

    @classmethod
    def from_profile(cls, profile: Profile) -> MFdiff:
        """An untrained model of the profile's size, its initial weights drawn from the profile's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(profile.seed)
            return cls(profile.fusion_widths, profile.denoiser_widths, profile.context, profile.fusion)

    @property
    def context(self) -> int:
        """Slices of each modality that it sees round the one to restore."""
        return self.fusion.context

    @property
    def n_parameters(self) -> int:
        """How many weights it has."""
        return sum(p.numel() for p in self.parameters())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: which weights these are, whatever file they came from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # --- learning ------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The losses of stage 1. batch: see `SliceDataset.batch`; t: (B,); noise: (B, 1, H, W). Returns scalars
        "coarse", with the gated fusion "fit" and with a denoiser "diffusion"."""
        fused: Fused = self.fusion(batch["lpet"], batch["mr"], batch["dose"])
        residual = (batch["spet"] - fused.coarse) / residual_sd(batch["dose"])
        weight = batch["weight"] / batch["weight"].mean()
        losses = {"coarse": (weight * residual**2).mean()}
        if "fits" in batch and self.settings["fusion"] == "gated":
            losses["fit"] = FIT_WEIGHT * fit_loss(fused.fit, batch["fits"])
        if self.denoiser is not None:
            x0 = residual.detach()  # the coarse estimate learns from its own loss alone
            v = self._denoise(diffuse(x0, noise, t, self.schedule), t, batch["lpet"], fused.feature, batch["dose"])
            losses["diffusion"] = (weight * (v - velocity(x0, noise, t, self.schedule)) ** 2).mean()
        return losses

    def _denoise(self, xt: Tensor, t: Tensor, lpet: Tensor, feature: Tensor, dose: Tensor) -> Tensor:
        assert self.denoiser is not None
        middle = lpet[:, lpet.shape[1] // 2, None]  # (B, 1, H, W)
        return self.denoiser(xt, t / self.schedule.length, middle, feature, dose)

    # --- restoring -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore_slices(
        self,
        lpet: Tensor,
        mr: Tensor,
        dose: Tensor,
        noise: Tensor,
        steps: int = STEPS,
        start: float = START,
        method: str = "dpm++",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Fused]:
        """Samples of scaled slices. lpet, mr: (B, context, H, W); dose: (B,); noise: (B, K, H, W), one map a sample;
        generator: of the fresh noise of "ddpm".

        Returns samples (B, K, H, W) and what the fusion module made of the slices.
        """
        fused: Fused = self.fusion(lpet, mr, dose)
        k = noise.shape[1]
        if self.denoiser is None:
            return repeat(fused.coarse, "b 1 h w -> b k h w", k=k), fused
        lpets, features, doses = (repeat(x, "b ... -> (b k) ...", k=k) for x in (lpet, fused.feature, dose))
        residual = sample(
            lambda xt, t: self._denoise(xt, t, lpets, features, doses),
            rearrange(noise, "b k h w -> (b k) 1 h w"),
            self.schedule,
            steps,
            start,
            method,
            generator=generator,
        )
        return fused.coarse + residual_sd(dose) * rearrange(residual, "(b k) 1 h w -> b k h w", k=k), fused

    def restore(
        self,
        scan: Scan,
        n_samples: int = 8,
        *,
        steps: int = STEPS,
        start: float = START,
        method: str = "dpm++",
        fidelity: float = FIDELITY,
        seed: int = 0,
        progress: Callable[[Any], Any] = lambda slices: slices,
    ) -> Restoration:
        """Restore the standard-dose image of a scan; without `scan.mr`, from PET alone.

        n_samples: K samples for mean and SD; steps, start, method: see `diffusion.sample`. fidelity in [0, 1]: how much
        of what the measured LPET says beyond noise is put back (0: the model alone; higher: more lesion contrast, more
        noise). seed: fixes the samples, slice by slice, whatever the batch. progress: wraps the iterable of slices,
        e.g. `tqdm`. Memory does not grow with the slices worked on. Raises ValueError for n_samples < 1, fidelity
        outside [0, 1], steps that the sampler cannot take, or a scan whose dose reduction is not known.
        """
        if n_samples < 1:
            raise ValueError(f"n_samples: expected at least 1, found {n_samples}")
        if not 0 <= fidelity <= 1:
            raise ValueError(f"fidelity: expected 0 to 1, found {fidelity}")
        self.schedule.times(steps, start)  # refuse before any work
        view = ModelView(scan, self.context)
        self._warn_of_repeated_slices(view)
        sampler = {"steps": steps, "start": start, "method": method}
        coarse, gate = np.empty_like(view.lpet), np.empty_like(view.lpet)
        samples = np.empty((n_samples, *view.shape), np.float16)
        self.eval()
        for z in progress(range(view.shape[2])):
            samples[..., z], coarse[..., z], gate[..., z] = self._restore_slice(view, z, n_samples, seed, sampler)
        mean = samples.mean(0, dtype=np.float32)
        correction = fidelity * measured_beyond_noise(view.lpet - mean)
        return Restoration(
            mean=view.restored(mean + correction),
            std=view.back(samples.std(0, dtype=np.float32) * view.scale.value),
            coarse=view.restored(coarse + correction),
            gate=view.back(gate),
            samples=Samples(samples, correction, view),
            unit=scan.unit,
            settings={"n_samples": n_samples, **sampler, "fidelity": fidelity, "seed": seed},
        )

    def _restore_slice(
        self, view: ModelView, z: int, n_samples: int, seed: int, sampler: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One slice: samples (K, x, y), coarse estimate, the mean of the views, and gate (x, y)."""
        device = next(self.parameters()).device
        seen = {key: torch.from_numpy(value).to(device) for key, value in view.slices(np.array([z])).items()}
        noise = paired_noise(n_samples, tuple(seen["lpet"].shape[-2:]), [seed, z]).to(device)
        fresh = torch.Generator(device).manual_seed(int(np.random.default_rng([seed, z, 1]).integers(2**62)))
        # The second, fourth, ... pair of samples sees left and right exchanged: what depends on the side averages out.
        mirrored = torch.arange(n_samples) // 2 % 2 == 1
        residuals, coarse, gates = torch.empty_like(noise), [], []
        for flip in [False, True] if mirrored.any() else [False]:
            turn = (lambda image: image.flip(-2)) if flip else (lambda image: image)
            lpet, mr, maps = turn(seen["lpet"]), turn(seen["mr"]), noise[mirrored == flip][None]
            drawn, fused = self.restore_slices(lpet, mr, seen["dose"], maps, **sampler, generator=fresh)
            residuals[mirrored == flip] = turn(drawn[0] - fused.coarse[0])
            coarse.append(turn(fused.coarse[0, 0]))
            gates.append(nn.functional.interpolate(fused.gate, scale_factor=2)[0, 0])
        middle = torch.stack(coarse).mean(0)
        first, second, third = (view.cut(x.cpu().numpy()) for x in (middle + residuals, middle, gates[0]))
        return first, second, third

    def _warn_of_repeated_slices(self, view: ModelView) -> None:
        """Weights from before training knew thin slabs take the noise of a single, repeated slice for signal."""
        depth = view.shape[2]
        if depth == 1 < self.context and not self.card.get("profile", {}).get("thin"):
            warnings.warn(
                f"{view.scan.name}: expected at least {self.context} slices, found {depth}; these weights never saw "
                "a slice repeated in its neighbours' place and restore one about as well as a Gaussian filter, 2 to 4 "
                "dB below the same slice of a volume: give the neighbouring slices too",
                stacklevel=3,
            )


def fit_loss(fit: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of `Fused.fit` (B,); truth: (B,) 1 the right MR, 0 a wrong one, negative where neither can be
    said."""
    fit = fit.clamp(1e-4, 1 - 1e-4)
    entropy = -(truth * fit.log() + (1 - truth) * (1 - fit).log())
    return torch.where(truth >= 0, entropy, 0).mean()


def residual_sd(dose_reduction: Tensor) -> Tensor:
    """Rough SD of SPET - coarse in scaled activity at dose-reduction factors (B,) -> (B, 1, 1, 1): makes x0 of order 1,
    and keeps the noisiest doses from ruling the loss."""
    return 0.2 * (dose_reduction[:, None, None, None] / 20) ** 0.25


def paired_noise(n_samples: int, shape: tuple[int, ...], seed: list[int]) -> Tensor:
    """(K, H, W) normal noise in antithetic pairs, noise and -noise: their mean converges to the posterior mean much
    faster than K free draws."""
    half = np.random.default_rng(seed).standard_normal(((n_samples + 1) // 2, *shape), dtype=np.float32)
    return torch.from_numpy(rearrange(np.stack([half, -half]), "sign k h w -> (k sign) h w")[:n_samples].copy())


def measured_beyond_noise(residual: np.ndarray) -> np.ndarray:
    """The part of LPET - estimate (X, Y, Z) that is too smooth to be noise: a Gaussian of FIDELITY_SD voxels."""
    sd = [FIDELITY_SD if n > 1 else 0 for n in residual.shape]
    return ndimage.gaussian_filter(residual, sd, mode="nearest")


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Any]):
    """The K samples of a restoration, each brought to the scan's grid, kind and unit when it is asked for."""

    maps: np.ndarray  # (K, x, y, z) float16, scaled activity on the working grid
    correction: np.ndarray  # (x, y, z), what `fidelity` puts back
    view: ModelView

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.view.restored(self.maps[index].astype(np.float32) + self.correction)


@dataclass(frozen=True, eq=False)
class Restoration:
    """What came out, in the kind, shape and unit of the scan's LPET. mean, std: of the K samples; coarse: the fusion
    head's estimate; gate: how much MR was let in, [0, 1]; samples: single samples, made when asked for."""

    mean: Any
    std: Any
    coarse: Any
    gate: Any
    samples: Samples
    unit: str
    settings: dict[str, Any]


def save_model(model: MFdiff, path: str | Path, card: dict[str, Any], force: bool = True, half: bool = False) -> Path:
    """Write weights (safetensors, the card inside) and the card again as JSON beside it. half: in half precision, as
    the shipped ones are. Without `force` neither file is replaced."""
    path = Path(path)
    refuse_to_write(path.with_suffix(".json"), force)
    card = {**card, "model": model.settings, "parameters": model.n_parameters}
    kind = torch.float16 if half else torch.float32
    tensors = {name: value.detach().cpu().to(kind).contiguous() for name, value in model.state_dict().items()}
    with whole_file(path, force) as partial:
        save_file(tensors, partial, metadata={"card": json.dumps(card)})
    with whole_file(path.with_suffix(".json"), force) as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return path


def load_model(path: str | Path, device: str = "auto") -> MFdiff:
    """A model from a file of `save_model`, in float32. Nothing is unpickled. Raises OSError if it is missing,
    ValueError if it is not such a file."""
    if not Path(path).is_file():
        raise OSError(
            f"{path}: expected a weights file, found nothing; "
            "check the path, or leave out --weights to use the shipped ones"
        )
    try:
        with safe_open(path, "pt") as stored:
            card = json.loads((stored.metadata() or {})["card"])
            tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
        model = MFdiff(**card["model"])
        model.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"{path}: expected weights saved by this package, found something else or a damaged file ({reason}); "
            "fetch it again"
        ) from None
    model.card = card
    return model.to(pick_device(device)).eval()


def load_pretrained(device: str = "auto") -> MFdiff:
    """The model that ships with the package (stage 1, `cpu` profile)."""
    return load_model(str(files("mfdiff_lite") / "weights" / "stage1.safetensors"), device)


def pick_device(device: str = "auto") -> torch.device:
    """ "auto": the GPU if there is one. Raises ValueError for a device that this machine does not have."""
    if device == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected one that this machine has, found {device!r} ({str(error).splitlines()[0][:80]}); "
            "try --device auto"
        ) from None
