"""Profiles: unknown keys and wrong types are errors, strings from the command line are parsed."""

import dataclasses

import pytest

from mfdiff_lite.anatomy import embedded_anatomies, embedded_anatomy
from mfdiff_lite.config import (
    LOWEST_HEAD,
    PROFILES,
    TEST_ANATOMIES,
    TRAIN_ANATOMIES,
    VALIDATION_ANATOMIES,
    Adaptation,
    load_profile,
)
from mfdiff_lite.phantom import Randomisation, virtual_patient
from mfdiff_lite.scanner import Scanner


def test_profiles_by_name():
    assert set(PROFILES) == {"smoke", "cpu", "gpu"}
    for name, profile in PROFILES.items():
        assert profile.name == name and load_profile(name) is not None
        assert load_profile(name) == profile


def test_smoke_is_small():
    smoke, cpu, gpu = (PROFILES[name] for name in ("smoke", "cpu", "gpu"))
    assert smoke.steps < cpu.steps < gpu.steps and smoke.patients < cpu.patients < gpu.patients


def test_anatomies_of_the_three_parts_are_different():
    parts = [*TRAIN_ANATOMIES, *VALIDATION_ANATOMIES, *TEST_ANATOMIES]
    assert len(set(parts)) == len(parts) == 7


def test_profiles_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_profile("smoke").steps = 1


@pytest.mark.parametrize(
    ("key", "given", "parsed"),
    [
        ("steps", "100", 100),
        ("steps", 100, 100),
        ("steps", 100.0, 100),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", 1, 1.0),
        ("no_mr", "0", 0.0),
        ("fusion_widths", "16,32,64", (16, 32, 64)),
        ("fusion_widths", "(16, 32, 64)", (16, 32, 64)),
        ("fusion_widths", [16, 32, 64], (16, 32, 64)),
        ("fusion_widths", (16, 32), (16, 32)),
        ("denoiser_widths", "", ()),
        ("fusion", "concat", "concat"),
        ("dose_range", "10,50", (10.0, 50.0)),
        ("dose_range", (10, 50), (10.0, 50.0)),
    ],
)
def test_values_are_parsed(key, given, parsed):
    changed = load_profile("cpu", **{key: given})
    assert getattr(changed, key) == parsed and type(getattr(changed, key)) is type(parsed)
    if isinstance(parsed, tuple):
        assert [type(v) for v in getattr(changed, key)] == [type(v) for v in parsed]
    assert (
        dataclasses.replace(changed, **{key: getattr(PROFILES["cpu"], key)}) == PROFILES["cpu"]
    )  # and nothing else changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"),
        ("steps", "1.5"),
        ("steps", 1.5),
        ("steps", True),
        ("steps", None),
        ("steps", [100]),
        ("steps", float("nan")),
        ("learning_rate", "fast"),
        ("learning_rate", False),
        ("fusion_widths", 32),
        ("fusion_widths", "16,wide"),
        ("fusion_widths", ()),
        ("fusion_widths", ""),
        ("fusion", "magic"),
        ("fusion_widths", (16, True)),
        ("dose_range", "20"),
        ("dose_range", "4,20,100"),
        # of the right type, but no run
        ("steps", 0),
        ("patients", -1),
        ("crop", 100),
        ("crop", 160),
        ("context", 2),
        ("context", -1),
        ("context", 99),
        ("dose_range", (0.5, 20)),
        ("dose_range", (100, 4)),
        ("dose_range", "4,nan"),
        ("slab", 49),  # the smallest head has 48 slices
        ("fusion_widths", (8, 16, 32, 64)),
        ("fusion_widths", "10,20"),
        ("denoiser_widths", "12"),
        ("learning_rate", "nan"),
        ("learning_rate", -1),
        ("ema", 2),
        ("no_mr", 3),
        ("no_mr", 0.99),
        ("thin", -0.1),
        ("lesion_weight", -5),
        ("warmup", -3),
        ("seed", -1),
    ],
)
def test_wrong_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=f"^{key}: expected .*found ") as error:
        load_profile("cpu", **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["stepps", "name", "Steps", ""])
def test_unknown_key_lists_the_known_ones(key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'") as error:
        load_profile("cpu", **{key: 3})
    known = str(error.value).partition("known keys are ")[2].split(", ")
    assert set(known) == {field.name for field in dataclasses.fields(PROFILES["cpu"])} - {"name"}


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected one of smoke, cpu, gpu, found 'tiny'"):
        load_profile("tiny")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Scanner(subsets=200), "subsets"),  # today: an image of zeros
        (lambda: Scanner(iterations=0), "iterations"),  # today: an image of ones
        (lambda: Scanner(contamination=1.0), "contamination"),
        (lambda: Scanner(psf_fwhm=float("nan")), "psf_fwhm"),
        (lambda: Randomisation(skull_stripped=2.0), "skull_stripped"),
        (lambda: Randomisation(grey_to_white=(0.0, 1.0)), "grey_to_white"),
        (lambda: Randomisation(mr_contrast="flair"), "mr_contrast"),
        (lambda: Adaptation(learning_rate=float("nan")), "learning_rate"),
        (lambda: Adaptation(rehearsal=-1.0), "rehearsal"),
        (lambda: Adaptation(objective="magic"), "objective"),
    ],
)
def test_every_frozen_dataclass_checks_its_ranges(make, key):
    with pytest.raises(ValueError, match=f"^{key}: expected .*found "):
        make()


def test_the_slab_fits_into_every_head():
    for name in embedded_anatomies():
        assert virtual_patient(embedded_anatomy(name), 0, slices=LOWEST_HEAD).mask.shape[2] == LOWEST_HEAD


def test_scanner_and_patient_share_a_grid():
    """Today: eight times the counts and doubled attenuation paths, without a word."""
    patient = virtual_patient(embedded_anatomy("icbm152"), 0, slices=2)
    with pytest.raises(ValueError, match="icbm152-0: expected the scanner's grid, .* pixels of 4 mm, found .* 2 mm"):
        Scanner(pixel_size=4).scan(patient)
