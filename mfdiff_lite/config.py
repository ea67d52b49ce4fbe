"""Settings: frozen sets of numbers that state their ranges once, and profiles, one for each size of run.

An unknown key, a wrong type or a value outside its range is an error, never a silent default.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass

TRAIN_ANATOMIES = ("icbm152", "ahba-9861", "ahba-10021", "ahba-12876", "ahba-14380")
VALIDATION_ANATOMIES = ("ahba-15496",)
TEST_ANATOMIES = ("ahba-15697",)
FUSIONS = ("gated", "concat", "pet")
OBJECTIVES = ("split", "sure", "paired")  # of stage 2
SIDE = 32  # the sides of what the model sees are multiples of this [pixels]
SCALES = 3  # of the fusion module at most: each halves the image, and its windows must fit into SIDE
GROUPS = 8  # of the group normalisation: widths are multiples of it
MOST_STEPS = 10_000_000
LARGEST_SEED = 2**32 - 1
LOWEST_HEAD = 48  # slices of the smallest embedded head, which a slab must fit into
FWHM_TO_SD = 1 / math.sqrt(8 * math.log(2))  # full width at half maximum of a Gaussian -> its standard deviation


def within(default: typing.Any, low: float, high: float) -> typing.Any:
    """A dataclass field whose value, or each of whose values, lies in [low, high]; `check` holds it to that."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def one_of(default: str, names: tuple[str, ...]) -> typing.Any:
    """A dataclass field with one of the names."""
    return dataclasses.field(default=default, metadata={"names": names})


def check(settings: typing.Any) -> None:
    """Hold a dataclass to the ranges of its fields. Raises ValueError: which field, what was expected, what found."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "names" in field.metadata and value not in field.metadata["names"]:
            raise ValueError(f"{field.name}: expected one of {', '.join(field.metadata['names'])}, found {value!r}")
        if "range" in field.metadata:
            low, high = field.metadata["range"]
            found = value if isinstance(value, tuple) else (value,)
            if not all(low <= v <= high and math.isfinite(v) for v in found):
                raise ValueError(f"{field.name}: expected {low:.10g} to {high:.10g}, found {value}")


@dataclass(frozen=True)
class Profile:
    """Everything that decides a run of stage 1. Lengths of lists of patients, slices and steps; see each line."""

    name: str
    seed: int = within(0, 0, LARGEST_SEED)
    # cohort
    patients: int = within(320, 1, 100_000)  # virtual patients to train on, spread over TRAIN_ANATOMIES
    validation_patients: int = within(6, 1, 10_000)
    slab: int = within(16, 1, LOWEST_HEAD)  # axial slices of each
    doses: int = within(2, 1, 100)  # low-dose reconstructions of each, dose reduction drawn from `dose_range`
    dose_range: tuple[float, float] = within((4.0, 100.0), 1, 200)
    # model
    fusion: str = one_of("gated", FUSIONS)  # or a baseline in its place: "concat" (one encoder), "pet" (no MR)
    fusion_widths: tuple[int, ...] = within((32, 64, 128), GROUPS, 4096)
    denoiser_widths: tuple[int, ...] = within((32, 64, 128), GROUPS, 4096)  # empty: no diffusion, a regression U-Net
    context: int = within(5, 1, LOWEST_HEAD)  # neighbouring slices of each modality that the fusion module sees
    # stage 1
    steps: int = within(6500, 1, MOST_STEPS)
    batch: int = within(8, 1, 4096)
    accumulate: int = within(
        1, 1, 4096
    )  # parts of a batch, worked on one after the other: less memory, the same result
    crop: int = within(96, SIDE, 128)  # pixels
    learning_rate: float = within(8e-4, 0, 1)
    warmup: int = within(200, 0, MOST_STEPS)
    ema: float = within(0.999, 0, 1)
    lesion_weight: float = within(8.0, 0, 1000)  # of voxels in lesions, beside 1 for the brain
    no_mr: float = within(0.08, 0, 1)  # share of training slices without MR
    wrong_mr: float = within(0.12, 0, 1)  # ... with another patient's MR, or the own one far out of place
    thin: float = within(0.15, 0, 1)  # ... from a slab thinner than `context`, its ends repeated as in restoring
    other_noise: float = within(0.12, 0, 1)  # ... whose LPET is the SPET with made-up correlated noise
    validate_every: int = within(250, 1, MOST_STEPS)
    checkpoint_every: int = within(250, 1, MOST_STEPS)

    def __post_init__(self) -> None:
        check(self)
        if self.dose_range[0] > self.dose_range[1]:
            raise ValueError(f"dose_range: expected lowest,highest dose-reduction factor, found {self.dose_range}")
        if self.crop % SIDE:
            raise ValueError(f"crop: expected a multiple of {SIDE}, found {self.crop}")
        for key, fewest in (("fusion_widths", 1), ("denoiser_widths", 0)):
            widths = getattr(self, key)
            if not fewest <= len(widths) <= SCALES or any(width % GROUPS for width in widths):
                raise ValueError(
                    f"{key}: expected the channels of {fewest} to {SCALES} scales, multiples of {GROUPS}, e.g. "
                    f"32,64,128, found {','.join(map(str, widths)) or 'none'}"
                )
        if self.context % 2 == 0 or self.context > self.slab:
            raise ValueError(
                f"context: expected an odd number of slices, at most slab = {self.slab}, found {self.context}"
            )
        if self.no_mr + self.wrong_mr > 1:
            raise ValueError(f"no_mr: expected no_mr + wrong_mr of at most 1, found {self.no_mr} + {self.wrong_mr}")


@dataclass(frozen=True)
class Adaptation:
    """Everything that decides a run of stage 2. Unlike a `Profile` it fits any size of model."""

    objective: str = one_of("auto", ("auto", *OBJECTIVES))  # "auto": the best that the scan allows
    seed: int = within(0, 0, LARGEST_SEED)
    steps: int = within(100, 1, MOST_STEPS)  # at most; most targets have what they get by 60
    batch: int = within(8, 1, 4096)  # slices of the target
    rehearsal: float = within(0.25, 0, 8)  # slices of stage 1's patients, as a share of `batch`; 0: none
    rehearsal_patients: int = within(20, 1, 10_000)
    learning_rate: float = within(5e-4, 0, 10)
    ema: float = within(0.98, 0, 1)
    validate_every: int = within(20, 1, 10_000)
    patience: int = within(4, 1, 10_000)  # validations without a lower held-out loss before it stops
    trained: str = one_of("specific", ("specific", "all"))  # "all" weights: for what stage 2 is compared with

    def __post_init__(self) -> None:
        check(self)


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

    Raises ValueError for an unknown profile or key, or a value of the wrong type or outside its range.
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


def _parsed(key: str, value: object, kind: typing.Any) -> object:
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
