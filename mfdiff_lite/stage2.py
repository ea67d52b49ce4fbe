"""Stage 2, self-supervised learning of specific priors on a target that has no standard-dose image.

    objective  needs            loss of f, the coarse estimate (LPET, MR) -> PET
    "split"    count halves     |f(y + m n) - (y - n / m)|^2, n and -n             Pang et al. 2021
    "sure"     the LPET         |f(y) - y|^2 + 2 n' (f(y + e n) - f(y)) / e        SURE, Ramani et al. 2008
    "paired"   the SPET         the loss of stage 1                                the oracle, for comparison

y is the LPET, the mean of a and b, images of two halves of its counts; n = (a - b) / 2 is noise like the LPET's own.
With m = 1 "split" is Noise2Noise (Lehtinen et al. 2018): f(a) against b, whose noise is independent, so that b teaches
what the SPET would. But f(a) is a restoration of half the dose. A smaller m mixes the halves: the input comes near the
LPET (f is told its dose), the target gets noisier, and the two stay uncorrelated. Without halves "sure" measures the
covariance of the noise and draws n anew for every batch (`noise.NoiseModel`); where that cannot be trusted, the parent
is kept. That stage 2 is self-supervised on the target's own LPET and MR is our interpretation of the paper.

A mean over voxels smooths small lesions away, because few voxels are in one. So changes d that look like lesions, hot
and cold, are added to the LPET, and the network may not show less of them than its parent did: to "split" and "sure"
comes

    KEEP mean(max(0, R_parent - R)^2)          R = <f(y + d) - f(y), d> / <d, d>         the contrast kept, by slice

Trained are `specific_parameters` alone, on batches of which a share is stage 1's simulated data, against forgetting.
Every fifth slice of the target is held out; the weights with the lowest loss *there* are kept, the parent's included,
so no ground truth decides when to stop. A wrong estimate of the noise would deceive this loss too. So where the noise
was measured, weights are kept only if the grain of the LPET, its change from slice to slice, comes through as it does
with the parent: more of it is noise that is followed, hardly any is structure that is smoothed away. And only half of
the way to them is gone (WAY; Wortsman et al. 2022): what the estimate got wrong then costs less.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from .cohort import SliceDataset, make_cohort
from .config import SIDE, Adaptation, load_profile
from .diffusion import NoiseSchedule
from .loop import Plan, TrainingState, accelerator_on, refuse_to_mix, training_loop
from .model import MFdiff, residual_sd
from .noise import SLICES, NoiseModel
from .phantom import ellipsoid, free_place
from .scan import Scan
from .view import ModelView

WEIGHTS = "stage2.safetensors"
MIX = 0.5  # share of the halves' difference in the input of "split": 1 takes the halves themselves
PROBE = 0.05  # step e of the divergence, in SDs of the noise
MARGIN = 4  # voxels beyond the brain that are learned from
HELD_OUT = 5  # every so many slices one is held out
KEEP = 20.0  # weight of the contrast of lesions that the parent shows
LESIONS_A_SLICE = 2
ENOUGH = 40  # steps on measured noise: with more, the network learns the errors of the estimate
WAY = 0.5  # from the parent's weights to the adapted ones, where the noise was measured; chosen on the validation head
PROBES = 2  # drawn for the held-out slices, where the noise was measured
GRAIN = (0.25, 0.05)  # that may come through: at least times the parent's, at most over it; set on validation patients


def train_stage2(
    model: MFdiff,
    target: Scan | Sequence[Scan],
    objective: str = "auto",
    *,
    settings: Adaptation | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
) -> Generator[TrainingState, None, None]:
    """Adapt a model to a target: one scan, or several of one scanner. Yields a `TrainingState` after each step
    (`loop.training_loop`), and ends when the held-out loss has not fallen for `patience` validations; the last state's
    model is the adapted one.

    objective: "split", "sure" or "paired"; "auto" takes that of `settings`, or what the scans allow
    (`chosen_objective`). out: folder for the checkpoint and the final weights; None keeps nothing. resume: go on from
    the checkpoint in `out` if there is one. The given model is not changed. Raises ValueError if a scan lacks what the
    objective needs, or if `objective` contradicts `settings`; FileExistsError if `out` holds a run and `resume` is off.
    """
    scans = [target] if isinstance(target, Scan) else list(target)
    data = TargetSlices(scans, _settings(objective, settings), model.context)
    settings = data.settings
    folder = refuse_to_mix(out, resume)
    accelerator = accelerator_on(device, half=False)
    student = copy.deepcopy(model).to(accelerator.device)
    if settings.objective != "paired":
        data.remember(student)
    if settings.rehearsal and not data.doubt:
        data.rehearse(workers)
    trained = specific_parameters(student) if settings.trained == "specific" else list(student.parameters())
    plan = Plan(
        trained=trained,
        steps=0 if data.doubt else min(settings.steps, ENOUGH) if data.measured else settings.steps,
        learning_rate=lambda _: settings.learning_rate,
        ema=settings.ema,
        check_every=settings.validate_every,
        save_every=settings.validate_every,
        weights=WEIGHTS,
        curve="held_out_loss",
        made_with=dataclasses.asdict(settings)
        | {
            "parent": model.fingerprint,
            "target": [f"{scan.name}, total {scan.lpet.sum():.6g}" for scan in scans],
            "cohort": data.cohort,
        },
        card=_card(model, scans, data),
        patience=settings.patience,
        way=WAY if data.measured else 1.0,
    )
    yield from training_loop(student, data, plan, accelerator, folder, resume)


def adapt(model: MFdiff, target: Scan | Sequence[Scan], objective: str = "auto", **options: Any) -> MFdiff:
    """`train_stage2` to its end; returns the adapted model."""
    for state in train_stage2(model, target, objective, **options):
        adapted = state.model
    return adapted


def specific_parameters(model: MFdiff) -> list[nn.Parameter]:
    """What stage 2 trains, about a tenth of the weights: norms and FiLM everywhere, and in the fusion module the
    embedding of the dose, attention and head. All else of `model` is frozen."""
    model.requires_grad_(False)
    small: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    small += [m for name, m in model.named_modules() if name.endswith(".film")]
    small += [m for name, m in model.fusion.named_modules() if name.endswith(("query", "key_value", "refine"))]
    small += [model.fusion.embed, model.fusion.head]
    for module in small:
        module.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


class TargetSlices:
    """The objective of stage 2: the target's slices as the model sees them (`ModelView`), and the loss on them.

    Each scan becomes tensors (Z, H, W) of a window round the brain: "lpet", "mr", "weight", and by objective "noise" or
    "spet"; or a noise model. doubt: why nothing should be learned from them, None if it should. cohort: key of the
    rehearsed patients."""

    def __init__(self, scans: Sequence[Scan], settings: Adaptation, context: int):
        objective = chosen_objective(settings.objective, scans)
        self.settings, self.context = dataclasses.replace(settings, objective=objective), context
        self.cohort: str | None = None
        self.parent_grain: float | None = None
        self.simulated: SliceDataset | None = None
        self.scans = [self._prepared(scan) for scan in scans]
        if not self.scans:
            raise ValueError("stage 2: expected at least one scan to adapt to, found none")
        measured = [scan["noise model"] for scan in self.scans if scan["noise model"]]
        self.doubt = next((noise.doubt for noise in measured if noise.doubt), None)
        self.measured = [noise.summary for noise in measured]

    def _prepared(self, scan: Scan) -> dict[str, Any]:
        _require(scan, self.settings.objective)
        view = ModelView(scan, self.context)
        noise, images = None, {"lpet": view.lpet, "mr": view.mr, "weight": np.where(view.mask, 1.0, 0.2)}
        if self.settings.objective == "paired" and scan.spet is not None:
            images["spet"] = view.activity(scan.spet)
        elif scan.halves is not None:
            a, b = (view.activity(half) for half in scan.halves)
            images["noise"] = (a - b) / 2
        else:
            noise = NoiseModel(view.lpet, view.mask)
            images["weight"] = view.mask.astype(float)  # beyond the brain the noise is not known well enough
        images["lesions"] = lesion_like(view.mask, np.random.default_rng([self.settings.seed, 53]))
        z = view.shape[2]
        if z < HELD_OUT:
            raise ValueError(
                f"{scan.name}: expected at least {HELD_OUT} slices to adapt to, one of them held out, found {z}"
            )
        held = np.arange(z) % HELD_OUT == 2
        window = round_the_brain(view.mask)
        tensors = {name: torch.from_numpy(view.stack(image[window])) for name, image in images.items()}
        chosen = {"held": np.flatnonzero(held), "learned": np.flatnonzero(~held)}
        return tensors | chosen | {"view": view, "window": window, "noise model": noise}

    def rehearse(self, workers: int | None = None) -> None:
        """Mix in a few of stage 1's simulated patients."""
        profile = load_profile("cpu", patients=self.settings.rehearsal_patients, context=self.context)
        cohort = make_cohort(profile, "train", workers)
        self.cohort = cohort.key
        self.simulated = SliceDataset(cohort, dataclasses.replace(profile, seed=self.settings.seed))

    # --- what the loop asks for --------------------------------------------------------------------------------------

    def parts(self, step: int, process: int = 0, processes: int = 1) -> list[dict[str, Tensor]]:
        """The target's batch of a step, and the simulated slices that are rehearsed with it."""
        parts, seed = [self._complete(self.batch(step), [step, 0])], self.settings.seed
        if self.simulated is not None:
            batch = self.simulated.batch(step, max(1, round(self.settings.rehearsal * self.settings.batch)))
            parts.append(batch | drawn(batch["spet"], [seed, step, 1]))
        return parts

    def loss(self, model: Any, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"target": the objective}, or {"rehearsal": the loss of stage 1} of simulated slices."""
        inner = getattr(model, "module", model)  # of several processes, alike in all
        if self.settings.objective != "paired" and "t" in part:
            return {"rehearsal": _supervised(inner, part)}
        return {"target": self.objective(inner, part)}

    def check(self, model: nn.Module) -> dict[str, float]:
        """The loss on the held-out slices; where the noise was measured, the grain that comes through, and whether that
        is sound, which those weights must be that are kept."""
        found: dict[str, float] = {"loss": self.held_out_loss(model)}
        if self.measured:
            found["grain"] = grain = self.grain(model)
            self.parent_grain = grain if self.parent_grain is None else self.parent_grain
            found["sound"] = GRAIN[0] * self.parent_grain <= grain <= self.parent_grain + GRAIN[1]
        return found

    # --- batches and losses ------------------------------------------------------------------------------------------

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`, always the same: random learned slices of one scan, half of the batches mirrored, the
        noise of half of the slices negated: either half of the counts may teach the other. The noise of "sure" is moved
        a little each time: one and the same probe could be fitted."""
        rng = np.random.default_rng([self.settings.seed, step, 41])
        scan = self.scans[rng.integers(len(self.scans))]
        batch = self._slices(scan, rng.choice(scan["learned"], self.settings.batch), [step, 43])
        if self.settings.objective == "sure" and not scan["noise model"]:
            batch["noise"] = batch["noise"].roll(rng.integers(-3, 4, 2).tolist(), (-2, -1))
        if "noise" in batch:
            sign = np.float32(rng.choice((-1, 1), self.settings.batch))
            batch["noise"] = batch["noise"] * torch.from_numpy(sign)[:, None, None, None]
        if rng.random() < 0.5:
            batch = {key: value.flip(-2) if value.ndim == 4 else value for key, value in batch.items()}
        return batch

    def _slices(self, scan: dict[str, Any], chosen: np.ndarray, seed: list[int]) -> dict[str, Tensor]:
        """The chosen slices: "lpet", "mr", "lesions" and "noise" with their neighbours, (B, context, H, W), "weight"
        and "spet" alone, (B, 1, H, W), and the dose (B,). seed: of the noise, where it is drawn."""
        near = scan["view"].near(chosen)
        if scan["noise model"]:
            drawn_noise = scan["noise model"].draw(np.random.default_rng([self.settings.seed, *seed]))
            scan = scan | {"noise": torch.from_numpy(scan["view"].stack(drawn_noise[scan["window"]]))}
        batch: dict[str, Tensor] = {
            name: scan[name][near] for name in ("lpet", "mr", "lesions", "noise") if name in scan
        }
        batch |= {name: scan[name][chosen][:, None] for name in ("weight", "spet") if name in scan}
        batch |= {"contrast": scan["contrast"][chosen]} if "contrast" in scan else {}
        return batch | {"dose": torch.full((len(chosen),), float(scan["view"].scan.dose_reduction))}

    def _complete(self, batch: dict[str, Tensor], seed: list[int]) -> dict[str, Tensor]:
        """With the times and the noise that the loss of stage 1 needs, if it is the objective."""
        return batch | drawn(batch["spet"], [self.settings.seed, *seed]) if "spet" in batch else batch

    def objective(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The objective on one batch, a mean over voxels in units of the expected residual."""
        if self.settings.objective == "paired":
            return _supervised(model, batch)
        dose, noise = batch["dose"], batch["noise"]
        y, n = (x[:, self.context // 2, None] for x in (batch["lpet"], noise))  # (B, 1, H, W)
        weight = batch["weight"] / batch["weight"].mean() / residual_sd(dose) ** 2
        if self.settings.objective == "split":  # y + MIX n has the variance of y times 1 + MIX^2
            seen = batch | {"lpet": batch["lpet"] + MIX * noise, "dose": (1 + MIX**2) * dose}
            plain = _estimate(model, seen)
            return (weight * (plain - (y - n / MIX)) ** 2).mean() + self._lost(model, seen, plain)
        plain, probed = _estimate(model, batch), _estimate(model, batch, PROBE * noise)
        risk = (weight * ((plain - y) ** 2 + 2 * n * (probed - plain) / PROBE)).mean()
        return risk + self._lost(model, batch, plain)

    def _lost(self, model: Any, batch: dict[str, Tensor], plain: Tensor) -> Tensor | float:
        """What the contrast that the parent shows and the model does not is worth, on half of the batch."""
        if "contrast" not in batch:
            return 0.0
        some = {key: value[: (len(plain) + 1) // 2] for key, value in batch.items()}
        lost = some["contrast"] - self._contrast(model, some, plain[: len(some["contrast"])])
        return KEEP * (torch.relu(lost) ** 2).mean()

    def _contrast(self, model: Any, batch: dict[str, Tensor], plain: Tensor) -> Tensor:
        """How much of the lesion-like changes a model shows, (B,); plain: its estimate without them."""
        change = batch["lesions"][:, self.context // 2, None]
        shown = _estimate(model, batch, batch["lesions"]) - plain
        return (shown * change).sum((1, 2, 3)) / (change**2).sum((1, 2, 3)).clamp(min=1e-3)

    @torch.no_grad()
    def remember(self, parent: MFdiff) -> None:
        """Note the contrast of the lesion-like changes in the parent's eyes, slice by slice."""
        device = next(parent.parameters()).device
        for scan in self.scans:
            shown = []
            for z in np.array_split(np.arange(len(scan["lpet"])), -(-len(scan["lpet"]) // self.settings.batch)):
                batch = {key: value.to(device) for key, value in self._slices(scan, z, [0]).items()}
                shown.append(self._contrast(parent, batch, _estimate(parent, batch)).cpu())
            scan["contrast"] = torch.cat(shown)

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """Mean loss over the held-out slices of all scans, and both signs of the noise; each call sees the same."""
        device, losses = next(model.parameters()).device, []
        for scan in self.scans:
            for first in range(0, len(scan["held"]), self.settings.batch):
                some = scan["held"][first : first + self.settings.batch]
                for probe in range(PROBES if scan["noise model"] else 1):
                    batch = self._complete(self._slices(scan, some, [probe, first, 47]), [first, 2])
                    batch = {key: value.to(device) for key, value in batch.items()}
                    both = [batch] if "t" in batch else [batch, batch | {"noise": -batch["noise"]}]
                    losses += [loss for one in both for loss in len(some) * [self.objective(model, one).item()]]
        return float(np.mean(losses))

    @torch.no_grad()
    def grain(self, model: Any) -> float:
        """Share of the LPET's grain in a model's estimate f: <D f, D y> / <D y, D y> over the held-out slices, with
        D y = y_z - (y_z-1 + y_z+1) / 2. Nothing of the estimate of the noise is in it."""
        device, products = next(model.parameters()).device, np.zeros(2)
        for scan in self.scans:
            for z in scan["held"][scan["held"] + 1 < len(scan["lpet"])]:
                batch = self._slices(scan | {"noise model": None}, np.array([z - 1, z, z + 1]), [])
                estimate = _estimate(model, {key: value.to(device) for key, value in batch.items()}).cpu()
                below, here, above = torch.stack([estimate[:, 0], scan["lpet"][z - 1 : z + 2]], 1)
                change = (here - (below + above) / 2) * scan["weight"][z]
                products += [float((change[0] * change[1]).sum()), float((change[1] ** 2).sum())]
        return float(products[0] / products[1])


def refusal(card: dict[str, Any]) -> str | None:
    """Why stage 2 left the parent's weights as they are, from the card of its result; None if it did not refuse."""
    unsound = [one["grain"] for one in card["held_out_loss"] if not one.get("sound", True)]
    if card["refused"] or card["steps"] or not unsound:
        return card["refused"]
    first = card["held_out_loss"][0]["grain"]
    what = "follows the noise" if unsound[0] > first else "smooths structure away"
    return (
        f"what it learned {what}: {unsound[0]:.0%} of the grain of the LPET comes through, with the parent {first:.0%}"
    )


def _estimate(model: Any, batch: dict[str, Tensor], change: Tensor | float = 0.0) -> Tensor:
    return model.fusion(batch["lpet"] + change, batch["mr"], batch["dose"]).coarse


def round_the_brain(mask: np.ndarray) -> tuple[slice, slice]:
    """In x and y, the sides of the smallest window round a mask (X, Y, Z) that the model takes without padding: what
    lies beyond teaches nothing, and takes half of the time."""
    window = []
    for size, others in zip(mask.shape[:2], ((1, 2), (0, 2)), strict=True):
        seen = np.flatnonzero(mask.any(others))
        low, high = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, size)
        side = -(-(high - low + 2 * MARGIN) // SIDE) * SIDE
        first = min(max(0, (low + high - side) // 2), max(0, size - side))
        window.append(slice(first, min(first + side, size)))
    return window[0], window[1]


def lesion_like(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes of activity (X, Y, Z) that look like lesions of 6 to 12 mm through a scanner, hot and cold, in units of
    the brain's mean, at places in `mask` that keep clear of each other."""
    change, places = np.zeros(mask.shape, np.float32), np.argwhere(mask)
    taken: list[tuple[np.ndarray, float]] = []
    for _ in range(LESIONS_A_SLICE * mask.shape[2]):
        radius = rng.uniform(3.0, 6.0)
        centre = free_place(places, taken, radius, rng)
        if centre is not None:
            near, inside = ellipsoid(mask.shape, centre, radius, rng.uniform(0.85, 1.18, 3))
            change[near] += rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 0.8) * inside
            taken.append((centre, radius))
    return ndimage.gaussian_filter(change, 1.0)


def drawn(images: Tensor, seed: list[int]) -> dict[str, Tensor]:
    """Times "t" (B,) and "noise" like `images` (B, 1, H, W), for the loss of stage 1."""
    rng = np.random.default_rng(seed)
    t = torch.from_numpy(rng.integers(0, NoiseSchedule().length, len(images)))
    return {"t": t, "noise": torch.from_numpy(rng.standard_normal(tuple(images.shape), dtype=np.float32))}


def _supervised(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = model(batch, batch["t"], batch["noise"])
    return torch.stack(list(losses.values())).sum()


def chosen_objective(objective: str, scans: Sequence[Scan]) -> str:
    """What "auto" stands for: "split" if all scans have count halves, else "sure"; a name stands for itself."""
    if objective != "auto":
        return objective
    return "split" if all(scan.halves is not None for scan in scans) else "sure"


def _settings(objective: str, settings: Adaptation | None) -> Adaptation:
    """With the one objective of a run: the argument's, or that of the settings; never one of them in silence."""
    settings = settings or Adaptation()
    if "auto" not in (objective, settings.objective) and objective != settings.objective:
        raise ValueError(
            f"objective: expected one, found {objective!r} beside settings with {settings.objective!r}; give it in one "
            "place"
        )
    return settings if objective == "auto" else dataclasses.replace(settings, objective=objective)


def _require(scan: Scan, objective: str) -> None:
    """Refuse a scan that lacks what the objective needs."""
    if objective == "split" and scan.halves is None:
        raise ValueError(
            f"{scan.name}: expected count halves for the objective 'split', found none; reconstruct two halves of the "
            "list-mode counts (Scanner.scan(..., halves=True) in simulation), or use the objective 'sure'"
        )
    if objective == "sure" and scan.halves is None and scan.lpet.shape[2] < SLICES:
        raise ValueError(
            f"{scan.name}: expected count halves or at least {SLICES} slices for the objective 'sure', found "
            f"{scan.lpet.shape[2]} slices and no halves; its noise cannot be measured"
        )
    if objective == "paired" and scan.spet is None:
        raise ValueError(
            f"{scan.name}: expected the SPET for the objective 'paired', found none; use 'split' or 'sure'"
        )


def _card(parent: MFdiff, scans: list[Scan], data: TargetSlices) -> dict[str, Any]:
    return {
        "what": "MFdiff stage 2, moving average of the weights at the lowest held-out loss",
        "way": WAY if data.measured else 1.0,
        "parent": {"fingerprint": parent.fingerprint, "revision": parent.card.get("revision")},
        "adaptation": dataclasses.asdict(data.settings),
        "target": [scan.name for scan in scans],
        "noise": data.measured or "of count halves",
        "refused": data.doubt,
    }
