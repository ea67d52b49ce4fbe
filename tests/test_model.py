"""The model as a whole: losses, sampling, restoration on real grids, saving and loading."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

import mfdiff_lite as mf
from mfdiff_lite import diffusion, metrics
from mfdiff_lite.config import load_profile
from mfdiff_lite.model import (
    QUALITIES,
    MFdiff,
    load_model,
    measured_beyond_noise,
    paired_noise,
    pick_device,
    residual_sd,
    save_model,
)
from mfdiff_lite.scan import Scan
from mfdiff_lite.view import ModelView

SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def model():
    """Untrained, but with heads that do something."""
    made = MFdiff.from_profile(SMOKE).eval()
    torch.manual_seed(1)
    for head in (made.fusion.head, made.denoiser.head):
        torch.nn.init.normal_(head.weight, std=0.02)
    return made


def head(shape=(48, 56, 6), seed=0):
    """A noisy ellipsoid and its MR."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    brain = (axes[0] / 0.7) ** 2 + (axes[1] / 0.7) ** 2 < 1
    lpet = rng.gamma(4, 2, shape) * brain
    return lpet.astype(np.float32), (100 * brain + rng.random(shape) * 20 * brain).astype(np.float32)


def test_losses_are_the_written_equations(model):
    g = torch.Generator().manual_seed(0)
    batch = {
        "lpet": torch.rand(2, 3, 32, 32, generator=g),
        "mr": torch.randn(2, 3, 32, 32, generator=g),
        "dose": torch.tensor([20.0, 50.0]),
        "spet": torch.rand(2, 1, 32, 32, generator=g),
        "weight": torch.randint(1, 6, (2, 1, 32, 32), generator=g).float(),
    }
    t, noise = torch.tensor([100, 700]), torch.randn(2, 1, 32, 32, generator=g)
    losses = model(batch, t, noise)
    fused = model.fusion(batch["lpet"], batch["mr"], batch["dose"])
    scale = torch.tensor([0.2, 0.2 * 2.5**0.25]).reshape(2, 1, 1, 1)
    assert torch.allclose(residual_sd(batch["dose"]), scale)
    residual = (batch["spet"] - fused.coarse) / scale
    weight = batch["weight"] / batch["weight"].mean()
    assert losses["coarse"].item() == pytest.approx((weight * residual**2).mean().item(), rel=1e-5)
    a = model.schedule.alpha_bar(t, noise)
    xt = a.sqrt() * residual + (1 - a).sqrt() * noise
    v = model.denoiser(xt, t / 1000, batch["lpet"][:, 1:2], fused.feature, batch["dose"])
    target = a.sqrt() * noise - (1 - a).sqrt() * residual
    assert losses["diffusion"].item() == pytest.approx((weight * (v - target) ** 2).mean().item(), rel=1e-5)


def test_the_diffusion_loss_does_not_train_the_coarse_head(model):
    batch = {
        "lpet": torch.rand(1, 3, 32, 32),
        "mr": torch.randn(1, 3, 32, 32),
        "dose": torch.tensor([20.0]),
        "spet": torch.rand(1, 1, 32, 32),
        "weight": torch.ones(1, 1, 32, 32),
    }
    model.zero_grad()
    model(batch, torch.tensor([300]), torch.randn(1, 1, 32, 32))["diffusion"].backward()
    assert model.fusion.head.weight.grad is None
    assert model.fusion.mr_encoder.enter.weight.grad.abs().sum() > 0  # but it does train the fusion feature
    model.zero_grad()


def test_every_second_pair_sees_the_head_mirrored():
    """So the coarse estimate of a mirrored head is the mirrored one; from one or two samples it is not."""
    x = np.indices((64, 64, 3)) - 31.5
    brain = np.hypot(x[0], x[1]) < 25  # its box is 64 wide: nothing is padded
    rng, model = np.random.default_rng(0), randomised(denoiser_widths=(8, 16, 32))
    lpet = 10.0 * brain + 5 * rng.random(brain.shape) * (np.hypot(x[0], x[1]) < 20)  # an even rim: an even box
    mr = (100 + 20 * rng.random(brain.shape)) * brain
    here, there = (
        {k: model.restore(Scan(a, b), k, precision="float32").coarse for k in (2, 4)}
        for a, b in ((lpet, mr), (lpet[::-1], mr[::-1]))
    )
    np.testing.assert_allclose(there[4][::-1], here[4], atol=1e-4 * lpet.max())
    assert np.abs(there[2][::-1] - here[2]).max() > 1e-2 * lpet.max()
    views = np.stack([here[2], there[2][::-1]])
    unclipped = (views > 0).all(0) & brain
    assert unclipped.sum() > 0.5 * brain.sum()
    np.testing.assert_allclose(here[4][unclipped], views.mean(0)[unclipped], atol=1e-4 * lpet.max())


def test_paired_noise_is_antithetic_normal_and_seeded():
    noise = paired_noise(5, (64, 64), [3, 7])
    assert torch.equal(noise[0], -noise[1]) and torch.equal(noise[2], -noise[3])
    assert noise[[0, 2, 4]].std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(noise, paired_noise(5, (64, 64), [3, 7])) and not torch.equal(
        noise, paired_noise(5, (64, 64), [3, 8])
    )
    assert torch.equal(
        paired_noise(8, (4, 4), [0])[:3], paired_noise(3, (4, 4), [0])
    )  # more samples keep the first ones


def test_mean_and_std_are_those_of_the_samples(model):
    scan = Scan(*head())
    restored = model.restore(scan, 4, fidelity=0.0)
    samples = np.stack(restored.samples)
    inside = scan.lpet > 0
    positive = inside & (samples.min(0) > 0)  # clipping at zero is done per image
    assert restored.std[positive] == pytest.approx(samples.std(0, ddof=1)[positive], rel=0.05, abs=0.05)
    assert restored.mean[positive] == pytest.approx(samples.mean(0)[positive], rel=1e-3, abs=1e-3)
    assert restored.mean.min() >= 0


def test_result_does_not_depend_on_the_activity_unit(model):
    lpet, mr = head()
    one, thousand = (model.restore(Scan(lpet * c, mr), 2).mean for c in (1, 1000))
    assert thousand / 1000 == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_the_spet_is_never_looked_at(model):
    lpet, mr = head()
    plain = model.restore(Scan(lpet, mr), 2).mean
    with_spet = model.restore(Scan(lpet, mr, spet=np.random.default_rng(1).random(lpet.shape) * 50 + 1), 2).mean
    assert np.array_equal(plain, with_spet)


@pytest.mark.parametrize("method", ["dpm++", "ddim", "ddpm"])
def test_the_seed_alone_decides_the_samples(model, method):
    scan = Scan(*head())
    five, again, six = (model.restore(scan, 2, method=method, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(five.mean, again.mean)
    assert not np.array_equal(five.samples[0], six.samples[0])


@pytest.mark.parametrize("codes", ["LAS", "PSR", "IPL"])
def test_orientation_of_the_file_does_not_change_the_answer(model, codes):
    import nibabel as nib

    lpet, mr = head()
    reference = model.restore(Scan(lpet, mr), 2).mean
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    affine = np.diag([2.0, 2, 2, 1]) @ nib.orientations.inv_ornt_aff(turn, lpet.shape)
    turned = Scan(*(nib.apply_orientation(v, turn) for v in (lpet, mr)), affine=affine)
    back = nib.apply_orientation(
        model.restore(turned, 2).mean,
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("RAS")),
    )
    assert back == pytest.approx(reference, abs=1e-4)


def test_slices_numpy_torch_and_volumes_come_back_as_they_came(model):
    lpet, mr = head()
    flat = model.restore(Scan(lpet[..., 2], mr[..., 2]), 2)
    assert isinstance(flat.mean, np.ndarray) and flat.mean.shape == lpet.shape[:2] == flat.std.shape == flat.gate.shape
    tensor = model.restore(Scan(torch.from_numpy(lpet), torch.from_numpy(mr)), 2)
    assert isinstance(tensor.mean, torch.Tensor) and tuple(tensor.mean.shape) == lpet.shape
    assert np.array_equal(tensor.mean.numpy(), model.restore(Scan(lpet, mr), 2).mean)


def test_without_mr_equals_an_mr_without_signal_and_differs_from_one_with(model):
    lpet, mr = head()
    none = model.restore(Scan(lpet, None), 2).mean
    assert np.array_equal(none, model.restore(Scan(lpet, np.full_like(mr, 7.0)), 2).mean)
    assert not np.array_equal(none, model.restore(Scan(lpet, mr), 2).mean)


def test_fidelity_puts_back_the_smoothed_residual(model):
    scan = Scan(*head((64, 64, 6)))  # a box of the whole grid
    plain, pulled = (model.restore(scan, 2, fidelity=f).mean for f in (0.0, 1.0))
    expected = np.clip(plain + measured_beyond_noise(scan.lpet - plain), 0, None)
    inside = ndimage.binary_erosion(scan.lpet > 0, np.ones((3, 3, 1)), iterations=5) & (plain > 0.5)
    assert inside.sum() > 500
    assert pulled[inside] == pytest.approx(expected[inside], rel=0.03, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"n_samples": -1}, "n_samples"),
        ({"precision": "half"}, "precision"),
        ({"fidelity": 2.0}, "fidelity"),
        ({"steps": 0}, "steps"),
        ({"method": "x"}, "method"),
    ],
)
def test_impossible_settings_are_refused(model, settings, word):
    with pytest.raises(ValueError, match=word):
        model.restore(Scan(*head()), **settings)


def test_save_and_load_keep_every_weight_and_the_card(model, tmp_path):
    path = save_model(model, tmp_path / "w.safetensors", {"seed": 3, "revision": "abc"})
    again = load_model(path, "cpu")
    assert again.card["seed"] == 3 and again.card["parameters"] == model.n_parameters
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert json.loads(path.with_suffix(".json").read_text())["revision"] == "abc"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "other tensors", "a vast model", "many levels"])
def test_damaged_or_foreign_weights_are_refused(model, tmp_path, damage):
    path = save_model(model, tmp_path / "w.safetensors", {})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "text":
        path.write_text("not weights")
    elif damage == "pickle":
        torch.save(model.state_dict(), path)
    elif damage == "other tensors":
        save_file({"a": torch.zeros(2)}, path)
    else:  # by a card, which would fill the memory if it were believed
        widths = [800_000, 800_000] if damage == "a vast model" else 100_000 * [8]
        card = {"model": model.settings | {"denoiser_widths": widths}}
        save_file(model.state_dict(), path, metadata={"card": json.dumps(card)})
    with pytest.raises(ValueError, match="expected weights saved by this package"):
        load_model(path)


def test_missing_weights_and_devices_say_what_to_do(tmp_path):
    with pytest.raises(OSError, match="found nothing"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="--device auto"):
        pick_device("cuda:99")


# --- baselines of the same house ------------------------------------------------------------------------------------


def randomised(**settings):
    torch.manual_seed(0)
    made = MFdiff((8, 16, 32), context=3, **settings).eval()
    for head in filter(None, (made.fusion.head, made.denoiser and made.denoiser.head)):
        torch.nn.init.normal_(head.weight, std=0.05)
    return made


def test_the_pet_baseline_cannot_see_the_mr_and_concatenation_can():
    lpet, mr = head()
    scans = Scan(lpet, mr), Scan(lpet, mr[::-1].copy())
    for kind, blind in (("pet", True), ("concat", False)):
        one, two = (randomised(denoiser_widths=(8, 16, 32), fusion=kind).restore(s, 2).mean for s in scans)
        assert np.array_equal(one, two) == blind, kind


def test_a_regression_unet_has_no_spread_and_one_loss():
    model, scan = randomised(denoiser_widths=(), fusion="concat"), Scan(*head())
    restored = model.restore(scan, 3)
    assert restored.std.max() == 0
    np.testing.assert_allclose(restored.mean, restored.coarse, rtol=2e-3, atol=2e-3)  # samples are kept in float16
    batch = {k: torch.rand(1, n, 32, 32) for k, n in (("lpet", 3), ("mr", 3), ("spet", 1), ("weight", 1))}
    losses = model(batch | {"dose": torch.tensor([20.0])}, torch.tensor([3]), torch.randn(1, 1, 32, 32))
    assert list(losses) == ["coarse"]


def test_every_kind_of_fusion_is_saved_loaded_and_known_to_the_profile(tmp_path):
    from mfdiff_lite import config, fusion

    assert set(config.FUSIONS) == set(fusion.FUSIONS)
    for kind in config.FUSIONS:
        profile = load_profile("smoke", fusion=kind, denoiser_widths=())
        model = MFdiff.from_profile(profile)
        again = load_model(save_model(model, tmp_path / f"{kind}.safetensors", {}), "cpu")
        assert type(again.fusion) is type(model.fusion) and again.denoiser is None
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


# --- the same, faster -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_samples_are_those_of_the_plain_denoiser(model, k):
    """What is shared between steps and samples, the fused attention and the layout in memory change no sample."""
    generator = torch.Generator().manual_seed(0)
    lpet, mr = torch.rand(2, 2, 3, 64, 64, generator=generator)
    dose, noise = torch.tensor([20.0, 50.0]), torch.randn(2, k, 64, 64, generator=generator)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    drawn, fused = fast.restore_slices(lpet, mr, dose, noise)
    plain = model.fusion(lpet, mr, dose)  # with a gradient: PyTorch's unfused attention
    assert (fused.coarse - plain.coarse).abs().max() < 1e-4 and (fused.feature - plain.feature).abs().max() < 1e-3
    for j in range(k):
        denoise = lambda xt, t: model.denoiser(xt, t / 1000, lpet[:, 1:2], plain.feature, dose)  # noqa: E731
        residual = diffusion.sample(denoise, noise[:, j : j + 1], model.schedule, 6, 0.9)
        assert (drawn[:, j : j + 1] - plain.coarse - residual_sd(dose) * residual).abs().max() < 1e-4


def test_a_slice_is_the_same_in_every_batch(model, monkeypatch):
    lpet, mr = head()
    for method in ("dpm++", "ddpm"):
        together = model.restore(Scan(lpet, mr), 2, method=method, precision="float32")
        with monkeypatch.context() as patch:
            patch.setattr("mfdiff_lite.model.BATCH", 1)
            alone = model.restore(Scan(lpet, mr), 2, method=method, precision="float32")
        scale = together.samples.view.scale.value
        assert np.abs(together.coarse - alone.coarse).max() < 1e-4 * scale, method
        assert np.abs(together.mean - alone.mean).max() < 2e-3 * scale, method  # samples are kept in float16


def test_without_samples_the_mean_is_the_coarse_estimate_and_everybody_copes(model):
    from mfdiff_lite.look import figure, report_html

    lpet, mr = head()
    scan = Scan(lpet, mr, spet=lpet)
    fast, one = (model.restore(scan, k, precision="float32") for k in (0, 1))
    np.testing.assert_array_equal(fast.mean, fast.coarse)
    assert np.abs(fast.coarse - one.coarse).max() < 1e-4 * fast.samples.view.scale.value
    assert fast.std is None and len(fast.samples) == 0 and list(fast.samples) == [] and fast.settings["n_samples"] == 0
    np.testing.assert_array_equal(fast.gate, one.gate)
    assert list(mf.compare(scan, fast).rows) == ["LPET", "Gaussian", "coarse"]
    assert "restored" in report_html(scan, fast, {}) and figure(scan, fast) is not None
    pulled = model.restore(scan, 0, fidelity=1.0, precision="float32")
    assert np.abs(pulled.mean - fast.mean).max() > 0.1


def test_qualities_are_arguments_of_restore(model):
    assert list(QUALITIES) == ["fast", "standard", "full"]
    scan = Scan(*head((48, 56, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single slice
        found = [model.restore(scan, steps=1, **chosen).settings["n_samples"] for chosen in QUALITIES.values()]
    assert found == [0, 8, 32]


# --- the weights that ship --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return mf.load_pretrained("cpu")


def test_the_shipped_weights_carry_their_card_and_are_small(shipped):
    from importlib.resources import files

    path = files("mfdiff_lite") / "weights" / "stage1.safetensors"
    assert path.stat().st_size <= 8e6
    for key in (
        "profile",
        "seed",
        "revision",
        "training_minutes",
        "trained_on",
        "validated_on",
        "validation_psnr_db",
        "licence",
    ):
        assert shipped.card.get(key) not in (None, "", []), key
    assert "unknown" not in shipped.card["revision"]
    results = Path(__file__).resolve().parents[1] / "results" / "adaptation.json"
    measured = json.loads(results.read_text(encoding="utf-8"))["setting"]["parent"]
    assert measured in (shipped.fingerprint, shipped.card["rounded_from"]), "the tables are of other weights"
    assert 2e6 <= shipped.n_parameters <= 4e6


@pytest.fixture(scope="module")
def test_case(shipped):
    """Twelve slices of a head of the test anatomy, never trained on."""
    patient = mf.virtual_patient(mf.load_anatomy("ahba-15697"), seed=123, slices=12)
    scan = mf.Scanner().scan(patient, dose_reduction=20)
    return scan, shipped.restore(scan, 4)


def test_the_shipped_weights_restore_an_unseen_head(test_case):
    scan, restored = test_case
    rows = mf.compare(scan, restored).rows
    assert rows["mean of 4 samples"]["psnr"] > rows["LPET"]["psnr"] + 5
    assert rows["mean of 4 samples"]["psnr"] > rows["Gaussian"]["psnr"] + 1
    assert rows["mean of 4 samples"]["psnr"] > rows["one sample"]["psnr"]
    total = restored.mean[scan.mask].sum() / scan.lpet[scan.mask].sum()
    assert total == pytest.approx(1, abs=0.03)


def test_half_precision_multiplications_do_not_change_the_picture(shipped, test_case, monkeypatch):
    """bfloat16 on any CPU, with or without the hardware for it: within 0.02 dB, and a hundredth of the brain's mean."""
    scan, _ = test_case
    cut = {key: getattr(scan, key)[..., 3:8] for key in ("lpet", "mr", "spet", "mask")}
    part = Scan(**cut, affine=scan.affine)
    plain = shipped.restore(part, 2, precision="float32")
    monkeypatch.setattr("mfdiff_lite.model.native_bfloat16", lambda device: True)
    half = shipped.restore(part, 2)
    scale = plain.samples.view.scale.value
    psnr = {key: metrics.psnr(r.mean, part.spet, part.mask) for key, r in (("plain", plain), ("half", half))}
    assert not np.array_equal(half.mean, plain.mean) and abs(psnr["half"] - psnr["plain"]) < 0.02
    assert np.sqrt(np.mean((half.mean - plain.mean)[part.mask] ** 2)) < 0.01 * scale


def test_the_shipped_weights_degrade_safely_with_a_wrong_mr(shipped, test_case):
    scan, restored = test_case
    wrong = Scan(scan.lpet, scan.mr[::-1, ::-1].copy(), scan.spet, mask=scan.mask, affine=scan.affine)
    none = Scan(scan.lpet, None, scan.spet, mask=scan.mask, affine=scan.affine)
    psnr = {
        name: mf.compare(s, {"x": shipped.restore(s, 4).mean}).rows["x"]["psnr"]
        for name, s in (("wrong", wrong), ("none", none))
    }
    gaussian = mf.compare(scan, restored).rows["Gaussian"]["psnr"]
    assert psnr["none"] > gaussian and psnr["wrong"] > gaussian


# ---- faults at the seams -------------------------------------------------------------------------------------------


def test_a_restoration_is_pickled_and_a_single_sample_is_one(model, monkeypatch):
    """Today's faults: `Can't pickle local object`, and samples[0] brought all K to the scan's grid."""
    lpet, mr = head()
    restored = model.restore(Scan(lpet, mr), 4, fidelity=0.3)
    again = pickle.loads(pickle.dumps(restored))
    np.testing.assert_array_equal(again.samples[2], restored.samples[2])
    np.testing.assert_array_equal(again.mean, restored.mean)
    back, calls = ModelView.restored, []
    monkeypatch.setattr(ModelView, "restored", lambda view, volume: calls.append(1) or back(view, volume))
    assert len(restored.samples) == 4 and restored.samples[0].shape == lpet.shape and len(calls) == 1
    assert len(restored.samples[1:3]) == 2 and len(list(restored.samples)) == 4
    np.testing.assert_array_equal(restored.samples[-1], restored.samples[3])
    with pytest.raises(IndexError):
        restored.samples[4]


def test_a_slice_without_neighbours_is_said_to_be_restored_badly(model):
    lpet, mr = head()
    with pytest.warns(UserWarning, match="scan: expected at least 3 slices, found 1"):
        model.restore(Scan(lpet[..., 2], mr[..., 2]), 1)
    taught = copy.deepcopy(model)
    taught.card = {"profile": {"thin": 0.1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taught.restore(Scan(lpet[..., 2], mr[..., 2]), 1)
        model.restore(Scan(lpet, mr), 1)


def test_the_card_is_as_safe_as_the_weights(model, tmp_path):
    """Today's fault: force=False replaced results.json beside a new results.safetensors."""
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(FileExistsError, match="results.json: exists already"):
        save_model(model, tmp_path / "results.safetensors", {}, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_half_precision_halves_the_file_and_comes_back_as_float32(model, tmp_path):
    sizes = {}
    for half in (False, True):
        path = save_model(model, tmp_path / f"{half}.safetensors", {}, half=half)
        sizes[half], found = path.stat().st_size, load_model(path, "cpu").state_dict()
        for key, value in model.state_dict().items():
            assert found[key].dtype == torch.float32
            assert (found[key] - value).abs().max() <= half * 2**-11 * value.abs().max()
    assert sizes[True] < 0.52 * sizes[False]
