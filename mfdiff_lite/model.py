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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from .checks import check_scan, speak
from .config import Profile
from .denoiser import ConditionalUNet
from .diffusion import NoiseSchedule, diffuse, sample, velocity
from .files import refuse_to_write, whole_file
from .fusion import FUSIONS, Fused
from .scan import Scan
from .view import FIDELITY_SD, ModelView

STEPS, START = 6, 0.9  # sampler steps and warm start, chosen on validation patients (the start: by their spread)
MOST_SAMPLES = 1000  # more change the third digit of mean and SD, and nothing else
MEMORY = 8e9  # bytes that the samples of a scan may take
FIT_WEIGHT = 0.1  # of the loss of `fit` beside that of the images
FIDELITY = 0.0  # default pull towards the measured LPET (chosen likewise)
BATCH = 8  # images that a network works on at a time in restoring: more of them do not pay on a CPU
# What a restoration costs: "fast" one pass of the fusion module, "standard" 8 samples, "full" 32 in single precision.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"n_samples": 0},
    "standard": {"n_samples": 8},
    "full": {"n_samples": 32, "precision": "float32"},
}


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
        return fingerprint(self.state_dict())

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
        return self.denoiser(xt, t / self.schedule.length, self._middle(lpet), feature, dose)

    @staticmethod
    def _middle(slices: Tensor) -> Tensor:
        return slices[:, slices.shape[1] // 2, None]  # (B, 1, H, W)

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
        generator: of the fresh noise of "ddpm". K = 0 draws none.

        Returns samples (B, K, H, W) and what the fusion module made of the slices.
        """
        fused: Fused = self.fusion(lpet, mr, dose)
        k = noise.shape[1]
        if self.denoiser is None or k == 0:
            return fused.coarse.expand(-1, k, -1, -1), fused
        denoise = self.denoiser.given(self._middle(lpet), fused.feature, dose)
        residual = sample(
            lambda xt, t: denoise(xt, t / self.schedule.length),
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
        precision: str = "auto",
        progress: Callable[[Any], Any] = lambda slices: slices,
    ) -> Restoration:
        """Restore the standard-dose image of a scan; without `scan.mr`, from PET alone.

        n_samples: K samples for mean and SD; 0 draws none, and the mean is the coarse estimate: one pass of the fusion
        module, many times as fast (see `QUALITIES`). steps, start, method: see `diffusion.sample`. fidelity in [0, 1]:
        how much of what the measured LPET says beyond noise is put back (0: the model alone; higher: more lesion
        contrast, more noise). seed: fixes the samples, slice by slice, whatever the batch. precision: "float32", the
        same on all machines, or "auto": bfloat16 where the hardware multiplies it faster, which moves the result by
        about a thousandth of the brain's mean. progress: wraps the iterable of slices, e.g. `tqdm`. Memory does not
        grow with the slices worked on. Raises ValueError for n_samples that are out of range or do not fit into memory,
        fidelity outside [0, 1], another precision, steps that the sampler cannot take, a scan whose dose reduction is
        not known, and weights that give no finite result.
        """
        _refuse_settings(n_samples, fidelity, precision)
        self.schedule.times(steps, start)  # refuse before any work
        view = ModelView(scan, self.context)
        _refuse_memory(n_samples, view)
        self._warn_of_repeated_slices(view)
        if scan.sources:  # a simulated scan is what it says it is
            speak(check_scan(scan), force=True)
        sampler = {"steps": steps, "start": start, "method": method}
        coarse, gate = np.empty_like(view.lpet), np.empty_like(view.lpet)
        fit = np.empty(view.shape[2], np.float32)
        samples = np.empty((n_samples, *view.shape), np.float16)
        self.eval()
        device = next(self.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "auto" and native_bfloat16(device)):
            slices = self._restored_slices(view, n_samples, seed, sampler)
            for z, images in zip(progress(range(view.shape[2])), slices, strict=False):
                samples[..., z], coarse[..., z], gate[..., z], fit[z] = images
        mean = samples.mean(0, dtype=np.float32) if n_samples else coarse
        if not (np.isfinite(mean).all() and np.isfinite(coarse).all()):
            raise ValueError(
                f"{scan.name}: expected a finite result, found NaN or infinite voxels; check the weights: these may be "
                "damaged, or not trained to the end"
            )
        correction = fidelity * measured_beyond_noise(view.lpet - mean)
        return Restoration(
            mean=view.restored(mean + correction),
            std=view.back(sample_sd(samples) * view.scale.value) if n_samples else None,
            coarse=view.restored(coarse + correction),
            gate=view.back(gate),
            fit=None if scan.mr is None else float(np.median(fit)),
            samples=Samples(samples, correction, view),
            unit=scan.unit,
            settings={"n_samples": n_samples, **sampler, "fidelity": fidelity, "seed": seed},
        )

    def _restored_slices(
        self, view: ModelView, n_samples: int, seed: int, sampler: dict[str, Any]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
        """Slice after slice, worked on in batches: samples (K, x, y), coarse estimate, the mean of the views, gate
        (x, y) and fit."""
        device = next(self.parameters()).device
        # The second, fourth, ... pair of samples sees left and right exchanged: what depends on the side averages out.
        mirrored = torch.arange(n_samples) // 2 % 2 == 1
        views = [False, True] if mirrored.any() else [False]
        # Fresh noise ("ddpm") comes from a slice's own generator, so that it is the same whatever the batch.
        size = 1 if sampler["method"] == "ddpm" else max(1, BATCH * len(views) // max(1, n_samples))
        for first in range(0, view.shape[2], size):
            z = np.arange(first, min(first + size, view.shape[2]))
            seen = {key: torch.from_numpy(value).to(device) for key, value in view.slices(z).items()}
            shape = tuple(seen["lpet"].shape[-2:])
            noise = torch.stack([paired_noise(n_samples, shape, [seed, int(one)]) for one in z]).to(device)
            fresh = torch.Generator(device).manual_seed(int(np.random.default_rng([seed, first, 1]).integers(2**62)))
            residuals, coarse, gates = torch.empty_like(noise), [], []
            for flip in views:
                turn = (lambda image: image.flip(-2)) if flip else (lambda image: image)
                lpet, mr, maps = turn(seen["lpet"]), turn(seen["mr"]), noise[:, mirrored == flip]
                drawn, fused = self.restore_slices(lpet, mr, seen["dose"], maps, **sampler, generator=fresh)
                residuals[:, mirrored == flip] = turn(drawn - fused.coarse)
                coarse.append(turn(fused.coarse[:, 0]))
                gates.append(nn.functional.interpolate(fused.gate.float(), scale_factor=2)[:, 0])
            middle = torch.stack(coarse).mean(0)
            images = (middle[:, None] + residuals, middle, gates[0])
            yield from zip(*(view.cut(image.cpu().numpy()) for image in images), fused.fit.tolist(), strict=True)

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


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and values, as float32."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _refuse_settings(n_samples: int, fidelity: float, precision: str) -> None:
    if not 0 <= n_samples <= MOST_SAMPLES:
        raise ValueError(f"n_samples: expected 0 to {MOST_SAMPLES}, found {n_samples}")
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity: expected 0 to 1, found {fidelity}")
    if precision not in ("auto", "float32"):
        raise ValueError(f"precision: expected 'auto' or 'float32', found {precision!r}")


def _refuse_memory(n_samples: int, view: ModelView) -> None:
    if (needed := 2 * n_samples * view.lpet.size) > MEMORY:
        raise ValueError(
            f"n_samples: expected samples of at most {MEMORY / 1e9:g} GB together, found {n_samples} of "
            f"{view.shape} voxels, {needed / 1e9:.0f} GB; take fewer, or crop the scan to the head"
        )


def fit_loss(fit: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of `Fused.fit` (B,); truth: (B,) 1 the right MR, 0 a wrong one, negative where neither can
    be said."""
    fit = fit.float().clamp(1e-4, 1 - 1e-4)  # 1 - 1e-4 is 1 in bfloat16
    entropy = -(truth * fit.log() + (1 - truth) * (1 - fit).log())
    return torch.where(truth >= 0, entropy, 0).mean()


def residual_sd(dose_reduction: Tensor) -> Tensor:
    """Rough SD of SPET - coarse in scaled activity at dose-reduction factors (B,) -> (B, 1, 1, 1): makes x0 of order 1,
    and keeps the noisiest doses from ruling the loss."""
    return 0.2 * (dose_reduction[:, None, None, None] / 20) ** 0.25


def native_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 faster than float32: a GPU since 2020, a CPU with matrix units (AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    return device.type == "cpu" and bool(matrix_units())


def paired_noise(n_samples: int, shape: tuple[int, ...], seed: list[int]) -> Tensor:
    """(K, H, W) normal noise in antithetic pairs, noise and -noise: their mean converges to the posterior mean much
    faster than K free draws."""
    half = np.random.default_rng(seed).standard_normal(((n_samples + 1) // 2, *shape), dtype=np.float32)
    return torch.from_numpy(rearrange(np.stack([half, -half]), "sign k h w -> (k sign) h w")[:n_samples].copy())


def sample_sd(samples: np.ndarray) -> np.ndarray:
    """SD over the K samples, (K, ...) -> (...), with K - 1 in the denominator; zero where one sample says nothing."""
    return samples.std(0, dtype=np.float32, ddof=1) if len(samples) > 1 else np.zeros(samples.shape[1:], np.float32)


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
    """What came out, in the kind, shape and unit of the scan's LPET. mean, std: of the K samples; without samples the
    mean is the coarse estimate and std is None. coarse: the fusion head's estimate; gate: how much MR was let
    in, [0, 1]; fit: whether the MR shows the PET's head, the network's own view in [0, 1], the median over the slices,
    None without MR; samples: single samples, made when asked for."""

    mean: Any
    std: Any
    coarse: Any
    gate: Any
    fit: float | None
    samples: Samples
    unit: str
    settings: dict[str, Any]


def save_model(model: MFdiff, path: str | Path, card: dict[str, Any], force: bool = True, half: bool = False) -> Path:
    """Write weights (safetensors, the card inside) and the card again as JSON beside it. half: in half precision, as
    the shipped ones are. Without `force` neither file is replaced."""
    path = Path(path)
    refuse_to_write(path.with_suffix(".json"), force)
    kind = torch.float16 if half else torch.float32
    tensors = {name: value.detach().cpu().to(kind).contiguous() for name, value in model.state_dict().items()}
    card = {**card, "model": model.settings, "parameters": model.n_parameters, "weights_sha256": fingerprint(tensors)}
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
        settings = card["model"]
        sizes = [*settings["fusion_widths"], *settings["denoiser_widths"], settings["context"]]
        if len(sizes) > len(tensors) or max(sizes) > max(n for value in tensors.values() for n in value.shape):
            raise ValueError("a card of a larger model than its weights")  # which must not fill the memory
        model = MFdiff(**settings)
        model.load_state_dict(tensors)
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise ValueError("weights that are NaN or infinite")
        if card.get("weights_sha256", model.fingerprint) != model.fingerprint:
            raise ValueError("other weights than its card says")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: expected weights saved by this package, found something else or a damaged file ({reason}); "
            "fetch it again"
        ) from None
    model.card = card
    return model.to(pick_device(device)).eval()


def load_pretrained(device: str = "auto") -> MFdiff:
    """The model that ships with the package (stage 1, `cpu` profile)."""
    return load_model(str(files("mfdiff_lite") / "weights" / "stage1.safetensors"), device)


def training_runs(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The cards of all training runs behind weights, the first run first: a run that began with other weights holds
    their card."""
    runs = [card]
    while "started_from" in runs[0]:
        runs.insert(0, runs[0]["started_from"]["card"])
    return runs


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
