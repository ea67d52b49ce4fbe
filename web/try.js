// The page: what the reader sets, what is computed for it, what is drawn. What is computed stands in restore.js.

(() => {
  const { settings, cases } = MFDIFF;
  const element = (id) => document.getElementById(id);
  const brush = () => document.querySelector("input[name=brush]:checked").value;
  const PANES = [
    // key, title, colour map, meaning of the values
    ["lpet", "LPET", "gray_r", "kBq/mL"],
    ["mr", "MR", "gray", "arbitrary"],
    ["spet", "SPET", "gray_r", "kBq/mL"],
    ["activity", "truth", "gray_r", "kBq/mL"],
    ["mean", "restored", "gray_r", "kBq/mL"],
    ["difference", "restored \u2212 SPET", "RdBu_r", "kBq/mL"],
    ["std", "SD of samples", "magma", "kBq/mL"],
    ["gate", "gate", "viridis", "share of MR let in"],
  ];
  const SLIDERS = ["slice", "dx", "dy", "turn", "diameter", "uptake", "samples", "fidelity", "window"];
  const COMPUTED = ["dx", "dy", "turn", "samples", "fidelity", "dose", "mr", "slice", "case"];
  const CPU = "CPU (WebAssembly)";
  const state = { images: null, other: null, marks: [], cross: [0, 0], result: null, scan: null, run: 0 };

  const chosen = () => cases[element("case").selectedIndex];
  const number = (id) => Number(element(id).value);
  const slice = () => number("slice") - 1;
  const plane = (volume) => {
    const size = volume.shape[1] * volume.shape[2];
    return volume.data.subarray(slice() * size, (slice() + 1) * size);
  };

  // --- the network, in workers ---------------------------------------------------------------------------------------

  let workers = []; // those that compute now: each a function that answers a question
  const Cancelled = class extends Error {};

  const loaded = (name) => new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: name, onload: resolve });
    script.onerror = () => reject(new Error(`expected ${name} beside this page, found none; copy the whole folder`));
    document.head.append(script);
  });

  function computeOn(chosenOnes, device) {
    workers = chosenOnes;
    const several = workers.length > 1 ? `, ${workers.length} threads` : "";
    element("device").textContent = `Computes on: ${device}${several}.`;
  }

  // kind: "cpu" or "gpu", with the providers of onnxruntime that belong to it.
  async function startWorker(kind, providers) {
    if (!MFDIFF[kind]) await loaded(`${kind}.js`);
    const files = [MFDIFF.models.fusion, MFDIFF.models.denoiser, MFDIFF[kind].wasm];
    const [fusion, denoiser, wasm] = await Promise.all(files.map(bytesOf));
    const source = URL.createObjectURL(new Blob([MFDIFF[kind].worker], { type: "text/javascript" }));
    const worker = new Worker(source), waiting = new Map();
    let count = 0;
    const failed = (error) => { waiting.forEach(({ reject }) => reject(error)); waiting.clear(); };
    worker.onerror = (event) => failed(new Error(event.message || "the worker did not start"));
    worker.onmessage = ({ data: { id, outputs, error } }) => {
      const { resolve, reject } = waiting.get(id);
      waiting.delete(id);
      if (error) reject(new Error(error)); else resolve(outputs);
    };
    const ask = (question) => new Promise((resolve, reject) => {
      waiting.set(++count, { resolve, reject });
      worker.postMessage({ id: count, ...question });
    });
    await ask({ wasm, providers, models: { fusion: new Uint8Array(fusion), denoiser: new Uint8Array(denoiser) } });
    return Object.assign(ask, { end: () => worker.terminate() });
  }

  const startCpu = () => startWorker("cpu", ["wasm"]);

  // A GPU takes over once it has restored the stored slice as the package did, and not slower than the CPU by far; null
  // if there is none that does. One that is software is slower: only "?gpu=software" in the address takes it, for a test.
  async function startGpu(cpu) {
    if (!navigator.gpu || !WebAssembly.Suspending) return null;
    const adapter = await navigator.gpu.requestAdapter();
    const software = new URLSearchParams(location.search).get("gpu") === "software";
    if (!adapter || (adapter.info.isFallbackAdapter && !software)) return null;
    const { scan, options, compared } = await storedSlice();
    const gpu = await startWorker("gpu", ["webgpu", "wasm"]);
    const view = modelView(scan, settings), idle = () => {};
    const on = (lane, more) => restoreSlice(networkOf([lane], idle), view, options.z, { ...options, ...more }, settings);
    const quickest = async (lane) => {
      const taken = [];
      for (let i = 0; i < 2; i++) {
        const began = performance.now();
        await on(lane, { samples: 0 });
        taken.push(performance.now() - began);
      }
      return Math.min(...taken);
    };
    MFDIFF.gpuChecked = compared(await on(gpu));
    const sound = MFDIFF.gpuChecked.agreement > 60 && (software || (await quickest(gpu)) < 2 * (await quickest(cpu)));
    if (sound) return gpu;
    gpu.end();
    return null;
  }

  // Asks the GPU as long as it answers, then the CPU again.
  function insteadOf(cpus, gpu) {
    let answers = true;
    return async (question) => {
      try {
        if (answers) return await gpu(question);
      } catch {
        answers = false;
        computeOn(cpus, CPU);
      }
      return cpus[0](question);
    };
  }

  // What restoreSlice calls. `onAnswer` counts, and throws after a cancel.
  function networkOf(lanes, onAnswer) {
    const [height, width] = settings.padded, f = (value) => ({ data: Float32Array.of(value), shape: [1] });
    const ask = async (lane, model, inputs) => {
      const outputs = await lanes[lane % lanes.length]({ model, inputs });
      onAnswer();
      return outputs;
    };
    const stackOf = (data) => ({ data, shape: [1, settings.context, height, width] });
    const map = (data) => ({ data, shape: [1, 1, height, width] });
    return {
      lanes: lanes.length,
      fusion: (lpet, mr, dose) => ask(0, "fusion", { lpet: stackOf(lpet), mr: stackOf(mr), dose: f(dose) }),
      async denoise(xt, time, { lpet, feature }, dose, lane) {
        const channels = (4 * feature.length) / (height * width);
        const condition = { data: feature, shape: [1, channels, height / 2, width / 2] };
        const inputs = { xt: map(xt), time: f(time), lpet: map(lpet), feature: condition, dose: f(dose) };
        return (await ask(lane, "denoiser", inputs)).v;
      },
    };
  }

  // --- computing -----------------------------------------------------------------------------------------------------

  function currentScan() {
    const { images, marks } = state, dose = Number(element("dose").value), sd = blurSd();
    const lesions = marks.filter(({ kind }) => kind === "paint");
    const activity = lesions.length ? painted(images.activity, lesions, settings.voxel) : images.activity;
    const scanned = (image) => (lesions.length ? scannedAgain(image, images.activity, activity, sd) : image);
    const labels = { shape: images.lesions.shape, data: images.lesions.data.slice() };
    lesions.forEach((lesion, i) => {
      ball(labels.shape, lesion, settings.voxel, (at, share) => { if (share > 0.5) labels.data[at] = 200 + i; });
    });
    return { lpet: scanned(images[`lpet${dose}`]), spet: scanned(images.spet), activity, labels, mr: currentMr(), dose };
  }

  const blurSd = () => chosen().blur_fwhm / Math.sqrt(8 * Math.log(2)) / settings.voxel;

  function currentMr() {
    const which = element("mr").value, own = state.images.mr;
    if (which === "none") return { shape: own.shape, data: new Float32Array(own.data.length) };
    const source = which === "own" ? own : state.other.mr;
    const mr = moved(source, number("dx") / settings.voxel, number("dy") / settings.voxel, number("turn"));
    for (const mark of state.marks.filter(({ kind }) => kind === "erase")) {
      ball(mr.shape, mark, settings.voxel, (i, share) => { if (share > 0.5) mr.data[i] = 0; });
    }
    return mr;
  }

  // The scan changed: draw it at once, restore it if the reader wants that.
  function changed() {
    state.scan = currentScan();
    state.view = null;
    state.result = null;
    draw();
    stop();
    if (element("auto").checked) later();
  }

  let timer = 0;
  function later() {
    clearTimeout(timer);
    timer = setTimeout(restore, 250);
  }

  function stop() {
    clearTimeout(timer);
    state.run++;
    element("cancel").disabled = true;
    element("progress").value = 0;
  }

  async function compute(scan, options, onShow) {
    stop();
    const run = state.run, began = performance.now(), seconds = () => ((performance.now() - began) / 1000).toFixed(1);
    const sides = options.samples > 2 ? 2 : 1;
    const neighbours = options.fidelity ? scan.lpet.shape[0] - 1 : 0;
    const total = sides + neighbours + options.samples * settings.steps;
    let done = 0, coarse = "";
    element("cancel").disabled = false;
    element("told").textContent = "Computing ...";
    const network = networkOf(workers, () => {
      if (run !== state.run) throw new Cancelled();
      done++;
      element("progress").value = Math.min(done / total, 1);
      element("told").textContent = `Step ${Math.min(done, total)} of ${total}, ${seconds()} s`;
    });
    state.view = state.view || modelView(scan, settings);
    const show = (result) => {
      coarse = coarse || seconds();
      if (run === state.run && onShow) onShow(result);
    };
    const result = await restoreSlice(network, state.view, options.z, { ...options, show }, settings);
    element("cancel").disabled = true;
    element("progress").value = 1;
    const drawn = options.samples ? `, ${options.samples} sample${options.samples > 1 ? "s" : ""} ${seconds()} s` : "";
    element("told").textContent = `Done: coarse estimate ${coarse} s${drawn}.`;
    return { ...result, coarseSeconds: Number(coarse), seconds: Number(seconds()) };
  }

  async function restore() {
    if (!workers.length || !state.scan) return;
    const [height, width] = settings.padded;
    const noise = (pair) => normalNoise(height * width, 1000 * (slice() + 1) + pair);
    const options = { z: slice(), samples: number("samples"), fidelity: number("fidelity"), noise };
    const show = (result) => { state.result = result; draw(); };
    await guarded(async () => show(await compute(state.scan, options, show)));
  }

  async function guarded(work) {
    try {
      await work();
    } catch (error) {
      if (error instanceof Cancelled) return;
      element("told").textContent = `It stopped: ${error.message}`;
      stop();
    }
  }

  // The middle slice as the package restored it: what to restore, from the same noise, and the agreement in dB.
  async function storedSlice() {
    const { check: expected } = chosen(), { images } = state, stored = await unpacked(expected.images);
    const size = settings.padded[0] * settings.padded[1];
    const noise = (pair) => stored.noise_exact.data.slice(pair * size, (pair + 1) * size);
    const count = stored.mean_exact.data.length;
    const brain = images.brain.data.subarray(expected.slice * count, (expected.slice + 1) * count);
    const compared = ({ mean, gate }) => ({
      agreement: psnr(mean, stored.mean_exact.data, brain),
      gate: Math.max(...gate.map((value, i) => (brain[i] ? Math.abs(value - stored.gate_exact.data[i]) : 0))),
    });
    const scan = { lpet: images[`lpet${expected.dose}`], mr: images.mr, dose: expected.dose };
    return { scan, options: { z: expected.slice, samples: expected.samples, fidelity: 0, noise }, compared };
  }

  async function check() {
    await guarded(async () => {
      const { scan, options, compared } = await storedSlice();
      state.view = null;
      element("agreement").textContent = "Computing ...";
      MFDIFF.checked = compared(await compute(scan, options));
      state.view = null;
      element("agreement").textContent = `${MFDIFF.checked.agreement.toFixed(1)} dB between this page and the package ` +
        `(slice ${options.z + 1}, ${options.samples} samples; above 60 dB no eye tells them apart).`;
    });
  }

  // --- drawing -------------------------------------------------------------------------------------------------------

  function imagesNow() {
    const { scan, result } = state, shown = {};
    for (const name of ["lpet", "spet", "activity", "mr"]) shown[name] = plane(scan[name]);
    if (!result) return shown;
    const difference = result.mean.map((value, i) => value - shown.spet[i]);
    return { ...shown, mean: result.mean, difference, std: result.samples > 1 ? result.std : null, gate: result.gate };
  }

  function windowOf(key) {
    const top = number("window");
    if (key === "mr") return [0, state.mrTop];
    if (key === "difference") return [-top / 3, top / 3];
    return { std: [0, top / 5], gate: [0, 1] }[key] || [0, top];
  }

  // Seen from the feet, as radiologists do: the patient's right is on the left; the front is up.
  const pixelOf = (x, y, rows, columns) => (columns - 1 - y) * rows + rows - 1 - x;

  function draw() {
    const [, rows, columns] = state.scan.mr.shape, shown = imagesNow();
    for (const [key, title, map, meaning] of PANES) {
      const canvas = element(`pane-${key}`), context = canvas.getContext("2d"), image = shown[key];
      const [low, high] = windowOf(key), table = settings.maps[map];
      const pixels = context.createImageData(rows, columns);
      for (let x = 0; x < rows; x++) {
        for (let y = 0; y < columns; y++) {
          const share = image ? Math.min(Math.max((image[x * columns + y] - low) / (high - low), 0), 1) : 0;
          const colour = image ? table[Math.round(share * (table.length - 1))] : [136, 136, 136];
          pixels.data.set([...colour, 255], 4 * pixelOf(x, y, rows, columns));
        }
      }
      if (element("outline").checked) outline(pixels, rows, columns);
      crossInto(pixels, rows, columns);
      context.putImageData(pixels, 0, 0);
      const at = state.cross[0] * columns + state.cross[1];
      element(`value-${key}`).textContent = image ? image[at].toPrecision(3) : "-";
      element(`ends-${key}`).replaceChildren(...[low, meaning, high].map((text) => {
        const end = document.createElement("span");
        end.textContent = typeof text === "number" ? Number(text.toPrecision(3)) : text;
        return end;
      }));
      canvas.setAttribute("aria-label", `${title}, slice ${slice() + 1}`);
    }
    const [x, y] = state.cross;
    const fit = state.result && ` The model trusts this MR at ${state.result.fit.toFixed(2)} of 1.`;
    element("where").textContent = `The values beside the titles are those at the cross: voxel ${x + 1}, ${y + 1}.${fit || ""}`;
    numbers(shown);
  }

  function outline(pixels, rows, columns) {
    const labels = plane(state.scan.labels), at = (x, y) => labels[x * columns + y];
    for (let x = 1; x < rows - 1; x++) {
      for (let y = 1; y < columns - 1; y++) {
        const near = [at(x - 1, y), at(x + 1, y), at(x, y - 1), at(x, y + 1)].find((label) => label);
        if (!at(x, y) && near) pixels.data.set(colourOf(near), 4 * pixelOf(x, y, rows, columns));
      }
    }
  }

  function colourOf(label) {
    const kind = kindOf(label);
    return { "pet-only": [230, 97, 0, 255], "mr-only": [0, 130, 210, 255], matched: [160, 90, 200, 255] }[kind] ||
      [20, 160, 60, 255];
  }

  const kindOf = (label) => (chosen().lesions.find((one) => one.label === label) || { kind: "yours" }).kind;

  function crossInto(pixels, rows, columns) {
    const [x, y] = state.cross;
    for (let d = -6; d <= 6; d++) {
      if (Math.abs(d) < 2) continue;
      for (const [p, q] of [[x + d, y], [x, y + d]]) {
        if (p < 0 || p >= rows || q < 0 || q >= columns) continue;
        pixels.data.set([0, 160, 215, 255], 4 * pixelOf(p, q, rows, columns));
      }
    }
  }

  function numbers(shown) {
    const coarse = state.result && state.result.coarse;
    const columns = [["SPET", shown.spet], ["LPET", shown.lpet], ["coarse", coarse], ["restored", shown.mean]];
    const brain = plane(state.images.brain), labels = plane(state.scan.labels);
    const tissue = plane(state.images.tissues).map((kind) => kind > 0);
    const written = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits).replace(/^-(?=[0.]*$)/, "") : "-");
    const rows = [["", ...columns.map(([name]) => name)]];
    rows.push(["PSNR [dB]", ...columns.map(([name, image]) => {
      return image && name !== "SPET" ? written(psnr(image, shown.spet, brain), 2) : "-";
    })]);
    for (const label of [...new Set(labels)].filter((value) => value).sort((a, b) => b - a)) {
      const contrast = ([, image]) => {
        const size = state.scan.mr.shape.slice(1);
        return image ? written(lesionContrast(image, labels, label, tissue, size, settings.voxel), 2) : "-";
      };
      const kind = { "pet-only": "in PET alone", "mr-only": "in MR alone", matched: "in both" }[kindOf(label)];
      const name = kind ? `lesion ${label} (${kind})` : `your lesion ${label - 199}`;
      rows.push([`contrast, ${name}`, ...columns.map(contrast)]);
    }
    element("numbers").replaceChildren(...rows.map((cells, r) => {
      const row = document.createElement("tr");
      row.append(...cells.map((text, c) => {
        const cell = document.createElement(r && c ? "td" : "th");
        if (!c || !r) cell.scope = c ? "col" : "row";
        cell.textContent = text;
        return cell;
      }));
      return row;
    }));
  }

  // --- the reader's hands --------------------------------------------------------------------------------------------

  function act() {
    const kind = brush(), [x, y] = state.cross;
    if (kind === "look") return draw();
    const uptake = number("uptake") * chosen().levels.grey;
    state.marks.push({ kind, z: slice(), x, y, radius: number("diameter") / 2, uptake });
    element("undo").disabled = false;
    changed();
  }

  function onKey(event) {
    const step = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    const turn = { PageUp: 1, PageDown: -1 }[event.key];
    if (step) {
      const [, rows, columns] = state.scan.mr.shape, [x, y] = state.cross;
      state.cross = [Math.min(Math.max(x + step[0], 0), rows - 1), Math.min(Math.max(y + step[1], 0), columns - 1)];
      draw();
    } else if (turn) {
      element("slice").value = number("slice") + turn;
      element("slice").dispatchEvent(new Event("input"));
    } else if (event.key === "Enter") {
      act();
    } else return;
    event.preventDefault();
  }

  function onPoint(event) {
    const [, rows, columns] = state.scan.mr.shape, box = event.currentTarget.getBoundingClientRect();
    const across = Math.floor(((event.clientX - box.left) / box.width) * rows);
    const down = Math.floor(((event.clientY - box.top) / box.height) * columns);
    state.cross = [Math.min(Math.max(rows - 1 - across, 0), rows - 1), Math.min(Math.max(columns - 1 - down, 0), columns - 1)];
    act();
  }

  function showValues() {
    for (const id of SLIDERS) element(`${id}-value`).textContent = element(id).value;
    element("slice-value").textContent = `${element("slice").value} of ${element("slice").max}`;
  }

  function onKnob(event) {
    showValues();
    const id = event.target.id;
    if (id === "case") return guarded(openCase);
    if (id === "auto") return element("auto").checked && later();
    if (id === "samples" || id === "fidelity") return element("auto").checked && later();
    if (COMPUTED.includes(id)) changed();
    else draw();
  }

  async function openCase() {
    stop();
    const index = element("case").selectedIndex, other = cases[(index + 1) % cases.length];
    const both = await Promise.all([cases[index], other].map(({ images }) => unpacked(images)));
    if (index !== element("case").selectedIndex) return; // the reader has gone on
    [state.images, state.other] = both;
    const [depth, rows, columns] = state.images.mr.shape;
    element("about").textContent = chosen().about;
    element("slice").max = depth;
    element("slice").value = chosen().check.slice + 1;
    const options = chosen().doses.map((dose) => {
      const share = Number((100 / dose).toPrecision(2));
      return new Option(`${share} % of the counts (DRF ${dose})`, dose, dose === 20, dose === 20);
    });
    element("dose").replaceChildren(...options);
    element("window").max = Math.ceil(1.5 * percentile(state.images.spet.data, 99.9));
    element("window").value = Math.ceil(percentile(state.images.spet.data, 99.7));
    state.mrTop = percentile(state.images.mr.data, 99.7);
    state.cross = [rows >> 1, columns >> 1];
    element("agreement").textContent = "";
    for (const [key] of PANES) Object.assign(element(`pane-${key}`), { width: rows, height: columns });
    startOver();
  }

  function startOver() {
    state.marks = [];
    element("undo").disabled = true;
    element("mr").value = "own";
    for (const id of ["dx", "dy", "turn"]) element(id).value = 0;
    showValues();
    changed();
  }

  function makePanes() {
    for (const [key, title, map] of PANES) {
      const figure = document.createElement("figure");
      figure.innerHTML = `<figcaption>${title} <output id="value-${key}"></output></figcaption>` +
        `<div class="picture"><canvas id="pane-${key}" tabindex="0" role="img"></canvas><b>R</b><b>L</b></div>` +
        `<div class="bar"></div><div class="ends" id="ends-${key}"></div>`;
      const stops = settings.maps[map].filter((_, i) => i % 16 === 0 || i === 254).map((c) => `rgb(${c})`);
      figure.querySelector(".bar").style.background = `linear-gradient(to right, ${stops})`;
      figure.querySelector("canvas").addEventListener("click", onPoint);
      figure.querySelector("canvas").addEventListener("keydown", onKey);
      element("panes").append(figure);
    }
  }

  async function loadNetwork() {
    await loaded("network.js");
    const cpu = await startCpu();
    computeOn([cpu], CPU);
    for (const id of ["restore", "check"]) element(id).disabled = false;
    element("told").textContent = "Ready.";
    await restore();
    // A second worker draws every second sample. It starts last, so that the first picture does not wait for it.
    if ((navigator.hardwareConcurrency || 1) > 1) computeOn([cpu, await startCpu()], CPU);
    const gpu = await startGpu(cpu).catch(() => null); // in silence: the CPU computes the same
    if (gpu) computeOn([insteadOf(workers, gpu)], "GPU (WebGPU)");
    MFDIFF.settled = true;
  }

  async function start() {
    makePanes();
    element("case").replaceChildren(...cases.map(({ title }) => new Option(title)));
    element("build").textContent = `Weights ${settings.fingerprint}; onnxruntime-web, licence beside this page.`;
    element("knobs").addEventListener("input", onKnob);
    element("knobs").addEventListener("submit", (event) => event.preventDefault());
    element("restore").addEventListener("click", restore);
    element("cancel").addEventListener("click", () => { stop(); element("told").textContent = "Cancelled."; });
    element("check").addEventListener("click", check);
    element("reset").addEventListener("click", startOver);
    element("undo").addEventListener("click", () => {
      state.marks.pop();
      element("undo").disabled = !state.marks.length;
      changed();
    });
    await openCase();
    MFDIFF.firstPicture = performance.now();
    // The pictures first, then the network: it takes a second or two to unpack.
    requestAnimationFrame(() => setTimeout(() => guarded(loadNetwork), 0));
  }

  MFDIFF.page = { state, compute };
  guarded(start);
})();
