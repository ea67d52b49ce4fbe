"""The benchmark of known lesions: what is put in, what observers see of it, and the equivalent dose."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def detection():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        others = {name: sys.modules.pop(name, None) for name in ("detection", "results")}  # of the same names
        yield importlib.import_module("detection")
    for name, other in others.items():
        sys.modules.pop(name, None)
        if other is not None:
            sys.modules[name] = other


def test_signals_are_in_the_activity_alone_and_nowhere_else(detection):
    absent, present, signals = detection.with_and_without("ahba-15496", 3, 10)
    changed = present.activity != absent.activity
    assert signals and present.mr is absent.mr and not absent.lesions.any()
    for one in signals:
        ratio = present.activity[one.centre] / absent.activity[one.centre]
        size = min(detection.CONTRASTS[one.across], 1.0) if not one.hot else detection.CONTRASTS[one.across]
        assert ratio == pytest.approx(1 + size if one.hot else 1 - size, abs=1e-5)
    centres = np.array([one.centre for one in signals])
    away = np.linalg.norm(2.0 * (np.argwhere(changed)[:, None] - centres), axis=-1)
    assert away.min(1).max() <= max(detection.CONTRASTS) / 2 + 2  # mm: a radius and a voxel's edge
    cut = detection.patches(present.activity - absent.activity, signals)
    assert np.abs(cut[:, detection.SIDE**2 // 2]).min() > 0


def test_observers_find_what_is_there_and_guess_where_nothing_is(detection):
    rng, n = np.random.default_rng(0), 400
    signals = [detection.Signal((0, 0, 0), 8, bool(i % 2)) for i in range(n)]
    patients, noise = np.arange(n) // 20, rng.standard_normal((n, detection.SIDE**2))
    axis = np.arange(detection.SIDE) - detection.SIDE // 2
    ball = np.exp(-(axis[:, None] ** 2 + axis**2) / 8).ravel()
    sign = np.where([one.hot for one in signals], 1, -1)[:, None]
    for strength, low, high in ((0.0, 0.35, 0.65), (3.0, 0.97, 1.0)):
        seen = detection.observed(strength * sign * ball + noise, signals, patients, [8])
        for shares in seen.values():
            assert len(shares) == 20 and low <= np.mean(list(shares.values())) <= high


def test_the_equivalent_dose_is_that_of_the_plain_image_with_the_same_auc(detection):
    curve = {1: 0.95, 2: 0.9, 4: 0.85, 8: 0.8, 20: 0.7}
    for drf, auc in curve.items():
        assert detection.equivalent_dose(auc, curve) == pytest.approx(20 / drf)
    between = detection.equivalent_dose(0.825, curve)
    assert between == pytest.approx(np.sqrt((20 / 8) * (20 / 4)))
    assert detection.equivalent_dose(0.5, curve) == 1
    assert detection.equivalent_dose(1.0, curve) == pytest.approx(20)
