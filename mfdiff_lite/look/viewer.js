// The viewer: linked panes of volumes, drawn on canvases in the browser, moved by mouse and keys.
//
// One file for two homes. As a widget (anywidget), `initialize` and `render` get a model whose state Python reads and
// sets. In a page, Python writes a block with the data into the HTML and calls `mount`; no kernel, no network.
//
// Words: a volume is quantised, value = offset + step * q, with x fastest: q[x + X * (y + Y * z)], RAS+.
// A pane is one image with a name (a volume, one of K alternatives, or a difference of two). A cell is a canvas that
// shows a pane in a plane. `cross` [x, y, z] in voxels is where the three planes meet. `state` is all that may change.

const AXES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] }; // across, up, through
const LETTERS = ["LR", "PA", "IS"]; // per axis: the side at its low and at its high end
const SIDES = { L: "left", R: "right", A: "anterior", P: "posterior", S: "superior", I: "inferior" };
const COMPARE = {
  side: ["side by side", "all images beside each other"],
  flicker: ["flicker", "one image in place of the other; space bar changes"],
  curtain: ["curtain", "one image left, the other right of an edge that you drag"],
  checker: ["checkerboard", "two images in the fields of a checkerboard"],
};
const TOOLS = {
  cross: ["crosshair", "click sets the crosshair in all panes; drag moves it, or the picture when zoomed"],
  roi: ["circle", "drag from the middle of a region: mean, SD and number of voxels in every image"],
  line: ["line", "drag a line: the values along it in every image"],
};
const CROSS = "#00a0d7";
const LABELS = { tissues: "#ffb000", lesions: "#e5007e" };
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#aa8800", "#66ccee", "#aa3377", "#777777"];
const KEYS = `← → one slice back, on · PageUp, PageDown five · Home, End first, last
shift + arrows move the crosshair in the plane · 1 2 3 4 axial, coronal, sagittal, ortho
c side by side, flicker, curtain, checkerboard · space the other image · a, b choose the two
[ ] window narrower, wider · { } darker, brighter · + - 0 zoom in, out, whole
m MR under the PET · s smooth · x crosshair · t lesions · r radiological · o circle at the crosshair
, . turn the knob back, on · p play · Enter mark (lesion hunt)
mouse: click crosshair · wheel slices · right or shift drag window · ctrl wheel zoom · drag pan when zoomed`;

// --- small helpers -------------------------------------------------------------------------------------------------

function h(tag, set = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(set)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const short = (value, digits = 3) => (Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : String(value));

async function unpacked(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Two planes of bytes, low and high, of zigzag differences from voxel to voxel, modulo 2^16.
function decoded(bytes) {
  const n = bytes.length / 2, q = new Uint16Array(n);
  let sum = 0, top = 0;
  for (let i = 0; i < n; i++) {
    const d = bytes[i] | (bytes[n + i] << 8);
    q[i] = sum = (sum + ((d >> 1) ^ -(d & 1))) & 0xffff;
    if (sum > top) top = sum;
  }
  return { q, top };
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// --- the viewer ----------------------------------------------------------------------------------------------------

class Viewer {
  constructor(host, meta, blob) {
    this.meta = meta;
    this.state = { tool: "cross", ...structuredClone(meta.state) };
    this.listeners = [];
    this.tables = Object.fromEntries(Object.entries(meta.maps).map(([name, text]) => [name, colours(fromBase64(text))]));
    this.luts = new Map();
    this.canvases = new Map();
    this.host = host;
    this.root = host.attachShadow({ mode: "open" });
    host.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab: our keys are ours
    this.build();
    this.ready = this.load(blob);
  }

  async load(blob) {
    const part = async ({ start, bytes, labels, ...scale }) => {
      const raw = await unpacked(blob.subarray(start, start + bytes));
      return labels ? { q: raw } : { ...scale, ...decoded(raw) };
    };
    this.volumes = {};
    for (const [name, parts] of Object.entries(this.meta.volumes)) this.volumes[name] = await Promise.all(parts.map(part));
    this.labels = {};
    for (const [name, one] of Object.entries(this.meta.labels)) this.labels[name] = await part(one);
    this.layout();
    this.observer = new ResizeObserver(() => this.width !== this.host.clientWidth && this.layout());
    this.observer.observe(this.host);
    this.host.dataset.ready = "true";
  }

  // Change the state; what does not fit is brought into range. `quiet`: it came from Python, which knows it already.
  set(change, quiet = false) {
    const before = this.state, next = { ...before, ...change };
    if (change.slice !== undefined && change.cross === undefined && next.plane !== "ortho") {
      next.cross = [...next.cross];
      next.cross[AXES[next.plane][2]] = change.slice - 1;
    }
    next.cross = next.cross.map((k, axis) => clamp(Math.round(k), 0, this.meta.shape[axis] - 1));
    next.slice = next.cross[this.through(next)] + 1;
    next.zoom = clamp(next.zoom, 1, 16);
    if (next.zoom === 1) next.centre = this.meta.shape.map((n) => (n - 1) / 2);
    next.split = clamp(next.split, 0, 1);
    next.blend = clamp(next.blend, 0, 2);
    next.pick = next.pick.map((k, i) => clamp(k, 0, this.meta.knobs[i].choices.length - 1));
    const changed = Object.keys(next).filter((key) => !same(next[key], before[key]));
    if (!changed.length) return;
    this.state = next;
    const back = quiet ? changed.filter((key) => !same(next[key], change[key])) : changed;
    if (back.length) for (const listener of this.listeners) listener(Object.fromEntries(back.map((key) => [key, next[key]])));
    if (changed.some((key) => ["plane", "compare", "tool", "hunt"].includes(key))) this.restructure = true;
    this.schedule();
  }

  schedule() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      if (!this.volumes) return;
      if (this.restructure) this.layout();
      else this.draw();
    });
  }

  through(state = this.state) {
    return AXES[state.plane === "ortho" ? "axial" : state.plane][2];
  }

  get index() { // of the alternatives, from the knobs, the last one fastest
    return this.meta.knobs.reduce((index, knob, i) => index * knob.choices.length + this.state.pick[i], 0);
  }

  volume(name) {
    const parts = this.volumes[name];
    return parts[parts.length > 1 ? this.index : 0];
  }

  window(pane) {
    if (pane.kind === "PET") return this.state.window;
    if (pane.kind === "difference") return [-this.state.difference, this.state.difference];
    return this.state.windows[pane.name];
  }

  setWindow(pane, low, high) {
    if (high <= low) high = low + 1e-6 * (Math.abs(low) || 1);
    const round = (v) => Number(v.toPrecision(4));
    if (pane.kind === "PET") this.set({ window: [round(low), round(high)] });
    else if (pane.kind === "difference") this.set({ difference: round(Math.max(high, 1e-9)) });
    else this.set({ windows: { ...this.state.windows, [pane.name]: [round(low), round(high)] } });
  }

  value(pane, x, y, z) {
    const [X, Y] = this.meta.shape, i = x + X * (y + Y * z);
    const read = (name) => { const v = this.volume(name); return v.hole && v.q[i] === 0 ? NaN : v.offset + v.step * v.q[i]; };
    return pane.of ? read(pane.of[0]) - read(pane.of[1]) : read(pane.name);
  }

  map(pane) {
    if (this.dark && (pane.kind === "difference" || pane.kind === "change")) return "difference in the dark";
    if (pane.kind !== "PET") return pane.map;
    const chosen = this.state.pet_map;
    return this.under(pane) && chosen.startsWith("gray") ? "hot" : chosen;
  }

  under(pane) {
    return pane.kind === "PET" && this.state.blend > 0 && this.volumes.MR ? this.volume("MR") : null;
  }

  // --- pixels: one slice of a pane, voxel by voxel, on a canvas of its own ---

  lut(volume, low, high, map) { // q -> colour, made again only when the window or the map changes
    const key = `${low} ${high} ${map}`, held = this.luts.get(volume);
    if (held?.key === key) return held.lut;
    const table = this.tables[map], { top } = volume;
    const lut = new Uint32Array(top + 1), scale = 254 / Math.max(high - low, 1e-30);
    for (let q = 0; q <= top; q++) lut[q] = table[clamp(Math.round((volume.offset + volume.step * q - low) * scale), 0, 254)];
    if (volume.hole) lut[0] = 0;
    this.luts.set(volume, { key, lut });
    return lut;
  }

  paint(pane, plane) {
    const [across, up, through] = AXES[plane], shape = this.meta.shape, strides = [1, shape[0], shape[0] * shape[1]];
    const W = shape[across], H = shape[up], flip = this.state.radiological;
    const start = strides[through] * this.state.cross[through] + strides[up] * (H - 1) + (flip ? strides[across] * (W - 1) : 0);
    const right = flip ? -strides[across] : strides[across], down = -strides[up];
    const key = `${plane} of ${pane.name}`;
    let canvas = this.canvases.get(key);
    if (!canvas) {
      this.canvases.set(key, (canvas = h("canvas", { width: W, height: H })));
      canvas.context = canvas.getContext("2d");
      canvas.image = canvas.context.createImageData(W, H);
      canvas.pixels = new Uint32Array(canvas.image.data.buffer);
    }
    const out = canvas.pixels, [low, high] = this.window(pane), map = this.map(pane), mr = this.under(pane);
    const each = (write) => {
      for (let v = 0, o = 0; v < H; v++) for (let u = 0, i = start + v * down; u < W; u++, i += right, o++) out[o] = write(i);
    };
    if (pane.of) {
      const [a, b] = pane.of.map((name) => this.volume(name)), table = this.tables[map], scale = 254 / (high - low);
      const offset = a.offset - b.offset - low;
      each((i) => table[clamp(Math.round((offset + a.step * a.q[i] - b.step * b.q[i]) * scale), 0, 254)]);
    } else {
      const volume = this.volume(pane.name), { q } = volume, lut = this.lut(volume, low, high, map);
      if (mr) {
        const under = this.lut(mr, ...this.state.windows.MR, "gray"), scale = volume.step / Math.max(high - low, 1e-30);
        const zero = (volume.offset - low) / Math.max(high - low, 1e-30), { blend } = this.state;
        const opacity = Float32Array.from(lut, (_, k) => clamp(zero + k * scale, 0, 1) ** blend);
        each((i) => mixed(under[mr.q[i]], lut[q[i]], opacity[q[i]]));
      } else each((i) => lut[q[i]]);
    }
    canvas.context.putImageData(canvas.image, 0, 0);
    return canvas;
  }

  // --- where things stand in a cell; voxel <-> pixel of the cell's canvas, in CSS pixels ---

  geometry(cell) {
    const [across, up, through] = AXES[cell.plane], { shape, voxel_size: size } = this.meta, { zoom, centre, radiological } = this.state;
    const sx = this.scale * size[across] * zoom * (radiological ? -1 : 1), sy = -this.scale * size[up] * zoom;
    return { across, up, through, sx, sy, W: shape[across], H: shape[up],
      x: (k) => cell.width / 2 + (k - centre[across]) * sx, y: (k) => cell.height / 2 + (k - centre[up]) * sy,
      voxel: (x, y) => {
        const found = [...this.state.cross];
        found[across] = centre[across] + (x - cell.width / 2) / sx;
        found[up] = centre[up] + (y - cell.height / 2) / sy;
        return found;
      } };
  }

  draw() {
    const began = performance.now();
    this.dark = isDark(this.host);
    this.host.style.colorScheme = this.dark ? "dark" : "light";
    for (const cell of this.cells) this.drawCell(cell);
    this.refresh();
    this.host.dataset.drawn = String(1 + Number(this.host.dataset.drawn ?? 0)); // tests wait for it
    this.host.dataset.ms = (performance.now() - began).toFixed(1);
  }

  drawCell(cell) {
    const { canvas, width, height } = cell, ratio = window.devicePixelRatio || 1;
    const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
    const c = (cell.context ??= canvas.getContext("2d")), g = this.geometry(cell), [a, b] = cell.panes;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    c.imageSmoothingEnabled = this.state.smooth;
    c.imageSmoothingQuality = "high";
    const left = Math.min(g.x(-0.5), g.x(g.W - 0.5)), top = g.y(g.H - 0.5);
    const place = (pane) => c.drawImage(this.paint(pane, cell.plane), left, top, Math.abs(g.sx) * g.W, -g.sy * g.H);
    const { compare, split, swap } = this.state;
    place(compare === "flicker" && swap ? b : a);
    if (compare === "curtain" || compare === "checker") {
      c.save();
      c.beginPath();
      if (compare === "curtain") c.rect(split * width, 0, width, height);
      else for (let n = 0, s = width / 8; n < 8 * Math.ceil(height / s); n++) if (((n >> 3) + n) % 2) c.rect((n % 8) * s, (n >> 3) * s, s, s);
      c.clip();
      c.clearRect(0, 0, width, height);
      place(b);
      c.restore();
      if (compare === "curtain") stroke(c, CROSS, () => { c.moveTo(split * width, 0); c.lineTo(split * width, height); });
    }
    for (const name of this.state.contours) if (this.labels[name]) this.drawContours(c, g, this.labels[name].q, LABELS[name]);
    if (this.state.crosshair) this.drawCross(c, g, cell);
    this.drawTools(c, g, cell);
    for (const mark of this.state.marks) if (mark.cross[g.through] === this.state.cross[g.through]) {
      stroke(c, "#e5007e", () => c.arc(g.x(mark.cross[g.across]), g.y(mark.cross[g.up]), 7, 0, 7));
    }
    this.drawSides(c, g, cell);
  }

  drawCross(c, g, { width, height }) {
    const x = g.x(this.state.cross[g.across]), y = g.y(this.state.cross[g.up]), free = 3.5 * Math.abs(g.sy);
    stroke(c, CROSS, () => {
      for (const [x0, y0, x1, y1] of [[0, y, x - free, y], [x + free, y, width, y], [x, 0, x, y - free], [x, y + free, x, height]]) {
        c.moveTo(x0, y0);
        c.lineTo(x1, y1);
      }
    }, 1.2);
  }

  drawContours(c, g, q, colour) { // the edges between voxels of different labels
    const { shape } = this.meta, strides = [1, shape[0], shape[0] * shape[1]], base = this.state.cross[g.through] * strides[g.through];
    const at = (u, v) => (u < g.W && v < g.H ? q[base + u * strides[g.across] + v * strides[g.up]] : 0);
    stroke(c, colour, () => {
      for (let v = 0; v < g.H; v++) for (let u = 0; u < g.W; u++) {
        const here = at(u, v);
        if (here !== at(u + 1, v)) { c.moveTo(g.x(u + 0.5), g.y(v - 0.5)); c.lineTo(g.x(u + 0.5), g.y(v + 0.5)); }
        if (here !== at(u, v + 1)) { c.moveTo(g.x(u - 0.5), g.y(v + 0.5)); c.lineTo(g.x(u + 0.5), g.y(v + 0.5)); }
      }
    }, 1);
  }

  drawTools(c, g, cell) {
    const { roi, line } = this.state;
    if (roi && roi.plane === cell.plane && Math.round(roi.centre[g.through]) === this.state.cross[g.through]) {
      stroke(c, "#e69f00", () => c.arc(g.x(roi.centre[g.across]), g.y(roi.centre[g.up]), Math.max(1, roi.radius * this.scale * this.state.zoom), 0, 7));
    }
    if (line && line.plane === cell.plane) {
      stroke(c, "#e69f00", () => {
        c.moveTo(g.x(line.from[g.across]), g.y(line.from[g.up]));
        c.lineTo(g.x(line.to[g.across]), g.y(line.to[g.up]));
      });
    }
  }

  drawSides(c, g, { width, height }) {
    const side = (axis, high) => LETTERS[axis][high ? 1 : 0], low = 3 * height < width;
    const left = side(g.across, this.state.radiological), right = side(g.across, !this.state.radiological);
    Object.assign(c, { font: "bold 12px sans-serif", lineWidth: 3, strokeStyle: "#000a", fillStyle: "#fff", textBaseline: "middle" });
    const write = (text, x, y, align) => { c.textAlign = align; c.strokeText(text, x, y); c.fillText(text, x, y); };
    write(left, 4, height / 2, "left");
    write(right, width - 4, height / 2, "right");
    if (low) return;
    write(side(g.up, true), width / 2, 9, "center");
    write(side(g.up, false), width / 2, height - 9, "center");
  }

  // --- numbers under the tools ---

  region() { // flat indices of the voxels inside the circle
    const { roi } = this.state, { shape, voxel_size: size } = this.meta, [across, up] = AXES[roi.plane], found = [];
    const reach = [0, 1, 2].map((a) => (a === across || a === up ? Math.ceil(roi.radius / size[a]) : 0));
    const centre = roi.centre.map(Math.round), voxel = [0, 0, 0];
    for (voxel[2] = centre[2] - reach[2]; voxel[2] <= centre[2] + reach[2]; voxel[2]++)
      for (voxel[1] = centre[1] - reach[1]; voxel[1] <= centre[1] + reach[1]; voxel[1]++)
        for (voxel[0] = centre[0] - reach[0]; voxel[0] <= centre[0] + reach[0]; voxel[0]++) {
          const away = Math.hypot((voxel[across] - roi.centre[across]) * size[across], (voxel[up] - roi.centre[up]) * size[up]);
          if (away <= roi.radius && voxel.every((k, a) => k >= 0 && k < shape[a])) found.push([...voxel]);
        }
    return found;
  }

  statistics(pane, voxels) {
    const values = voxels.map((voxel) => this.value(pane, ...voxel)).filter(Number.isFinite), n = values.length;
    const mean = values.reduce((a, b) => a + b, 0) / n;
    return { n, mean, sd: Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / Math.max(n - 1, 1)) };
  }

  profile(pane) {
    const { from, to } = this.state.line, size = this.meta.voxel_size;
    const length = Math.hypot(...from.map((k, a) => (to[a] - k) * size[a])), count = Math.max(2, Math.ceil(length));
    return Array.from({ length: count + 1 }, (_, n) => {
      const voxel = from.map((k, a) => clamp(Math.round(k + ((to[a] - k) * n) / count), 0, this.meta.shape[a] - 1));
      return [(n / count) * length, this.value(pane, ...voxel)];
    });
  }

  mm(voxel) {
    return this.meta.affine.slice(0, 3).map((row) => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3]);
  }

  sentence() { // what a screen reader reads out, and everyone under the panes
    const { plane, cross, window: [low, high], radiological, blend, crosshair, compare, pair, swap, pick } = this.state;
    const shown = plane === "ortho" ? "axial" : plane, [across, up, through] = AXES[shown], place = this.mm(cross);
    const left = SIDES[LETTERS[across][radiological ? 1 : 0]], top = SIDES[LETTERS[up][1]];
    const turned = this.meta.knobs.map((knob, i) => `${knob.name}: ${knob.choices[pick[i]]}`);
    if (!this.meta.panes.length) return `${turned.join("; ")}.`;
    const words = [plane === "ortho" ? `ortho at (${place.map((v) => v.toFixed(1)).join(", ")}) mm`
      : `${plane} slice ${cross[through] + 1} of ${this.meta.shape[through]}, ${"xyz"[through]} = ${place[through].toFixed(1)} mm`];
    if (this.meta.panes.some((pane) => pane.kind === "PET")) words.push(`PET window ${short(low, 4)} to ${short(high, 4)} ${this.meta.unit}${blend > 0 ? ", MR under PET" : ""}`);
    words.push(`patient's ${left} on the left, ${top} up`);
    if (compare === "flicker") words.push(`${pair[swap ? 1 : 0]} of ${pair.join(" and ")}`);
    else if (compare !== "side") words.push(`${COMPARE[compare][0]} of ${pair.join(" and ")}`);
    let text = `${[...words, ...turned].join("; ")}.`;
    if (crosshair) text += ` Crosshair at (${place.map((v) => v.toFixed(1)).join(", ")}) mm: ${this.meta.panes.map((pane) => `${pane.name} ${short(this.value(pane, ...cross))}${pane.unit ? ` ${pane.unit}` : ""}`).join(", ")}.`;
    return text;
  }

  // --- controls: each has a name, one line of help, and shows the state ---

  build() {
    const { meta } = this;
    this.shows = []; // what to do to make the controls show the state
    this.frame = h("section", { tabIndex: 0, className: "viewer" });
    this.frame.setAttribute("aria-label", `Viewer: ${meta.title}. Question mark lists the keys.`);
    const tools = h("div", { className: "bar" }, ...this.viewControls(), ...this.lookControls(), ...this.toolControls());
    this.bar = h("div", { className: "bars" }, ...meta.knobs.map((knob, i) => this.knobControl(knob, i)), tools);
    if (!meta.panes.length) tools.hidden = true;
    this.grid = h("div", { className: "cells" });
    this.aside = h("aside", {});
    this.status = h("p", { role: "status" });
    this.status.setAttribute("aria-live", "polite");
    this.help = h("pre", { className: "help", hidden: true, textContent: KEYS });
    this.frame.append(this.bar, this.help, h("div", { className: "body" }, this.grid, this.aside), this.status);
    this.root.append(h("style", { textContent: CSS }), this.frame);
    this.frame.addEventListener("keydown", (event) => this.key(event));
    for (const kind of ["keypress", "keyup"]) this.frame.addEventListener(kind, (event) => event.stopPropagation());
    this.grid.addEventListener("pointerdown", (event) => this.press(event));
    this.grid.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.grid.addEventListener("contextmenu", (event) => event.preventDefault());
    this.grid.addEventListener("dblclick", () => (this.state.hunt ? this.mark() : this.set({ zoom: 1 })));
  }

  show(element, update) {
    this.shows.push(() => update(element, this.state));
    return element;
  }

  button(text, help, press, pressed) {
    const button = h("button", { type: "button", textContent: text, title: help, onclick: press });
    button.setAttribute("aria-label", help.split(":")[0]);
    if (pressed) this.show(button, (b, state) => b.setAttribute("aria-pressed", String(Boolean(pressed(state)))));
    return button;
  }

  toggle(text, name, help) {
    return this.button(text, help, () => this.set({ [name]: !this.state[name] }), (state) => state[name]);
  }

  range(name, help, set, read, [min, max, step]) {
    const input = h("input", { type: "range", min, max, step, title: help, oninput: () => set(Number(input.value)) });
    input.setAttribute("aria-label", name);
    return this.show(input, (element, state) => {
      const { value, words } = read(state, element);
      if (Number(element.value) !== value) element.value = value;
      element.setAttribute("aria-valuetext", words);
    });
  }

  choice(name, help, options, set, read) {
    const select = h("select", { title: help, onchange: () => set(select.value) });
    select.append(...options.map(([value, text]) => h("option", { value, textContent: text })));
    select.setAttribute("aria-label", name);
    return this.show(select, (element, state) => (element.value = read(state)));
  }

  number(name, help, set, read) {
    const input = h("input", { type: "number", title: help, step: "any", onchange: () => set(Number(input.value)) });
    input.setAttribute("aria-label", name);
    return this.show(input, (element, state) => this.root.activeElement !== element && (element.value = short(read(state), 4)));
  }

  knobControl(knob, i) {
    const set = (k) => this.set({ pick: this.state.pick.map((old, j) => (j === i ? k : old)) });
    const slider = this.range(knob.name, `${knob.name}: turn the knob`, set,
      ({ pick }) => ({ value: pick[i], words: knob.choices[pick[i]] }), [0, knob.choices.length - 1, 1]);
    const text = this.show(h("span", { className: "said" }), (element, { pick }) => (element.textContent = knob.choices[pick[i]]));
    const play = this.button("▶", `play ${knob.name}: go through its choices`, () => this.play(`knob ${i}`), () => this.playing === `knob ${i}`);
    return h("div", { className: "bar knob" }, h("label", {}, h("b", { textContent: knob.name }), slider, text), play);
  }

  viewControls() {
    const flat = this.meta.shape.includes(1), planes = [...Object.keys(AXES), "ortho"];
    const group = h("span", { className: "group", role: "group" });
    group.setAttribute("aria-label", "plane");
    if (!flat) group.append(...planes.map((plane) => this.button(plane, plane === "ortho" ? "ortho: all three planes" : `${plane}: slices of this plane`,
      () => this.set({ plane }), (state) => state.plane === plane)));
    const slider = this.range("slice", "slice: also the wheel, arrow keys, Page up and down, Home and End", (slice) => this.slide(slice),
      (state, element) => {
        element.max = this.meta.shape[this.through(state)];
        return { value: state.slice, words: `slice ${state.slice} of ${element.max}` };
      }, [1, 1, 1]);
    slider.classList.add("slice");
    const text = this.show(h("span", { className: "said" }), (element, state) => (element.textContent = `${state.slice}/${this.meta.shape[this.through(state)]}`));
    const play = this.button("▶", "play: go through the slices", () => this.play("slice"), () => this.playing === "slice");
    return flat ? [] : [group, h("label", {}, "slice", slider, text), play];
  }

  lookControls() {
    const { meta } = this, controls = [];
    if (meta.panes.some((pane) => pane.kind === "PET")) {
      const low = this.number("window, lower end", "window, lower end: one for all PET images", (v) => this.setWindow({ kind: "PET" }, v, this.state.window[1]), (s) => s.window[0]);
      const high = this.number("window, upper end", "window, upper end: also drag with the right button over an image", (v) => this.setWindow({ kind: "PET" }, this.state.window[0], v), (s) => s.window[1]);
      controls.push(h("label", {}, "window", low, high, meta.unit));
      controls.push(this.choice("PET colours", "PET colours: a map of growing lightness", Object.entries(meta.pet_maps).map(([text, map]) => [map, text]), (pet_map) => this.set({ pet_map }), (s) => s.pet_map));
      if (meta.volumes.MR) controls.push(h("label", {}, "MR under PET", this.range("MR under PET", "MR under PET: opacity of the PET is its uptake to this power; 0 is PET alone",
        (blend) => this.set({ blend }), ({ blend }) => ({ value: blend, words: String(blend) }), [0, 2, 0.1])));
    }
    const names = meta.panes.map((pane) => [pane.name, pane.name]);
    if (names.length > 1) {
      controls.push(this.choice("compare", "compare: two images in one place", Object.entries(COMPARE).map(([key, [text]]) => [key, text]), (compare) => this.set({ compare }), (s) => s.compare));
      const pair = h("span", { className: "group" }, ...[0, 1].map((k) => this.choice(`image ${"AB"[k]}`, `image ${"AB"[k]}: of the two that are compared`, names,
        (name) => this.set({ pair: this.state.pair.map((old, j) => (j === k ? name : old)) }), (s) => s.pair[k])));
      pair.append(this.button("A/B", "change: show the other of the two images", () => this.set({ swap: !this.state.swap }), (s) => s.swap));
      controls.push(this.show(pair, (element, s) => (element.hidden = s.compare === "side")));
    }
    return controls;
  }

  toolControls() {
    const tools = h("span", { className: "group", role: "group" });
    tools.setAttribute("aria-label", "tool");
    tools.append(...Object.entries(TOOLS).map(([tool, [text, help]]) => this.button(text, `${text}: ${help}`, () => this.set({ tool, crosshair: this.state.crosshair || tool === "cross" }), (s) => s.tool === tool)));
    const known = Object.keys(this.meta.labels), zoom = (by) => this.set({ zoom: this.state.zoom * by });
    return [
      tools,
      h("span", { className: "group" }, this.toggle("values", "crosshair", "crosshair and values: on or off"), this.toggle("smooth", "smooth", "smooth: interpolate between voxels"),
        ...known.map((name) => this.button(name, `${name}: their contours, from the truth`, () => this.outline(name), (s) => s.contours.includes(name))),
        this.toggle("radiological", "radiological", "radiological: the patient's right is on the left")),
      h("span", { className: "group" }, this.button("−", "zoom out", () => zoom(1 / 1.5)), this.button("+", "zoom in", () => zoom(1.5)), this.button("whole", "whole: as it was at the start, whole and with its first windows", () => this.reset())),
      h("span", { className: "group" }, this.button("save", "save: the picture as PNG", () => this.save()), this.button("copy", "copy: the state as a Python call", () => this.copy()),
        this.button("?", "help: keys and mouse", () => (this.help.hidden = !this.help.hidden))),
      this.paneMenu(),
    ];
  }

  outline(name) {
    const { contours } = this.state;
    this.set({ contours: contours.includes(name) ? contours.filter((other) => other !== name) : [...contours, name] });
  }

  paneMenu() {
    const boxes = this.meta.panes.map(({ name }) => {
      const box = h("input", { type: "checkbox", onchange: () => {
        const shown = this.panes.map((pane) => pane.name), next = box.checked ? [...shown, name] : shown.filter((other) => other !== name);
        this.set({ show: next.length ? next : [name] });
        this.layout();
      } });
      this.show(box, (element) => (element.checked = this.panes.some((pane) => pane.name === name)));
      return h("label", {}, box, name);
    });
    const menu = h("details", { className: "menu" }, h("summary", { textContent: "images", title: "images: which are shown" }), h("div", {}, ...boxes));
    menu.hidden = boxes.length < 2;
    return menu;
  }

  get panes() {
    const { show } = this.state;
    return this.meta.panes.filter((pane) => !show.length || show.includes(pane.name));
  }

  // --- where the cells go: as large as fits the width and the height of the window ---

  layout() {
    this.restructure = false;
    this.width = this.host.clientWidth;
    if (!this.width || !this.volumes) return;
    for (const update of this.shows) update();
    this.fillAside();
    const { compare, pair, plane } = this.state, { shape, voxel_size: size } = this.meta, mm = shape.map((n, a) => n * size[a]);
    const planes = plane === "ortho" ? Object.keys(AXES) : [plane];
    const named = (name) => this.meta.panes.find((pane) => pane.name === name);
    const groups = compare === "side" ? this.panes.map((pane) => [pane]) : [pair.map(named)];
    const beside = this.width > 760 && !this.aside.hidden;
    this.frame.classList.toggle("beside", beside);
    const width = this.width - 2 - (beside ? 290 : 0), HEAD = 17, BAR = 27, GAP = 6;
    const total = clamp(0.8 * Math.min(window.innerHeight, window.screen?.height || 1e4), 430, 1100);
    const room = Math.max(total - this.bar.offsetHeight - this.status.offsetHeight - 8, 260);
    let best = { scale: 0 };
    const wide = planes.map((p) => mm[AXES[p][0]]), high = planes.map((p) => mm[AXES[p][1]]);
    const most = (values) => Math.max(...values), sum = (values) => values.reduce((a, b) => a + b, 0);
    const least = this.width < 600 && planes.length === 1 ? Math.min(groups.length, 2) : 1; // on a phone rather scroll than squint
    for (let columns = 1; columns <= groups.length; columns++) {
      const rows = Math.ceil(groups.length / columns);
      for (const inRow of planes.length > 1 ? [true, false] : [true]) { // the planes of a pane beside or below each other
        const w = inRow ? sum(wide) : most(wide), t = inRow ? most(high) : sum(high), across = inRow ? planes.length : 1, down = inRow ? 1 : planes.length;
        let scale = Math.min((width - GAP * columns * across) / (columns * w), (room - rows * (down * (HEAD + GAP) + BAR)) / (rows * t));
        if (this.width < 600 && columns === least) scale = (width - GAP * columns * across) / (columns * w);
        if (scale > best.scale) best = { scale, columns, inRow };
      }
    }
    this.scale = Math.min(best.scale, 12 / Math.min(...size));
    this.place(groups, planes, best);
    this.draw();
  }

  place(groups, planes, { columns, inRow }) {
    const { shape, voxel_size: size } = this.meta;
    this.cells = [];
    const boxes = groups.map((panes) => {
      const made = planes.map((plane) => {
        const [across, up] = AXES[plane], width = Math.floor(shape[across] * size[across] * this.scale), height = Math.floor(shape[up] * size[up] * this.scale);
        const canvas = h("canvas", { style: `width:${width}px;height:${height}px` });
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${panes.map((pane) => pane.name).join(" and ")}, ${plane}`);
        this.cells.push({ panes, plane, width, height, canvas });
        return canvas;
      });
      const name = h("b", {}), value = h("span", {}), bar = this.colourBar(panes[0]);
      Object.assign(this.cells.at(-1), { name, value, bar });
      return h("figure", {}, h("figcaption", {}, name, value), h("div", { className: inRow ? "beside" : "below" }, ...made), bar.element);
    });
    this.grid.style.gridTemplateColumns = `repeat(${columns || 1}, max-content)`;
    this.grid.replaceChildren(...boxes);
  }

  colourBar(pane) {
    const strip = h("i", {}), ticks = [0, 1, 2].map(() => h("span", {})), unit = pane.unit ? ` ${pane.unit}` : "";
    return { element: h("div", { className: "colourbar" }, strip, h("div", {}, ...ticks)), strip, ticks, unit };
  }

  refresh() {
    for (const update of this.shows) update();
    const { crosshair, cross, compare, swap, pair } = this.state;
    for (const { panes, name, value, bar } of this.cells) if (name) {
      const pane = panes[compare === "flicker" && swap ? 1 : 0], [low, high] = this.window(pane), map = this.map(pane);
      name.textContent = compare === "side" || compare === "flicker" ? pane.name : `${pair[0]} | ${pair[1]}`;
      value.textContent = crosshair ? panes.map((one) => short(this.value(one, ...cross))).join(" | ") : "";
      const ends = pane.ends ?? [short(low), short((low + high) / 2), short(high) + bar.unit];
      bar.ticks.forEach((tick, k) => (tick.textContent = ends[k]));
      const key = map;
      if (bar.key !== key) bar.strip.style.background = `linear-gradient(90deg, ${Array.from({ length: 16 }, (_, k) => css(this.tables[map][17 * k - (k ? 1 : 0)])).join(",")})`;
      bar.key = key;
    }
    const words = this.sentence();
    if (this.status.textContent !== words) this.status.textContent = words;
    this.fillAside();
  }

  // --- beside the images: numbers and curve of the knob, the circle, the line, the hunt ---

  fillAside() {
    const { tool, roi, line, pick, hunt, marks, contours } = this.state;
    const key = JSON.stringify([tool, roi, line, pick, hunt, marks, contours, this.panes.map((pane) => pane.name), Boolean(this.volumes)]);
    if (this.asideKey === key) return;
    this.asideKey = key;
    const parts = [...this.numberParts()];
    if (tool !== "cross" && !this.state[tool]) parts.push(h("p", { textContent: `${TOOLS[tool][0]}: ${TOOLS[tool][1]}` })); // keeps the room for what comes
    if (this.volumes && roi) parts.push(this.regionPart());
    if (this.volumes && line) parts.push(...this.linePart());
    if (this.volumes && hunt) parts.push(...this.huntPart());
    const hidden = this.aside.hidden;
    this.aside.hidden = !parts.length;
    this.aside.replaceChildren(...parts);
    if (this.cells && hidden !== this.aside.hidden) { this.restructure = true; this.schedule(); }
  }

  numberParts() {
    const { numbers, curve } = this.meta, parts = [], at = this.index, names = Object.keys(numbers);
    if (names.length) parts.push(table(["", ""], names.map((name) => [name, text(numbers[name][at])])));
    if (curve) {
      const [x, y] = curve, points = numbers[x].map((value, k) => [value, numbers[y][k]]);
      const joined = this.meta.knobs.length === 1 && this.meta.knobs[0].choices.every((one) => Number.isFinite(Number(one))); // of names, no line
      parts.push(chart([{ points, dots: true, joined, colour: COLOURS[0] }], x, y, points[at]));
    }
    return parts;
  }

  regionPart() {
    const voxels = this.region(), rows = this.panes.map((pane) => {
      const { mean, sd } = this.statistics(pane, voxels);
      return [pane.name, short(mean), short(sd), pane.unit];
    });
    const found = table(["circle", "mean", "SD", ""], rows);
    found.createCaption().textContent = `${voxels.length} voxels, radius ${short(this.state.roi.radius)} mm, ${this.state.roi.plane}`;
    found.append(h("tfoot", {}, h("tr", {}, h("td", { colSpan: 4 }, this.button("remove", "remove: the circle", () => this.set({ roi: null }))))));
    return found;
  }

  linePart() {
    const shown = this.panes.filter((pane) => pane.kind === "PET");
    const lines = (shown.length ? shown : this.panes).map((pane, k) => ({ name: pane.name, points: this.profile(pane), colour: COLOURS[k % COLOURS.length] }));
    return [chart(lines, "along the line [mm]", shown.length ? `activity [${this.meta.unit}]` : "value"), this.button("remove", "remove: the line", () => this.set({ line: null }))];
  }

  huntPart() { // how many lesions of the PET were marked, and how many marks hit none
    const { marks } = this.state, score = this.score(), buttons = h("p", {},
      this.button("mark", "mark: a lesion at the crosshair (Enter, or a double click)", () => this.mark()),
      this.button("undo", "undo: take the last mark away", () => this.set({ marks: marks.slice(0, -1), contours: [] })),
      this.button("score", "score: show the lesions and count", () => this.set({ contours: ["lesions"] })));
    const parts = [h("p", { innerHTML: "<b>Lesion hunt.</b> Click where you think a lesion is, then mark it." }), buttons, h("p", { textContent: `${marks.length} marked` })];
    if (this.state.contours.includes("lesions")) parts.push(table(["score", ""], [["lesions found", `${score.found} of ${score.lesions}`], ["marks beside", String(score.wrong)]]));
    return parts;
  }

  mark() {
    const { cross, marks } = this.state;
    if (!marks.some((mark) => same(mark.cross, cross))) this.set({ marks: [...marks, { cross: [...cross], image: this.panes[0].name }] });
  }

  score(reach = 4) { // a mark within `reach` mm of a lesion finds it
    const { shape, voxel_size: size } = this.meta, { q } = this.labels.lesions, wanted = new Set(this.meta.lesions), found = new Set();
    let wrong = 0;
    for (const { cross } of this.state.marks) {
      const near = new Set(), r = size.map((s) => Math.ceil(reach / s));
      for (let z = -r[2]; z <= r[2]; z++) for (let y = -r[1]; y <= r[1]; y++) for (let x = -r[0]; x <= r[0]; x++) {
        const v = [cross[0] + x, cross[1] + y, cross[2] + z];
        if (v.every((k, a) => k >= 0 && k < shape[a]) && Math.hypot(x * size[0], y * size[1], z * size[2]) <= reach) near.add(q[v[0] + shape[0] * (v[1] + shape[1] * v[2])]);
      }
      const hits = [...near].filter((label) => wanted.has(label));
      hits.forEach((label) => found.add(label));
      wrong += !hits.length;
    }
    return { found: found.size, lesions: wanted.size, wrong };
  }

  // --- mouse and keys ---

  press(event) {
    const cell = this.cells.find(({ canvas }) => canvas === event.target);
    if (!cell) return;
    this.frame.focus({ preventScroll: true });
    const { left, top } = event.target.getBoundingClientRect(), at = (e) => [e.clientX - left, e.clientY - top], [x0, y0] = at(event);
    const start = { ...this.state }, g = this.geometry(cell), pane = cell.panes[0], [low, high] = this.window(pane), { tool } = start;
    const edge = start.compare === "curtain" && Math.abs(x0 - start.split * cell.width) < 14;
    const windowing = event.button === 2 || (event.button === 0 && event.shiftKey);
    if (event.button > 2 || (event.button === 1)) return;
    let moved = false;
    const point = (x, y) => this.inside(g.voxel(x, y));
    const move = (e) => {
      const [x, y] = at(e), dx = x - x0, dy = y - y0;
      moved ||= Math.hypot(dx, dy) > 3;
      if (!moved) return;
      if (windowing) {
        const width = Math.max((high - low) * Math.exp(dx / 150), 1e-9), middle = (low + high) / 2 - (dy / 300) * (high - low);
        this.setWindow(pane, pane.kind === "difference" ? -width / 2 : middle - width / 2, pane.kind === "difference" ? width / 2 : middle + width / 2);
      } else if (edge) this.set({ split: x / cell.width });
      else if (tool === "roi") this.set({ roi: { plane: cell.plane, centre: point(x0, y0).map((k, a) => (a === g.through ? start.cross[a] : k)), radius: Math.hypot(dx / g.sx, dy / g.sy) * this.meta.voxel_size[g.up] } });
      else if (tool === "line") this.set({ line: { plane: cell.plane, from: point(x0, y0), to: point(x, y) } });
      else if (start.zoom > 1) this.set({ centre: start.centre.map((k, a) => (a === g.across ? k - dx / g.sx : a === g.up ? k - dy / g.sy : k)) });
      else this.set({ cross: point(x, y), crosshair: true });
    };
    const end = (e) => {
      for (const [kind, act] of acts) event.target.removeEventListener(kind, act);
      if (!moved && e.type === "pointerup" && !windowing && !edge) this.set({ cross: point(x0, y0), crosshair: true });
    };
    const acts = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
    for (const [kind, act] of acts) event.target.addEventListener(kind, act);
    event.target.setPointerCapture(event.pointerId);
  }

  inside(voxel) {
    return voxel.map((k, axis) => clamp(k, 0, this.meta.shape[axis] - 1));
  }

  wheel(event) {
    const cell = this.cells.find(({ canvas }) => canvas === event.target), turn = event.deltaY || event.deltaX;
    if (!cell || !turn) return;
    event.preventDefault();
    const step = event.deltaMode ? Math.sign(turn) * 50 : turn;
    this.turned = Math.abs(step) >= 50 ? Math.sign(step) * 50 : (this.turned ?? 0) + step; // a touch pad sends many small ones
    if (Math.abs(this.turned) < 50) return;
    const by = Math.sign(this.turned);
    this.turned = 0;
    const g = this.geometry(cell);
    if (event.ctrlKey || event.shiftKey) {
      const { left, top } = event.target.getBoundingClientRect(), x = event.clientX - left, y = event.clientY - top;
      const zoom = clamp(this.state.zoom * (by > 0 ? 1 / 1.25 : 1.25), 1, 16), ratio = 1 - this.state.zoom / zoom, here = g.voxel(x, y);
      this.set({ zoom, centre: this.state.centre.map((k, a) => (a === g.through ? k : k + (here[a] - k) * ratio)) });
    } else this.step(g.through, by > 0 ? -1 : 1);
  }

  step(axis, by) {
    const cross = [...this.state.cross];
    cross[axis] += by;
    this.set({ cross });
  }

  slide(slice) {
    const cross = [...this.state.cross];
    cross[this.through()] = slice - 1;
    this.set({ cross });
  }

  key(event) {
    const target = event.composedPath()[0], { key } = event, kind = target.tagName === "INPUT" ? target.type : target.tagName;
    event.stopPropagation(); // a notebook has keys of its own, some of which delete cells
    if (event.ctrlKey || event.metaKey || event.altKey || key === "Tab" || kind === "number" || kind === "SELECT") return;
    if (kind === "range" && /^(Arrow|Page|Home|End)/.test(key)) return;
    if (/^(BUTTON|SUMMARY|checkbox)$/.test(kind) && (key === " " || key === "Enter")) return;
    const act = this.act(key, event.shiftKey);
    if (!act) return;
    event.preventDefault();
    act();
  }

  act(key, shift) {
    const { state, meta } = this, axis = this.through(), [across, up] = AXES[state.plane === "ortho" ? "axial" : state.plane];
    const planes = [...Object.keys(AXES), "ortho"], [low, high] = state.window, width = high - low, right = state.radiological ? -1 : 1;
    const cycle = (values, value) => values[(values.indexOf(value) + 1) % values.length], names = this.panes.map((pane) => pane.name);
    const window = (wider, shift) => () => this.setWindow({ kind: "PET" }, shift ? low + shift * width : low, shift ? high + shift * width : low + wider * width);
    const knob = (by) => () => meta.knobs.length && this.set({ pick: [state.pick[0] + by, ...state.pick.slice(1)] });
    const pair = (k) => () => this.set({ pair: state.pair.map((name, j) => (j === k ? cycle(names, name) : name)) });
    const slices = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: 5, PageUp: -5, Home: -1e6, End: 1e6 };
    const moves = { ArrowLeft: [across, -right], ArrowRight: [across, right], ArrowUp: [up, 1], ArrowDown: [up, -1] };
    if (shift && moves[key]) return () => { this.set({ crosshair: true }); this.step(...moves[key]); };
    if (slices[key]) return () => this.step(axis, slices[key]);
    if ("1234".includes(key) && !meta.shape.includes(1)) return () => this.set({ plane: planes[Number(key) - 1] });
    const flip = (name) => () => this.set({ [name]: !state[name] });
    return {
      c: () => meta.panes.length > 1 && this.set({ compare: cycle(Object.keys(COMPARE), state.compare) }), " ": flip("swap"), a: pair(0), b: pair(1),
      "[": window(1 / 1.1), "]": window(1.1), "{": window(1, -0.05), "}": window(1, 0.05),
      "+": () => this.set({ zoom: state.zoom * 1.25 }), "-": () => this.set({ zoom: state.zoom / 1.25 }), 0: () => this.reset(),
      m: () => meta.volumes.MR && this.set({ blend: state.blend ? 0 : 1 }), s: flip("smooth"), x: flip("crosshair"), t: () => this.set({ contours: state.contours.length ? [] : ["lesions"] }), r: flip("radiological"),
      o: () => this.set({ roi: { plane: planes[planes.indexOf(state.plane) % 3], centre: [...state.cross], radius: state.roi ? state.roi.radius + 2 : 8 } }),
      ",": knob(-1), ".": knob(1), p: () => this.play("slice"), Enter: () => state.hunt && this.mark(), "?": () => (this.help.hidden = !this.help.hidden),
    }[key];
  }

  play(what) {
    clearInterval(this.timer);
    this.playing = this.playing === what ? null : what;
    if (this.playing) this.timer = setInterval(() => {
      if (!this.host.isConnected) return clearInterval(this.timer);
      if (what === "slice") this.slide((this.state.slice % this.meta.shape[this.through()]) + 1);
      else {
        const i = Number(what.split(" ")[1]), count = this.meta.knobs[i].choices.length;
        this.set({ pick: this.state.pick.map((k, j) => (j === i ? (k + 1) % count : k)) });
      }
    }, what === "slice" ? 120 : 700);
    this.schedule();
  }

  reset() {
    const { window, windows, difference } = this.meta.state;
    this.set({ zoom: 1, window, windows, difference });
  }

  // --- out of the viewer ---

  picture() { // all cells with their names, on one canvas
    const box = this.grid.getBoundingClientRect(), ratio = window.devicePixelRatio || 1, canvas = h("canvas", {});
    [canvas.width, canvas.height] = [box.width * ratio, box.height * ratio];
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    Object.assign(c, { fillStyle: this.dark ? "#111" : "#fff", font: "bold 12px sans-serif" });
    c.fillRect(0, 0, box.width, box.height);
    c.fillStyle = this.dark ? "#eee" : "#111";
    for (const { canvas: cell, panes, name } of this.cells) {
      const { left, top, width, height } = cell.getBoundingClientRect();
      c.drawImage(cell, left - box.left, top - box.top, width, height);
      if (name) c.fillText(name.textContent || panes[0].name, left - box.left, Math.max(top - box.top - 5, 11));
    }
    return canvas;
  }

  save() {
    const { title } = this.meta, { slice, plane } = this.state;
    h("a", { href: this.picture().toDataURL(), download: `${title} ${plane} ${slice}.png`.replace(/[^\w.-]+/g, "_") }).click();
  }

  call() { // the state as Python would set it
    const python = (value) => {
      if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
      if (value && typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${python(one)}`).join(", ")}}`;
      return { true: "True", false: "False", null: "None" }[value] ?? JSON.stringify(value);
    };
    const changed = Object.entries(this.state).filter(([name, value]) => !["slice", "tool"].includes(name) && !same(value, this.meta.state[name]));
    return `view.set(${changed.map(([name, value]) => `${name}=${python(value)}`).join(", ")})`;
  }

  copy() {
    const call = this.call(), said = () => (this.help.hidden = false, this.help.textContent = `${call}\n\n${KEYS}`);
    (navigator.clipboard?.writeText(call) ?? Promise.reject()).then(said, said);
  }
}

// --- pixels and colours --------------------------------------------------------------------------------------------

function colours(bytes) { // (255, 3) -> opaque pixels as little-endian ABGR
  return Uint32Array.from({ length: bytes.length / 3 }, (_, k) => (0xff000000 | (bytes[3 * k + 2] << 16) | (bytes[3 * k + 1] << 8) | bytes[3 * k]) >>> 0);
}

function mixed(under, over, opacity) {
  const part = (shift) => { const u = (under >> shift) & 255; return Math.round(u + opacity * (((over >> shift) & 255) - u)) << shift; };
  return (0xff000000 | part(16) | part(8) | part(0)) >>> 0;
}

function stroke(c, colour, path, width = 1.6) {
  Object.assign(c, { strokeStyle: colour, lineWidth: width });
  c.beginPath();
  path();
  c.stroke();
}

function isDark(element) { // light text means a dark page
  const [r, g, b] = getComputedStyle(element).color.match(/[\d.]+/g).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}

const css = (pixel) => `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
const text = (value) => (typeof value === "number" ? short(value, 4) : String(value));

function table(head, rows) {
  const row = (cells, tag) => h("tr", {}, ...cells.map((cell, k) => h(k ? tag : "th", { textContent: cell })));
  return h("table", {}, ...(head.some(Boolean) ? [h("thead", {}, row(head, "th"))] : []), h("tbody", {}, ...rows.map((cells) => row(cells, "td"))));
}

// Lines (or dots) in axes with their ends labelled; `here` is the point that holds now.
function chart(lines, xName, yName, here) {
  const W = 270, H = 170, L = 44, B = 34, T = 8, R = 8, svg = (tag, set, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(set)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const points = lines.flatMap((line) => line.points).filter((point) => point.every(Number.isFinite));
  const ends = [0, 1].map((k) => {
    const values = points.map((point) => point[k]), low = Math.min(...values), high = Math.max(...values);
    return low === high ? [low - 1, high + 1] : [low, high];
  });
  const x = (v) => L + ((v - ends[0][0]) / (ends[0][1] - ends[0][0])) * (W - L - R), y = (v) => H - B - ((v - ends[1][0]) / (ends[1][1] - ends[1][0])) * (H - B - T);
  const write = (words, px, py, anchor, set = {}) => svg("text", { x: px, y: py, "text-anchor": anchor, ...set }, words);
  const chart = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${yName} over ${xName}` },
    svg("path", { d: `M${L} ${T}V${H - B}H${W - R}`, fill: "none", stroke: "currentColor", "stroke-opacity": 0.5 }),
    write(short(ends[0][0]), L, H - B + 12, "start"), write(short(ends[0][1]), W - R, H - B + 12, "end"), write(xName, (L + W) / 2, H - 8, "middle"),
    write(short(ends[1][0]), L - 4, H - B, "end"), write(short(ends[1][1]), L - 4, T + 8, "end"),
    write(yName, 0, 0, "middle", { transform: `translate(10 ${(H - B) / 2 + T}) rotate(-90)` }));
  for (const { points: own, colour, dots, joined = true } of lines) {
    const kept = own.filter((point) => point.every(Number.isFinite));
    if (joined) chart.append(svg("path", { d: `M${kept.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L")}`, fill: "none", stroke: colour, "stroke-width": 1.5, "stroke-opacity": dots ? 0.5 : 1 }));
    if (dots) chart.append(...kept.map(([a, b]) => svg("circle", { cx: x(a), cy: y(b), r: 2.5, fill: colour })));
  }
  if (here?.every(Number.isFinite)) chart.append(svg("circle", { cx: x(here[0]), cy: y(here[1]), r: 6, fill: "none", stroke: "#ee6677", "stroke-width": 2.5 }));
  const names = lines.filter((line) => line.name);
  return h("div", { className: "chart" }, chart, h("p", {}, ...names.flatMap(({ name, colour }) => [h("i", { style: `background:${colour}` }), ` ${name}  `])));
}

const CSS = `
:host { display: block; text-align: left }
.viewer { font: 12px/1.35 system-ui, sans-serif; color: inherit; outline: none; border-radius: 4px }
.viewer:focus-visible { box-shadow: 0 0 0 2px ${CROSS} }
[hidden] { display: none !important }
.bars { padding: 2px 0 4px }
.bar { display: flex; flex-wrap: wrap; gap: 3px 9px; align-items: center; margin-bottom: 3px }
.group { display: inline-flex }
.group > :not(:first-child) { margin-left: -1px }
label { display: inline-flex; align-items: center; gap: 4px; white-space: nowrap }
button, select, input[type=number], summary { font: inherit; color: inherit; background: transparent; margin: 0;
  border: 1px solid color-mix(in srgb, currentColor 35%, transparent); padding: 2px 6px; min-height: 24px; box-sizing: border-box; cursor: pointer }
button[aria-pressed=true] { background: color-mix(in srgb, ${CROSS} 30%, transparent); border-color: ${CROSS}; position: relative }
button:hover, summary:hover { background: color-mix(in srgb, currentColor 12%, transparent) }
:focus-visible { outline: 2px solid ${CROSS}; outline-offset: 1px }
select option { color: initial; background: Canvas; color: CanvasText }
input[type=number] { width: 4.6em; cursor: text }
input[type=range] { width: 84px; margin: 0; accent-color: ${CROSS} }
input[type=range].slice { width: 150px }
.knob input[type=range] { width: 220px }
.said { min-width: 3.5em }
.knob .said { font-weight: bold }
.menu { position: relative }
.menu > summary { list-style: none }
.menu > div { position: absolute; right: 0; z-index: 5; display: grid; padding: 6px 10px; background: Canvas; color: CanvasText; border: 1px solid currentColor }
.body { display: block }
.beside > .body { display: flex; gap: 12px; align-items: flex-start }
.cells { display: grid; gap: 0 6px; justify-content: start; flex: none; max-width: 100% }
figure { margin: 0 }
figcaption { display: flex; justify-content: space-between; gap: 4px; height: 17px; overflow: hidden; white-space: nowrap }
figcaption b { overflow: hidden; text-overflow: ellipsis }
figure .beside { display: flex; gap: 6px; align-items: flex-start }
figure .below { display: grid; gap: 6px }
canvas { display: block; cursor: crosshair; touch-action: pan-y; background: color-mix(in srgb, currentColor 6%, transparent) }
.colourbar { height: 27px; font-size: 10px; line-height: 12px; position: relative }
.colourbar i { display: block; height: 6px; margin-top: 3px; border: 1px solid color-mix(in srgb, currentColor 30%, transparent); box-sizing: border-box }
.colourbar div { display: flex; justify-content: space-between; white-space: nowrap }
aside { flex: 1 1 270px; min-width: 0; max-width: 420px; padding-top: 16px }
aside p { margin: 4px 0 }
aside button + button { margin-left: 6px }
table { border-collapse: collapse; font: inherit; margin: 0 0 8px }
caption { text-align: left; opacity: .8 }
th, td { text-align: right; padding: 1px 8px 1px 0; font-variant-numeric: tabular-nums }
th:first-child { text-align: left; font-weight: normal }
thead th { border-bottom: 1px solid color-mix(in srgb, currentColor 35%, transparent) }
.chart svg { width: 100%; max-width: 380px; display: block; font-size: 10px; fill: currentColor }
.chart i { display: inline-block; width: 10px; height: 10px }
p[role=status] { margin: 2px 0 0; min-height: 2.7em; opacity: .9 }
.help { font: inherit; white-space: pre-wrap; margin: 0 0 4px; padding: 6px 10px; border: 1px solid color-mix(in srgb, currentColor 35%, transparent) }
@media (max-width: 600px) { input[type=range], input[type=range].slice, .knob input[type=range] { width: 120px } button, select { min-height: 30px } }
@media print { .bars { display: none } }
`;

// --- homes ---------------------------------------------------------------------------------------------------------

// Models of this page by key: a viewer that stands in HTML finds its Python side here, whoever comes first.
const homes = (globalThis.mfdiffViewers ??= { models: new Map(), waiting: new Map() });

function link(viewer, model) {
  viewer.listeners.push((change) => {
    for (const [name, value] of Object.entries(change)) if (Object.hasOwn(TRAITS, name)) model.set(name, value);
    model.save_changes();
  });
  const take = (name) => () => same(model.get(name), viewer.state[name]) || viewer.set({ [name]: model.get(name) }, true);
  for (const name of Object.keys(TRAITS)) model.on(`change:${name}`, take(name));
  const held = Object.keys(TRAITS).map((name) => [name, model.get(name)]).filter(([name, value]) => value !== undefined && name !== "slice");
  viewer.set(Object.fromEntries(held), true);
}

const TRAITS = Object.fromEntries(("plane cross slice window windows difference pet_map radiological blend smooth crosshair compare pair swap split contours roi line zoom centre pick show marks hunt").split(" ").map((name) => [name, true]));

// A widget's model was made in the page, shown or not.
function initialize({ model }) {
  const key = model.get("key");
  homes.models.set(key, model);
  for (const viewer of homes.waiting.get(key) ?? []) link(viewer, model);
}

// A widget is shown by itself, in a box of widgets: its data come as a message.
function render({ model, el }) {
  const host = el.appendChild(document.createElement("div"));
  const arrive = (message, buffers) => {
    if (message.kind !== "volumes" || host.shadowRoot) return;
    const { buffer, byteOffset, byteLength } = buffers[0];
    const viewer = new Viewer(host, message.meta, new Uint8Array(buffer ?? buffers[0], byteOffset ?? 0, byteLength));
    link(viewer, model);
  };
  model.on("msg:custom", arrive);
  model.send({ kind: "volumes" });
}

// In a page: `place` holds a still picture and a block with the data; the viewer takes the picture's place.
async function mount(place) {
  const { meta, data } = JSON.parse(place.querySelector("script[type='application/json']").textContent);
  const still = place.firstElementChild, host = document.createElement("div");
  place.append(host);
  const viewer = new Viewer(host, meta, fromBase64(data));
  homes.waiting.set(meta.key, [...(homes.waiting.get(meta.key) ?? []), viewer]);
  await viewer.ready;
  still.remove();
  if (homes.models.has(meta.key)) link(viewer, homes.models.get(meta.key));
}

export default { initialize, render, mount };
