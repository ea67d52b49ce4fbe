"""Profiles: one frozen set of numbers for each size of run. An unknown key or a wrong type is an error, never a silent
default."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass

TRAIN_ANATOMIES = ("icbm152", "ahba-9861", "ahba-10021", "ahba-12876", "ahba-14380")
VALIDATION_ANATOMIES = ("ahba-15496",)
TEST_ANATOMIES = ("ahba-15697",)
FUSIONS = ("gated", "concat", "pet")
OBJECTIVES = ("split", "sure", "paired")  # of stage 2


@dataclass(frozen=True)
class Profile:
    """Everything that decides a run. Lengths of lists of patients, slices and steps; see each line."""

    name: str
    seed: int = 0
    # cohort
    patients: int = 320  # virtual patients to train on, spread over TRAIN_ANATOMIES
    validation_patients: int = 6
    slab: int = 16  # axial slices of each
    doses: int = 2  # low-dose reconstructions of each, dose reduction drawn from `dose_range`
    dose_range: tuple[float, float] = (4.0, 100.0)
    # model
    fusion: str = "gated"  # or a baseline in its place: "concat" (PET and MR in one encoder), "pet" (no MR)
    fusion_widths: tuple[int, ...] = (32, 64, 128)
    denoiser_widths: tuple[int, ...] = (32, 64, 128)  # empty: no diffusion, a regression U-Net
    context: int = 5  # neighbouring slices of each modality that the fusion module sees
    # stage 1
    steps: int = 6500
    batch: int = 8
    accumulate: int = 1  # parts of a batch, worked on one after the other: less memory, the same result
    crop: int = 96  # pixels
    learning_rate: float = 8e-4
    warmup: int = 200
    ema: float = 0.999
    lesion_weight: float = 8.0  # of voxels in lesions, beside 1 for the brain
    no_mr: float = 0.08  # share of training slices without MR
    wrong_mr: float = 0.06  # ... with another patient's MR
    validate_every: int = 250
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for key in (
            "patients",
            "validation_patients",
            "slab",
            "doses",
            "steps",
            "batch",
            "accumulate",
            "validate_every",
            "checkpoint_every",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected at least 1, found {getattr(self, key)}")
        if not 1 <= self.dose_range[0] <= self.dose_range[1] < float("inf"):
            raise ValueError(
                f"dose_range: expected lowest,highest dose-reduction factor, each at least 1, found {self.dose_range}"
            )
        if self.crop % 32 or not 32 <= self.crop <= 128:
            raise ValueError(f"crop: expected a multiple of 32 from 32 to 128, found {self.crop}")
        if not self.fusion_widths:
            raise ValueError("fusion_widths: expected channels of each scale, e.g. 32,64,128, found none")
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, found {self.fusion!r}")
        if self.context % 2 == 0 or not 1 <= self.context <= self.slab:
            raise ValueError(
                f"context: expected an odd number of slices, at most slab = {self.slab}, found {self.context}"
            )


@dataclass(frozen=True)
class Adaptation:
    """Everything that decides a run of stage 2. Unlike a `Profile` it fits any size of model."""

    objective: str = "split"
    seed: int = 0
    steps: int = 100  # at most; most targets have what they get by 60
    batch: int = 8  # slices of the target
    rehearsal: float = 0.25  # slices of stage 1's simulated patients, as a share of `batch`; 0: none
    rehearsal_patients: int = 20
    learning_rate: float = 5e-4
    ema: float = 0.98
    validate_every: int = 20
    patience: int = 4  # validations without a lower held-out loss before it stops
    trained: str = "specific"  # "all" weights: for what stage 2 is compared with

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, found {self.objective!r}")
        if self.trained not in ("specific", "all"):
            raise ValueError(f"trained: expected specific or all, found {self.trained!r}")
        for key in ("steps", "batch", "rehearsal_patients", "validate_every", "patience"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected at least 1, found {getattr(self, key)}")


PROFILES = {
    "smoke": Profile(
        "smoke",
        patients=2,
        validation_patients=1,
        slab=4,
        doses=1,
        fusion_widths=(8, 16, 32),
        denoiser_widths=(8, 16, 32),
        context=3,
        steps=40,
        batch=4,
        crop=96,
        warmup=10,
        ema=0.9,
        validate_every=20,
        checkpoint_every=20,
    ),
    "cpu": Profile("cpu"),
    "gpu": Profile(
        "gpu",
        patients=2000,
        validation_patients=12,
        slab=24,
        doses=3,
        fusion_widths=(96, 192, 384),
        denoiser_widths=(96, 192, 384),
        steps=100_000,
        batch=32,
        learning_rate=4e-4,
        ema=0.9995,
        validate_every=1000,
        checkpoint_every=1000,
    ),
}


def load_profile(name: str, /, **overrides: object) -> Profile:
    """A named profile with single values replaced: `load_profile("cpu", steps=100)`; strings are parsed ("steps":
    "100").

    Raises ValueError for an unknown profile or key, or a value of the wrong type.
    """
    if name not in PROFILES:
        raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, found {name!r}; choose a listed name")
    return _replaced(PROFILES[name], f"profile {name}", overrides)


def load_adaptation(**overrides: object) -> Adaptation:
    """The settings of stage 2 with single values replaced; strings are parsed. Raises ValueError like
    `load_profile`."""
    return _replaced(Adaptation(), "adaptation", overrides)


def _replaced(settings: typing.Any, called: str, overrides: dict[str, object]) -> typing.Any:
    kinds = {key: kind for key, kind in typing.get_type_hints(type(settings)).items() if key != "name"}
    for key in overrides:
        if key not in kinds:
            raise ValueError(f"{called}: unknown key {key!r}; known keys are {', '.join(kinds)}")
    parsed = {key: _parsed(key, value, kinds[key]) for key, value in overrides.items()}
    return dataclasses.replace(settings, **parsed)


def _parsed(key: str, value: object, kind: type | types.GenericAlias) -> object:
    if typing.get_origin(kind) is tuple:
        item, *others = typing.get_args(kind)
        parts = [p for p in value.strip("()[] ").split(",") if p] if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and (others == [...] or len(parts) == 1 + len(others)):
            return tuple(_parsed(key, part, item) for part in parts)
    else:
        try:
            parsed = kind(value)
            if not isinstance(value, bool) and (isinstance(value, str) or parsed == value):
                return parsed
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{key}: expected {getattr(kind, '__name__', kind)}, found {value!r}")
