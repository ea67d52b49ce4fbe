"""The page that restores in a browser (web/): its network against PyTorch, its JavaScript against the package, and the
page itself, opened from disk in headless Chromium."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from scipy import ndimage
from torch import nn

from mfdiff_lite import metrics
from mfdiff_lite.config import load_profile
from mfdiff_lite.diffusion import NoiseSchedule, sample
from mfdiff_lite.fusion import Fused
from mfdiff_lite.model import MFdiff, load_pretrained, paired_noise
from mfdiff_lite.phantom import ellipsoid
from mfdiff_lite.scan import Scan
from mfdiff_lite.view import ModelView, scale_mr

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "runs" / "browser"
_spec = importlib.util.spec_from_file_location("web_build", ROOT / "web" / "build.py")
web = importlib.util.module_from_spec(_spec)
sys.modules["web_build"] = web  # dataclasses look their module up there
_spec.loader.exec_module(web)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The shipped model, a thin slab of a stored case, and the network exported for its size."""
    model, case = load_pretrained("cpu"), web.CASES[1]
    stored = web.stored_case(model, case, web.simulated(case, 3), doses=())
    return model, stored, web.exported(model, *web.padded_size([stored]))


def session(network):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_exported_network_is_the_package_s(shipped):
    """Coarse estimate, gate and one sample from given noise, with an MR and without; and half of the bytes."""
    model, stored, network = shipped
    size = web.padded_size([stored])
    fusion, denoiser = (session(network[name]) for name in ("fusion", "denoiser"))
    rng = np.random.default_rng(0)
    lpet, mr = (ndimage.gaussian_filter(rng.standard_normal((1, 5, *size)), 1.5) for _ in range(2))
    lpet, mr = torch.tensor(1 + 2 * lpet).float().clip(min=0), torch.tensor(5 * mr).float()
    noise, dose = torch.from_numpy(rng.standard_normal((1, 1, *size), dtype=np.float32)), torch.tensor([50.0])
    for seen in (mr, torch.zeros_like(mr)):
        expected, fused = model.restore_slices(lpet, seen, dose, noise)
        outputs = fusion.run(None, {"lpet": lpet.numpy(), "mr": seen.numpy(), "dose": dose.numpy()})
        found = dict(zip(Fused._fields, outputs, strict=True))
        for name in ("coarse", "gate", "fit"):
            np.testing.assert_allclose(found[name], getattr(fused, name).numpy(), atol=1e-4)

        def denoise(xt, t, feature=found["feature"]):
            inputs = {"xt": xt, "time": t.float() / 1000, "lpet": lpet[:, 2:3], "dose": dose}
            feeds = {key: value.numpy() for key, value in inputs.items()}
            return torch.from_numpy(denoiser.run(None, feeds | {"feature": feature})[0])

        residual = sample(denoise, noise, model.schedule, web.STEPS, web.START, "dpm++")
        one = found["coarse"] + 0.2 * (50 / 20) ** 0.25 * residual.numpy()
        assert np.abs(one - expected.numpy()).max() < 1e-3
        assert np.abs(expected.numpy() - found["coarse"]).max() > 0.1  # there was something to agree on
    assert sum(map(len, network.values())) < 2.5 * model.n_parameters


def test_weights_that_half_precision_would_change_stay():
    values = {"even": np.arange(100, dtype=np.float32), "odd": np.full(100, 1 / 3, np.float32)}
    helper = web.onnx.helper
    nodes = [helper.make_node("Add", ["x", "even"], ["h"]), helper.make_node("Add", ["h", "odd"], ["y"])]
    ends = [helper.make_tensor_value_info(name, 1, [100]) for name in ("x", "y")]
    weights = [web.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    small = web.in_half_precision(model)
    kinds = {weight.name: weight.data_type for weight in small.graph.initializer}
    assert kinds == {"even.half": 10, "odd": 1}
    x = np.linspace(0, 1, 100, dtype=np.float32)
    found = session(small.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x + values["even"] + values["odd"], rtol=1e-6)


def test_a_model_without_denoiser_is_refused():
    model = MFdiff.from_profile(load_profile("smoke", denoiser_widths=()))
    with pytest.raises(web.WebError, match="expected a model with a denoiser"):
        web.exported(model, 32, 32)


# --- the JavaScript --------------------------------------------------------------------------------------------------


class ToyFusion(nn.Module):
    """Sees the side, so that a sample that was not mirrored back shows."""

    context = 3

    def forward(self, lpet, mr, dose):
        ramp = torch.linspace(0.5, 1.5, lpet.shape[-2])[:, None]
        coarse = lpet[:, 1:2] * ramp + 0.05 * mr[:, :1]
        half = coarse[..., ::2, ::2]
        return Fused(half, coarse, half * dose[:, None, None, None] / 100, half, dose / 100)


class ToyDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3), requires_grad=False)  # a model asks its weights for their device

    def forward(self, xt, time, lpet, feature, dose):
        ramp = torch.linspace(0.5, 1.5, lpet.shape[-2])[:, None]
        up = feature.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return self.share * xt * ramp + 0.1 * lpet + 0.02 * up + time[:, None, None, None]

    def given(self, lpet, feature, dose):
        def denoise(xt, time):
            k = len(xt) // len(lpet)
            return self(xt, time, *(one.repeat_interleave(k, 0) for one in (lpet, feature, dose)))

        return denoise


SCRIPT = """
const js = require(process.argv[1]);
const { settings, view: given, alone, noise, toy, image } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const volume = ({ data, shape }) => ({ data: Float32Array.from(data), shape });
const [height, width] = settings.padded;
const ramp = (i) => 0.5 + Math.floor(i / width) / (height - 1);
const network = {
  async fusion(lpet, mr, dose) {
    const size = height * width;
    const coarse = lpet.slice(size, 2 * size).map((v, i) => v * ramp(i) + 0.05 * mr[i]);
    const half = new Float32Array(size / 4);
    for (let i = 0; i < size / 4; i++) {
      const row = Math.floor(i / (width / 2)), column = i % (width / 2);
      half[i] = coarse[2 * row * width + 2 * column];
    }
    return { coarse, gate: half.map((v) => (v * dose) / 100), feature: half, fit: [dose / 100] };
  },
  async denoise(xt, time, { lpet, feature }) {
    const up = (i) => feature[Math.floor(i / width / 2) * (width / 2) + Math.floor((i % width) / 2)];
    return xt.map((v, i) => 0.3 * v * ramp(i) + 0.1 * lpet[i] + 0.02 * up(i) + time);
  },
};
(async () => {
  const scan = { lpet: volume(given.lpet), mr: volume(given.mr), dose: 50 };
  const view = js.modelView(scan, settings);
  const out = { value: view.value, mr: view.mr.data, stack: js.stack(view.lpet, 0, true, settings) };
  const maps = noise.map((map) => Float32Array.from(map));
  const options = { z: 1, samples: 5, fidelity: 0, noise: (pair) => maps[pair] };
  out.restored = await js.restoreSlice(network, view, 1, options, settings);
  const single = js.modelView({ lpet: volume(alone.lpet), mr: volume(alone.mr), dose: 50 }, settings);
  out.single = await js.restoreSlice(network, single, 0, { ...options, samples: 2, fidelity: 0.7 }, settings);
  out.bars = js.alphaBars(settings.schedule);
  out.times = js.sampleTimes(settings);
  out.toy = await js.sample(async (xt, t) => xt.map((v) => 0.4 * v + t / 2000), Float32Array.from(toy), settings);
  out.gaussian = js.gaussian(scan.lpet, [0.8, 1.5, 2.2]).data;
  const shape = scan.lpet.shape.slice(1), brain = image.brain, labels = image.labels;
  const [x, reference] = [Float32Array.from(image.x), Float32Array.from(image.reference)];
  out.psnr = js.psnr(x, reference, brain);
  out.contrast = js.lesionContrast(x, labels, 7, brain, shape, 2);
  out.none = js.lesionContrast(x, labels, 3, brain, shape, 2);
  const lesion = { z: 1, x: 20, y: 24, radius: 7, uptake: 9 };
  const after = js.painted(scan.lpet, [lesion], 2);
  out.painted = after.data;
  out.untouched = js.scannedAgain(scan.mr, scan.lpet, scan.lpet, 1).data;
  out.scanned = js.scannedAgain(scan.mr, scan.lpet, after, 1).data;
  out.moved = js.moved(scan.mr, 3, -2, 0).data;
  out.turned = js.moved(scan.mr, 0, 0, 90).data;
  const drawn = js.normalNoise(40000, 3);
  out.noise = [drawn, js.normalNoise(40000, 3), js.normalNoise(40000, 4)];
  console.log(JSON.stringify(out, (_, v) => (ArrayBuffer.isView(v) ? Array.from(v) : Number.isNaN(v) ? "nan" : v)));
})();
"""


def toy_scan(depth):
    """A head-like ball of even sides, not a multiple of 32, with an MR that has air."""
    rng = np.random.default_rng(5)
    x, y = np.ogrid[-34:34, -34:34]
    inside = ((x / 18.0) ** 2 + (y / 22.0) ** 2 < 1)[..., None] & np.ones(depth, bool)
    lpet = ndimage.gaussian_filter(inside * 8.0 + 0.05, (1, 1, 0)) * rng.uniform(0.5, 1.5, inside.shape)
    mr = inside * rng.uniform(50, 200, inside.shape)
    return Scan(lpet.astype(np.float32), mr.astype(np.float32), dose_reduction=50)


def first_axis(volume):
    return np.moveaxis(volume, -1, 0)


def boxed(view):
    return {name: first_axis(view.grid.to(getattr(view.scan, name))) for name in ("lpet", "mr")}


@pytest.mark.filterwarnings("ignore:.*never saw a slice repeated")
def test_javascript_computes_what_the_package_computes():
    node = shutil.which("node")
    if node is None:
        pytest.skip(
            "no test of the JavaScript: Node.js is missing; install it (Debian, Ubuntu: apt-get install nodejs)"
        )
    model = MFdiff.from_profile(load_profile("smoke"))
    model.fusion, model.denoiser = ToyFusion(), ToyDenoiser()
    scan = toy_scan(3)
    view = ModelView(scan, 3)
    slice_alone = Scan(scan.lpet[..., 0], scan.mr[..., 0], dose_reduction=50)
    view_alone = ModelView(slice_alone, 3)
    raw, raw_alone = boxed(view), boxed(view_alone)
    padded = tuple(view.slices(np.array([1]))["lpet"].shape[-2:])
    assert view.shape[0] < padded[0] and view.shape[1] <= padded[1]  # there is padding to get wrong
    settings = web.settings(model, padded)
    rng = np.random.default_rng(1)
    labels = np.zeros(view.shape[:2], np.uint8)
    labels[18:22, 20:23], labels[25:27, 20:23] = 7, 8
    brain = view.mask[..., 1]
    x, reference = (rng.uniform(1, 9, labels.shape).astype(np.float32) for _ in range(2))
    toy = rng.standard_normal(50).astype(np.float32)
    given = {
        "settings": settings,
        **{
            key: {name: {"data": v.ravel().tolist(), "shape": v.shape} for name, v in images.items()}
            for key, images in (("view", raw), ("alone", raw_alone))
        },
        "noise": paired_noise(6, padded, [0, 1]).numpy()[::2].reshape(3, -1).tolist(),
        "toy": toy.tolist(),
        "image": {"x": x, "reference": reference, "brain": brain.astype(int), "labels": labels},
    }
    given["image"] = {name: value.ravel().tolist() for name, value in given["image"].items()}
    done = subprocess.run(
        [node, "-e", SCRIPT, str(ROOT / "web" / "restore.js")],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    def near(name, expected, tolerance=1e-5):
        np.testing.assert_allclose(found[name], np.ravel(expected), rtol=tolerance, atol=tolerance, err_msg=name)

    near("value", view.scale.value)
    near("mr", first_axis(scale_mr(view.grid.to(scan.mr), view.mask)))
    near("stack", view.slices(np.array([0]))["lpet"][:, :, ::-1])
    near("bars", model.schedule._alpha_bar[:-1].numpy(), 2e-6)
    assert found["times"] == model.schedule.times(web.STEPS, web.START)
    expected = sample(
        lambda xt, t: 0.4 * xt + t[:, None] / 2000, torch.from_numpy(toy)[None], NoiseSchedule(), web.STEPS, web.START,
        "dpm++",
    )  # fmt: skip
    near("toy", expected.numpy())
    near("gaussian", ndimage.gaussian_filter(raw["lpet"], (0.8, 1.5, 2.2), mode="nearest"))
    near("psnr", metrics.psnr(x, reference, brain))
    volumes = (x[..., None], labels[..., None], 7, brain[..., None])
    near("contrast", metrics.lesion_contrast(*volumes))
    assert found["none"] == "nan"
    check_restored(found["restored"], model.restore(scan, 5, precision="float32"), view, 1)
    noise = model.restore(slice_alone, 2, fidelity=0.7, seed=0, precision="float32")
    own = paired_noise(2, padded, [0, 0]).numpy()[0] - paired_noise(2, padded, [0, 1]).numpy()[0]
    assert np.abs(own).max() > 0.1  # other noise: only the mean of the pair can agree, as this toy is linear
    check_restored(found["single"], noise, view_alone, 0, names=("mean", "coarse", "gate"))
    check_edits(found, raw)


def check_restored(found, expected, view, z, names=("mean", "std", "coarse", "gate")):
    """Inside the box without its rim; the package keeps samples in half precision."""
    inner = (slice(2, -2), slice(2, -2))
    for name in names:
        image = np.asarray(getattr(expected, name))
        image = image[view.grid.box][..., z] if image.ndim == 3 else image[view.grid.box[:2]]
        page = np.reshape(found[name], view.shape[:2])
        np.testing.assert_allclose(page[inner], image[inner], atol=2e-3 * image.max(), err_msg=name)
        assert image[inner].std() > 0, name


def check_edits(found, raw):
    shape = raw["lpet"].shape
    edits = {name: np.reshape(found[name], shape) for name in ("painted", "untouched", "scanned", "moved", "turned")}
    near, share = ellipsoid(shape, np.array([1, 20, 24]), 7, np.ones(3))
    expected = raw["lpet"].copy()
    expected[near] += share * (9 - expected[near])
    np.testing.assert_allclose(edits["painted"], expected, atol=1e-5)
    np.testing.assert_array_equal(edits["untouched"], raw["mr"])
    old, new = (ndimage.gaussian_filter(v, (0, 1, 1), mode="nearest") for v in (raw["lpet"], expected))
    growth = np.minimum(np.sqrt(new / np.maximum(old, 1e-6)), 3)
    rescanned = np.where(old == new, raw["mr"], np.maximum(new + (raw["mr"] - old) * growth, 0))
    np.testing.assert_allclose(edits["scanned"], rescanned, rtol=1e-4, atol=1e-3)
    shifted = np.zeros_like(raw["mr"])
    shifted[:, 3:, :-2] = raw["mr"][:, :-3, 2:]
    np.testing.assert_allclose(edits["moved"], shifted, atol=1e-4)
    turned = ndimage.rotate(raw["mr"], 90, axes=(2, 1), reshape=False, order=1, prefilter=False)
    np.testing.assert_allclose(edits["turned"][:, 2:-2, 2:-2], turned[:, 2:-2, 2:-2], atol=1e-2)
    first, again, other = map(np.array, found["noise"])
    assert np.array_equal(first, again) and abs(np.corrcoef(first, other)[0, 1]) < 0.03
    assert abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.03 and np.abs(first).max() < 6


def test_rounding_keeps_parts_of_an_image():
    image = np.random.default_rng(0).gamma(2, 9, (4, 20, 20)).astype(np.float32)
    rounded = web.in_16_bits(image)
    assert np.abs(rounded - image).max() <= web.step(image)
    assert not (rounded[image > 0] == 0).any()
    part = rounded[:2, :7]
    np.testing.assert_array_equal(web.in_16_bits(part), part)


# --- the runtime and the folder --------------------------------------------------------------------------------------


def test_a_runtime_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "other.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(web.WebError, match="expected onnxruntime-web@"):
        web.fetched(other)
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    with pytest.raises(web.WebError, match="expected npm and a network"):
        web.fetched(tmp_path / "absent" / "package.tgz")
    assert not list((tmp_path / "absent").iterdir())


def test_module_becomes_a_script():
    script = web.as_classic_script("var a=1,b=import.meta.url;export{a as one,b as default};\n//# sourceMappingURL=x")
    assert script == "var a=1,b=self.location.href;const ort = {one: a, default: b};\n"
    with pytest.raises(web.WebError, match="found 0"):
        web.as_classic_script("var a=1")


def test_a_folder_of_the_reader_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(web.WebError, match="is not an earlier page"):
        web.build(None, [], {}, {}, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def chromium():
    """launch(*more arguments): a browser without a network."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no browser test: Playwright is missing; install it: pip install playwright"
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser test: Chromium is missing; install it (Debian, Ubuntu: apt-get install chromium)")
    if not web.TARBALL.is_file():
        pytest.skip(f"no browser test: {web.PACKAGE} is not on this machine; 'make web' fetches it")
    with sync_api.sync_playwright() as playwright:

        def launch(*more):
            always = ["--headless", "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
            return playwright.chromium.launch(executable_path=path, args=[*always, *more])

        yield launch


@pytest.fixture(scope="module")
def site(chromium, shipped, tmp_path_factory):
    model, stored, network = shipped
    out = tmp_path_factory.mktemp("web") / "site"
    web.build(model, [stored], network, web.runtimes(web.fetched()), out)
    return out


def told(page, start):
    page.wait_for_function(
        "s => RegExp(`^(${s}|It stopped)`).test(document.getElementById('told').textContent)", arg=start
    )
    assert page.inner_text("#told").startswith(start), page.inner_text("#told")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_page_from_disk_restores_what_the_package_restores(chromium, site):
    browser = chromium("--disable-gpu")
    try:
        use_page(browser.new_page(viewport={"width": 1280, "height": 1000}), site)
    finally:
        browser.close()


def use_page(page, out):
    errors, asked = [], set()
    page.set_default_timeout(180_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.add(request.url.partition(":")[0]))
    page.goto((out / "try.html").as_uri())

    def picture(name):
        return page.evaluate(f"document.getElementById('pane-{name}').toDataURL()")

    told(page, "Done")
    assert page.inner_text("#device").startswith("Computes on: CPU (WebAssembly)")
    page.click("#check")
    page.wait_for_function("MFDIFF.checked")
    assert page.evaluate("MFDIFF.checked.agreement") > 60
    assert page.evaluate("MFDIFF.checked.gate") < 1e-3

    # The reader's hands: a lesion with the keyboard, then no MR; each must change what is shown.
    page.fill("#samples", "1")
    told(page, "Done")
    before = {name: picture(name) for name in ("lpet", "spet", "mean", "gate", "mr")}
    page.check("input[value=paint]")
    page.focus("#pane-lpet")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    told(page, "Done: coarse estimate")
    page.wait_for_function("MFDIFF.page.state.result && MFDIFF.page.state.result.samples === 1")
    assert "your lesion 1" in page.inner_text("#numbers")
    assert all(picture(name) != before[name] for name in ("lpet", "spet", "mean"))
    page.select_option("#mr", "none")
    page.wait_for_function("MFDIFF.page.state.result && MFDIFF.page.state.result.samples === 1")
    assert page.evaluate("Math.max(...MFDIFF.page.state.result.gate)") == 0
    page.click("#restore")
    page.click("#cancel")
    told(page, "Cancelled")
    SHOTS.mkdir(parents=True, exist_ok=True)
    for width, theme in ((420, "light"), (1280, "light"), (1280, "dark"), (1920, "dark")):  # for people to look at
        page.set_viewport_size({"width": width, "height": 1000})
        page.emulate_media(color_scheme=theme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=SHOTS / f"web-{width}-{theme}.png", full_page=True)
    assert not errors and asked <= {"file", "data", "blob"}, (errors, asked)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_webgpu_restores_what_the_package_restores(chromium, shipped, site, tmp_path, monkeypatch):
    """With an adapter in software, which the page takes only when it is told to."""
    browser = chromium("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    try:
        page = browser.new_page()
        page.set_default_timeout(1_700_000)
        page.goto((site / "try.html").as_uri())
        found = "navigator.gpu ? navigator.gpu.requestAdapter().then((one) => one && one.info.isFallbackAdapter) : null"
        if not page.evaluate(found):
            pytest.skip("no test of WebGPU: this browser gives no adapter in software; a newer Chromium does")
        page.wait_for_function("MFDIFF.settled")
        assert page.inner_text("#device").startswith("Computes on: CPU") and not page.evaluate("MFDIFF.gpuChecked")
        model, _, network = shipped
        monkeypatch.setitem(web.CHECKED, "samples", 1)  # such an adapter takes half a minute for a sample
        stored = web.stored_case(model, web.CASES[1], web.simulated(web.CASES[1], 3), doses=())
        web.build(model, [stored], network, web.runtimes(web.fetched()), tmp_path / "site")
        page.goto((tmp_path / "site" / "try.html").as_uri() + "?gpu=software")
        page.wait_for_function("MFDIFF.settled")
        assert page.evaluate("MFDIFF.gpuChecked.agreement") > 60
        assert page.evaluate("MFDIFF.gpuChecked.gate") < 1e-3
        assert page.inner_text("#device") == "Computes on: GPU (WebGPU)."
    finally:
        browser.close()


BAD_GPUS = {  # what is put round the answers of a good worker: of its start, of a check, and then of a restoration
    "does not start": "answer = () => { throw new Error('no device'); };",
    "is 1 % off": """const right = answer; answer = async (question) => {
        const { coarse, ...rest } = await right(question);
        return coarse ? { coarse: coarse.map((value) => 1.01 * value), ...rest } : rest;
    };""",
    "is slow": """const right = answer; let asked = 0; answer = async (question) => {
        if (++asked > 1 + 26) await new Promise((done) => setTimeout(done, 20_000));
        return right(question);
    };""",
    "stops later": """const right = answer; let left = 1 + 26 + 2 + 3; answer = (question) => {
        if (left-- < 1) throw new Error("the device was lost");
        return right(question);
    };""",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", BAD_GPUS)
def test_a_bad_gpu_leaves_it_to_the_cpu(chromium, site, fault):
    """In silence, with the right result. The GPU is a stand-in: WebAssembly with a fault."""
    browser = chromium("--disable-gpu")
    try:
        page, errors = browser.new_page(), []
        page.set_default_timeout(180_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(
            "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => ({ info: {} }) } });"
        )
        files = web.runtimes(web.fetched())["cpu"]
        fake = web._script("gpu", files | {"worker": files["worker"] + BAD_GPUS[fault]})
        page.route("**/gpu.js", lambda route: route.fulfill(body=fake, content_type="text/javascript"))
        page.goto((site / "try.html").as_uri())
        page.wait_for_function("MFDIFF.settled")
        if fault == "stops later":
            assert page.evaluate("MFDIFF.gpuChecked.agreement") > 60
            assert page.inner_text("#device") == "Computes on: GPU (WebGPU)."
            page.click("#restore")
            page.wait_for_function("document.getElementById('device').textContent.includes('CPU')")
            told(page, "Done")
        elif fault == "is slow":
            assert page.evaluate("MFDIFF.gpuChecked.agreement") > 60
        elif fault == "is 1 % off":
            assert 30 < page.evaluate("MFDIFF.gpuChecked.agreement") < 60
        assert page.inner_text("#device").startswith("Computes on: CPU (WebAssembly)")
        page.click("#check")
        page.wait_for_function("MFDIFF.checked")
        assert page.evaluate("MFDIFF.checked.agreement") > 60
        assert not errors
    finally:
        browser.close()
