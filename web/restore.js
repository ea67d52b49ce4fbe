// What surrounds the network: scales, padding, sampler, lesions, numbers. The same as in the package, module by module;
// tests/test_web.py holds every function here against it.
//
// A volume is {data: Float32Array, shape: [Z, X, Y]}, slice by slice; an image is a Float32Array of X rows of Y.
// `settings` comes from web/build.py, so that no number of the package is written a second time.

const MFDIFF = { cases: [], models: null, cpu: null, gpu: null, settings: null };

// --- stored bytes ----------------------------------------------------------------------------------------------------

async function bytesOf(text) {
  const response = await fetch(`data:application/gzip;base64,${text}`);
  return new Response(response.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function unpacked({ fields, data }) {
  const buffer = await bytesOf(data);
  const arrays = {};
  for (const [name, { kind, shape, scale, offset }] of Object.entries(fields)) {
    const size = shape.reduce((a, b) => a * b, 1);
    const stored = new globalThis[kind](buffer, offset, size);
    arrays[name] = { shape, data: kind === "Uint16Array" ? Float32Array.from(stored, (v) => v * scale) : stored };
  }
  return arrays;
}

// --- filters and scales (view.py) ------------------------------------------------------------------------------------

// SciPy's gaussian_filter, mode "nearest", 4 SD wide; sds: [axial, x, y] in voxels.
function gaussian(volume, sds) {
  const { shape } = volume;
  const strides = [shape[1] * shape[2], shape[2], 1];
  let source = volume.data;
  sds.forEach((sd, axis) => {
    if (!(sd > 0)) return;
    const radius = Math.floor(4 * sd + 0.5);
    const taps = Float64Array.from({ length: 2 * radius + 1 }, (_, i) => Math.exp(-0.5 * ((i - radius) / sd) ** 2));
    const total = taps.reduce((a, b) => a + b);
    const count = shape[axis], stride = strides[axis];
    const result = new Float32Array(source.length);
    for (let index = 0; index < source.length; index++) {
      const at = Math.floor(index / stride) % count;
      let sum = 0;
      for (let k = -radius; k <= radius; k++) {
        const near = Math.min(Math.max(at + k, 0), count - 1);
        sum += taps[k + radius] * source[index + (near - at) * stride];
      }
      result[index] = sum / total;
    }
    source = result;
  });
  return { shape, data: source === volume.data ? source.slice() : source };
}

function percentile(values, percent) {
  const sorted = Float64Array.from(values).sort();
  const place = (percent / 100) * (sorted.length - 1);
  const low = Math.floor(place), high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
}

// The LPET's own scale: its mean inside a rough brain becomes 1. The package also looks for what is no brain (a marker,
// a block of zeros); the stored cases have none inside the head.
function activityScale(lpet, settings) {
  const smooth = gaussian(lpet, Array(3).fill(settings.smooth_sd)).data;
  let top = 0;
  for (const value of smooth) top = Math.max(top, value);
  const limit = 0.4 * percentile(smooth.filter((value) => value > 0.1 * top), 95);
  const mask = Uint8Array.from(smooth, (value) => value > limit);
  let sum = 0, count = 0;
  mask.forEach((inside, i) => { if (inside) { sum += lpet.data[i]; count++; } });
  return { mask, value: sum / count };
}

function scaleMr(mr, mask) {
  let count = 0, sum = 0, squares = 0, top = 0;
  mr.data.forEach((value, i) => {
    top = Math.max(top, Math.abs(value));
    if (mask[i]) { sum += value; count++; }
  });
  const mean = sum / count;
  mr.data.forEach((value, i) => { if (mask[i]) squares += (value - mean) ** 2; });
  const spread = Math.sqrt(squares / count);
  const flat = spread <= 1e-6 * Math.max(top, 1e-12);
  const scaled = (value) => (flat || value === 0 ? 0 : Math.min(Math.max((value - mean) / spread, -3), 4));
  return { shape: mr.shape, data: Float32Array.from(mr.data, scaled) };
}

// A scan {lpet, mr, dose} as the model sees it.
function modelView(scan, settings) {
  const { mask, value } = activityScale(scan.lpet, settings);
  const lpet = { shape: scan.lpet.shape, data: Float32Array.from(scan.lpet.data, (v) => v / value) };
  return { lpet, mr: scaleMr(scan.mr, mask), dose: scan.dose, value, coarse: {} };
}

// Slice z with its neighbours, (context, H, W): ends repeat, sides are padded as their edges are; mirrored: x reversed.
function stack(volume, z, mirrored, { context, padded: [height, width] }) {
  const [depth, rows, columns] = volume.shape;
  const result = new Float32Array(context * height * width);
  for (let n = 0; n < context; n++) {
    const near = Math.min(Math.max(z + n - (context >> 1), 0), depth - 1);
    for (let x = 0; x < height; x++) {
      const first = (near * rows + Math.min(x, rows - 1)) * columns;
      const place = (n * height + (mirrored ? height - 1 - x : x)) * width;
      result.set(volume.data.subarray(first, first + columns), place);
      result.fill(volume.data[first + columns - 1], place + columns, place + width);
    }
  }
  return result;
}

// An image of H / factor rows of the network -> X rows of Y, mirrored back.
function cut(image, [rows, columns], mirrored, { padded: [height, width] }, factor = 1) {
  const result = new Float32Array(rows * columns);
  for (let x = 0; x < rows; x++) {
    const from = Math.floor((mirrored ? height - 1 - x : x) / factor) * (width / factor);
    for (let y = 0; y < columns; y++) result[x * columns + y] = image[from + Math.floor(y / factor)];
  }
  return result;
}

// --- diffusion (diffusion.py) ----------------------------------------------------------------------------------------

function alphaBars(length) {
  const f = Float64Array.from({ length: length + 1 }, (_, i) => {
    return Math.cos((((i / length + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  });
  let product = 1;
  return Float32Array.from({ length }, (_, i) => (product *= 1 - Math.min(1 - f[i + 1] / f[i], 0.999)));
}

function sampleTimes({ steps, start, schedule }) {
  return Array.from({ length: steps + 1 }, (_, i) => Math.round(start * schedule * (1 - i / steps)) - 1);
}

// DPM-Solver++(2M) from a warm start without signal: noise -> x0. denoise(x_t, t): v.
async function sample(denoise, noise, settings) {
  const bars = alphaBars(settings.schedule), times = sampleTimes(settings);
  const alphaBar = (t) => (t < 0 ? 1 : bars[t]);
  const logSnr = (a) => 0.5 * (Math.log(a) - Math.log1p(-a));
  let xt = noise.map((value) => Math.sqrt(1 - alphaBar(times[0])) * value), previous = null;
  for (let i = 0; i < settings.steps; i++) {
    const a = alphaBar(times[i]), b = alphaBar(times[i + 1]);
    const v = await denoise(xt, times[i]);
    // 1. What the denoiser thinks is signal.
    const guess = xt.map((value, k) => Math.sqrt(a) * value - Math.sqrt(1 - a) * v[k]);
    // 2. Extrapolate it linearly in log-SNR; the last step has nothing to extrapolate to.
    let direction = guess;
    if (previous && times[i + 1] >= 0) {
      const ratio = (logSnr(a) - previous.snr) / (logSnr(b) - logSnr(a));
      direction = guess.map((value, k) => value + (value - previous.guess[k]) / (2 * ratio));
    }
    previous = { guess, snr: logSnr(a) };
    // 3. Exact solution of the linear part of the ODE between the two times.
    const sigma = Math.sqrt((1 - b) / (1 - a)), gain = Math.sqrt(b) - sigma * Math.sqrt(a);
    xt = xt.map((value, k) => sigma * value + gain * direction[k]);
  }
  return xt;
}

// Normal noise of this page, n numbers, the same for the same seed (not the package's: that is NumPy's generator).
function normalNoise(n, seed) {
  let state = (seed * 2654435761 + 1) >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return Float32Array.from({ length: n }, () => {
    return Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  });
}

// --- restoring (model.py) --------------------------------------------------------------------------------------------

const residualSd = (dose) => 0.2 * (dose / 20) ** 0.25;

async function fuse(network, view, z, mirrored, settings) {
  const lpet = stack(view.lpet, z, mirrored, settings), mr = stack(view.mr, z, mirrored, settings);
  const fused = await network.fusion(lpet, mr, view.dose);
  const size = settings.padded[0] * settings.padded[1], half = (settings.context >> 1) * size;
  return { ...fused, lpet: lpet.slice(half, half + size) };
}

// Slice z of a view. samples: K; noise(pair): a map (H, W); fidelity in [0, 1]; show(result): called with what is known
// so far. Every second pair of samples sees left and right exchanged, as in the package.
async function restoreSlice(network, view, z, { samples, fidelity, noise, show = () => {} }, settings) {
  const plane = view.lpet.shape.slice(1), sides = samples > 2 ? [false, true] : [false];
  const fused = [], cutOut = (image, mirrored, factor) => cut(image, plane, mirrored, settings, factor);
  for (const mirrored of sides) fused.push(await fuse(network, view, z, mirrored, settings));
  const estimates = fused.map(({ coarse }, side) => cutOut(coarse, sides[side]));
  const coarse = estimates[0].map((_, i) => estimates.reduce((sum, image) => sum + image[i], 0) / estimates.length);
  const gate = cutOut(fused[0].gate, false, 2), fit = fused[0].fit[0];
  const correction = await measuredBeyondNoise(network, view, z, coarse, fidelity, settings);
  const finish = (images) => ({ ...summary(images, coarse, correction, view.value), gate, fit });
  show(finish([]));
  const drawn = [], s = residualSd(view.dose);
  const draw = async (i) => {
    const side = (i >> 1) % 2 && sides.length > 1 ? 1 : 0, map = noise(i >> 1);
    const start = i % 2 ? map.map((value) => -value) : map;
    const denoise = (xt, t) => network.denoise(xt, t / settings.schedule, fused[side], view.dose, i);
    const residual = cutOut(await sample(denoise, start, settings), sides[side]);
    drawn.push(residual.map((value, k) => coarse[k] + s * value));
    show(finish(drawn));
  };
  const lanes = network.lanes || 1, order = Array.from({ length: samples }, (_, i) => i);
  await Promise.all(order.slice(0, lanes).map(async (lane) => {
    for (let i = lane; i < samples; i += lanes) await draw(i);
  }));
  if (!fidelity || !samples) return finish(drawn);
  // With the samples there is a better estimate than the coarse one to compare the LPET with.
  const mean = meanOf(drawn);
  const better = await measuredBeyondNoise(network, view, z, mean, fidelity, settings);
  return { ...summary(drawn, coarse, better, view.value), gate, fit };
}

const meanOf = (images) => images[0].map((_, i) => images.reduce((sum, image) => sum + image[i], 0) / images.length);

// Mean, SD and coarse estimate in activity, not below 0.
function summary(images, coarse, correction, value) {
  const inUnits = (image) => image.map((scaled, i) => Math.max(scaled + correction[i], 0) * value);
  const mean = images.length ? meanOf(images) : coarse;
  const spread = (i) => Math.sqrt(images.reduce((sum, image) => sum + (image[i] - mean[i]) ** 2, 0) / (images.length - 1));
  const std = images.length > 1 ? mean.map((_, i) => spread(i) * value) : new Float32Array(mean.length);
  return { mean: inUnits(mean), std, coarse: inUnits(coarse), samples: images.length };
}

// What fidelity puts back: the part of LPET - estimate that is too smooth to be noise. The package compares with the
// mean of the samples in every slice; here the neighbours of slice z are compared with their coarse estimates.
async function measuredBeyondNoise(network, view, z, estimate, fidelity, settings) {
  if (!fidelity) return new Float32Array(estimate.length);
  const [depth, ...plane] = view.lpet.shape, size = estimate.length;
  const difference = view.lpet.data.slice();
  for (let n = 0; n < depth; n++) {
    if (n !== z && !view.coarse[n]) {
      view.coarse[n] = cut((await fuse(network, view, n, false, settings)).coarse, plane, false, settings);
    }
    const known = n === z ? estimate : view.coarse[n];
    for (let i = 0; i < size; i++) difference[n * size + i] -= known[i];
  }
  const smooth = gaussian({ shape: view.lpet.shape, data: difference }, Array(3).fill(settings.fidelity_sd));
  return smooth.data.slice(z * size, (z + 1) * size).map((value) => fidelity * value);
}

// --- what the reader does to a case ----------------------------------------------------------------------------------

// How much of each voxel a ball fills, [0, 1] (phantom.py, `ellipsoid`): calls each(index, share).
function ball([depth, rows, columns], { z, x, y, radius }, voxel, each) {
  const reach = Math.ceil(radius / voxel) + 1;
  for (let k = Math.max(z - reach, 0); k <= Math.min(z + reach, depth - 1); k++) {
    for (let i = Math.max(x - reach, 0); i <= Math.min(x + reach, rows - 1); i++) {
      for (let j = Math.max(y - reach, 0); j <= Math.min(y + reach, columns - 1); j++) {
        const distance = voxel * Math.hypot(k - z, i - x, j - y);
        const share = Math.min(Math.max((radius - distance) / voxel + 0.5, 0), 1);
        if (share > 0) each((k * rows + i) * columns + j, share);
      }
    }
  }
}

// An activity with painted lesions, each towards its own uptake [kBq/mL].
function painted(activity, lesions, voxel) {
  const data = activity.data.slice();
  for (const lesion of lesions) {
    ball(activity.shape, lesion, voxel, (i, share) => { data[i] += share * (lesion.uptake - data[i]); });
  }
  return { shape: activity.shape, data };
}

// A stand-in for the scanner: an image of another activity. The mean follows the Gaussian that fits the scanner best;
// the noise already there is kept, and its SD grows with the root of the mean, as that of counts does.
function scannedAgain(image, before, after, sd) {
  const [old, now] = [before, after].map((activity) => gaussian(activity, [0, sd, sd]).data);
  const data = image.data.map((value, i) => {
    if (old[i] === now[i]) return value;
    const growth = Math.min(Math.sqrt(Math.max(now[i], 0) / Math.max(old[i], 1e-6)), 3);
    return Math.max(now[i] + (value - old[i]) * growth, 0);
  });
  return { shape: image.shape, data };
}

// Every slice turned by `degrees` about its centre, then moved by (dx, dy) voxels; linear, nothing beyond the edge.
function moved({ data, shape }, dx, dy, degrees) {
  if (!dx && !dy && !degrees) return { data: data.slice(), shape };
  const [depth, rows, columns] = shape, result = new Float32Array(data.length);
  const cos = Math.cos((degrees * Math.PI) / 180), sin = Math.sin((degrees * Math.PI) / 180);
  const cx = (rows - 1) / 2, cy = (columns - 1) / 2;
  for (let x = 0; x < rows; x++) {
    for (let y = 0; y < columns; y++) {
      const u = x - dx - cx, v = y - dy - cy;
      const i = cos * u + sin * v + cx, j = -sin * u + cos * v + cy;
      const low = Math.floor(i), left = Math.floor(j), f = i - low, g = j - left;
      for (const [a, b, weight] of [[0, 0, (1 - f) * (1 - g)], [0, 1, (1 - f) * g], [1, 0, f * (1 - g)], [1, 1, f * g]]) {
        const p = low + a, q = left + b;
        if (!weight || p < 0 || p >= rows || q < 0 || q >= columns) continue;
        for (let z = 0; z < depth; z++) {
          const plane = z * rows * columns;
          result[plane + x * columns + y] += weight * data[plane + p * columns + q];
        }
      }
    }
  }
  return { data: result, shape };
}

// --- numbers (metrics.py), of one slice ------------------------------------------------------------------------------

function psnr(image, reference, mask) {
  const inside = reference.filter((_, i) => mask[i]);
  const squares = image.reduce((sum, value, i) => sum + (mask[i] ? (value - reference[i]) ** 2 : 0), 0);
  return 20 * Math.log10(percentile(inside, 99.9) / Math.sqrt(squares / inside.length));
}

// Mean in the lesion over mean in the ring of 3 to 9 mm round it, minus 1; NaN where the slice does not show it.
function lesionContrast(image, labels, label, brain, [rows, columns], voxel) {
  const own = [];
  labels.forEach((value, i) => { if (value === label) own.push([Math.floor(i / columns), i % columns]); });
  let inside = 0, ring = 0, count = 0;
  for (const [x, y] of own) inside += image[x * columns + y] / own.length;
  for (let i = 0; own.length && i < image.length; i++) {
    if (labels[i] || !brain[i]) continue;
    const x = Math.floor(i / columns), y = i % columns;
    const distance = voxel * Math.sqrt(Math.min(...own.map(([p, q]) => (p - x) ** 2 + (q - y) ** 2)));
    if (distance > 3 && distance <= 9) { ring += image[i]; count++; }
  }
  return count ? inside / Math.max(ring / count, 1e-6) - 1 : NaN;
}

if (typeof module !== "undefined") {
  module.exports = {
    activityScale, alphaBars, cut, gaussian, lesionContrast, modelView, moved, normalNoise, painted, percentile, psnr,
    restoreSlice, sample, sampleTimes, scaleMr, scannedAgain, stack,
  };
}
