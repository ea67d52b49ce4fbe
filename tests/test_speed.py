"""The benchmarks of speed and the GPU session: right arithmetic, at tiny sizes on the CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mfdiff_lite.config import load_profile
from mfdiff_lite.model import MFdiff
from mfdiff_lite.scanner import Scanner

ROOT = Path(__file__).parents[1]
NAMES = ("results", "osem", "bench", "gpu")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    """The two scripts, as when they are run from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: script(name) for name in NAMES}
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def small(monkeypatch):
    """An untrained model of the smallest size in the place of the shipped one."""
    model = MFdiff.from_profile(load_profile("smoke")).eval()
    torch.nn.init.normal_(model.denoiser.head.weight, std=0.05)
    return model


def test_tasks_are_timed_in_turn_after_one_round_to_warm_up(scripts, monkeypatch):
    order = []
    monkeypatch.setattr(scripts["bench"].time, "process_time", lambda: next(clock))
    # The first round does not count, nor does it read the clock's end.
    clock = iter([0.0, 0.0, 0.0, 1.0, 1.0, 6.0, 6.0, 9.0, 9.0, 16.0])
    found = scripts["bench"].in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == list("ababab") and found == {"a": 2.0, "b": 6.0}


def test_the_plain_model_restores_the_same(scripts, small):
    scan = scripts["bench"].full_head(2, 64)
    fast = small.restore(scan, 4, precision="float32")
    with scripts["bench"].plain(small):
        plain = small.restore(scan, 4)
    assert np.abs(fast.coarse - plain.coarse).max() < 1e-4 * fast.samples.view.scale.value
    assert np.abs(fast.mean - plain.mean).max() < 3e-3 * fast.samples.view.scale.value
    assert fast.samples.view.shape == (64, 64, 2) and scripts["bench"].full_head(1).lpet.shape == (128, 128, 1)


def test_a_product_is_counted_as_two_operations_an_entry(scripts):
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert scripts["bench"].operations(lambda: a @ b) == 2 * 3 * 5 * 7


def test_the_rows_are_the_ratios_of_what_was_measured(scripts):
    rates = {"ours, float32": 8.0, "ours, bfloat16": 20.0, "ours fast, float32": 30.0, "ours fast, bfloat16": 50.0}
    rates |= {"MONAI DiffusionModelUNet, float32": 0.5, "diffusers UNet2DModel, bfloat16": 2.0}
    costs = ((1, 16, 1), (4, 64, 1), (17.6, 256, 1.1))
    found = {
        "restoring": {
            "slices_a_second": rates,
            "achieved_over_peak": {"float32": 0.5},
            "parameters": dict.fromkeys(("ours", *scripts["bench"].PEERS), 3e6),
        },
        "training": {
            "slices_a_second": {f"{name}, float32": 2.0 for name in scripts["bench"].PEERS}
            | {"ours, float32": 5.0, "ours, bfloat16": 6.0, "diffusers UNet2DModel, bfloat16": 3.0},
            "achieved_over_peak": 0.4,
        },
        "volume": {"cpu_seconds": {"before": 9.0, "now": 3.0}, "psnr_db": {"before": 26.0, "now": 25.99}},
        "reconstruction": {"cpu_seconds": {"ASTRA": 8.0, "SciPy": 4.0, "PyTorch": 2.0}},
        "growth": {"slices": [dict(zip(("cpu_seconds", "slices", "peak_gb"), one, strict=True)) for one in costs]},
    }
    targets = scripts["results"].Targets("speed", scripts["bench"].GOALS)
    scripts["bench"].fill(targets, found)
    values = {row["id"].partition(".")[2]: row["value"] for row in targets.rows}
    wanted = {"restore": 10, "fast": 25, "training": 2, "volume": 3, "volume_same": 0.01, "peak_restore": 50}
    wanted |= {"peak_training": 40, "osem": 4, "linear": 10, "memory": 1.1}
    assert values == pytest.approx(wanted)
    assert set(values) == set(scripts["bench"].GOALS)
    table = scripts["bench"].block(found)
    assert (
        "| ours | 3.0 M | 8.00 | 20.00 | 5.00 | 6.00 |" in table
        and "0.50 | - | 2.00 | - |" in table
        and "deeper" in table
    )


@pytest.mark.parametrize("settings", [{}, {"model_psf": False, "post_filter": 4.0}], ids=["default", "other"])
def test_pytorch_reconstructs_what_the_scanner_does(scripts, settings):
    scanner = Scanner(matrix=64, pixel_size=4.0, angles=84, psf_fwhm=6.0, **settings)
    x, y = np.indices((64, 64)) - 31.5
    head = (np.hypot(x, y) < 20)[..., None].repeat(3, 2).astype(np.float32)
    counts = scanner.acquire(head * (10 + 20 * (np.hypot(x - 8, y) < 3))[..., None], 0.096 * head, seed=0)
    wanted, found = scanner.reconstruct(counts), scripts["osem"].reconstruct(scanner, counts)
    assert found.shape == wanted.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * wanted.max())


def test_an_absent_package_is_named_with_what_to_install(scripts):
    with pytest.raises(ImportError, match=r"expected the package nobody_has_this, found none .*'\.\[bench\]'"):
        scripts["bench"].needed("nobody_has_this")


def test_a_peer_learns_from_the_same_batch_and_restores(scripts):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    peer = scripts["bench"].Peer("diffusers UNet2DModel")
    lpet, mr, spet = torch.rand(3, 1, 1, 32, 32)
    batch = {
        "lpet": lpet.repeat(1, 3, 1, 1),
        "mr": mr.repeat(1, 3, 1, 1),
        "spet": spet,
        "weight": torch.ones_like(spet),
    }
    loss = scripts["bench"].peer_loss(peer, batch, torch.tensor([500]), torch.randn(1, 1, 32, 32))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in peer.parameters())
    assert peer.restore(lpet, mr, torch.randn(1, 1, 32, 32), steps=1).shape == (1, 1, 32, 32)
    assert 2e6 < sum(p.numel() for p in peer.parameters()) < 4e6


# ---- the GPU session ------------------------------------------------------------------------------------------------


@pytest.fixture
def session(scripts, small, tmp_path, monkeypatch):
    gpu = scripts["gpu"]
    monkeypatch.setattr(gpu, "load_pretrained", lambda device: small)
    monkeypatch.setattr(gpu, "PEERS", ())
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "cache"))
    return gpu.Session(torch.device("cpu"), tmp_path / "gpu", 0.01, True)


def test_without_a_gpu_it_says_so_and_stops(scripts, tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(scripts["gpu"].main)
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "gpu")])
    assert done.exit_code == 0 and "No GPU" in done.stdout and not (tmp_path / "gpu").exists()


def test_the_parts_run_on_the_cpu_and_are_not_repeated(scripts, session, capsys):
    gpu = scripts["gpu"]
    parts = ["check", "speed", "simulate", "train"]
    everything = gpu.run(session, parts)
    assert everything["missing"] == [] and set(everything["parts"]) == set(parts), capsys.readouterr().out
    done = everything["parts"]
    assert done["check"]["largest, float32"] == 0 and done["simulate"]["relative difference"] < 1e-4
    assert all(rate > 0 for rate in done["speed"]["restore"].values()) and len(done["speed"]["restore"]) == 4
    trained = done["train"]
    assert trained["steps"] == 2 and trained["curve"][-1]["step"] == 2 and trained["file_mb"] < 16
    assert (session.out / "stage1-gpu.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in session.out.glob("*.json") if path.name != "gpu.json"}
    assert gpu.run(session, parts)["parts"] == done
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_part_that_fails_does_not_stop_the_next(scripts, session, monkeypatch):
    gpu = scripts["gpu"]

    def broken(session):
        raise RuntimeError("no memory")

    monkeypatch.setattr(gpu, "PARTS", {"check": broken, "speed": lambda session: {"fine": 1}})
    everything = gpu.run(session, ["check", "speed"])
    assert everything["missing"] == ["check"] and everything["parts"]["speed"]["fine"] == 1
    assert json.loads((session.out / "gpu.json").read_text())["missing"] == ["check"]


def test_the_weights_of_every_size_stay_small_in_half_precision(scripts):
    gpu = scripts["gpu"]
    for size in gpu.SIZES:
        session = gpu.Session(torch.device("cpu"), Path("."), 1, False)
        model = MFdiff.from_profile(gpu.sized(session, size))
        assert 2 * model.n_parameters < 0.98 * gpu.LARGEST_FILE, size
