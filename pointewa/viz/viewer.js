"use strict";
// Draws clouds that turn: drag, wheel or two fingers, arrow keys, double click for the first view again.
// Every ".clouds" block has one camera, so that what is side by side turns together.
(() => {
  const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  class Cloud {
    constructor(canvas) {
      this.canvas = canvas;
      this.count = Number(canvas.dataset.count);
      this.points = new Int16Array(decode(canvas.dataset.points).buffer);
      this.colours = decode(canvas.dataset.colours);
      this.sizes = decode(canvas.dataset.sizes); // sixteenths
      this.scale = Number(canvas.dataset.scale);
      this.dot = Number(canvas.dataset.dot);
      this.row = canvas.dataset.row;
      this.visible = true;
      this.keys = new Float64Array(this.count);
      this.order = Array.from({ length: this.count }, (_, i) => i);
    }

    // The lowest and the highest place that the cloud takes as it is turned about the up axis (upright in clouds.py).
    upright(view, pitch) {
      const [cp, sp] = [Math.cos(pitch), Math.sin(pitch)], p = this.points;
      let [low, high] = [Infinity, -Infinity];
      for (let i = 0; i < this.count; i++) {
        const [x, y, z] = [p[3 * i] * this.scale, p[3 * i + 1] * this.scale, p[3 * i + 2] * this.scale];
        const norm = Math.max(1, Math.hypot(x, y, z)), up = y / norm, radius = Math.hypot(x, z) / norm;
        for (const back of [radius, -radius]) {
          const place = (up * cp - back * sp) * Math.sqrt(view.distance ** 2 - 1) / (view.distance - up * sp - back * cp);
          low = Math.min(low, place);
          high = Math.max(high, place);
        }
      }
      return [low, high];
    }

    // `span` is the lowest and the highest place of all clouds of the row: they stay of one size.
    draw(view, camera, span, background) {
      const dots = Math.min(2, window.devicePixelRatio || 1);
      const side = Math.max(1, Math.round(this.canvas.clientWidth * dots));
      const high = Math.max(1, Math.round(this.canvas.clientHeight * dots));
      if (this.canvas.width !== side || this.canvas.height !== high) {
        [this.canvas.width, this.canvas.height] = [side, high];
        this.image = null;
      }
      const context = this.canvas.getContext("2d");
      this.image = this.image || context.createImageData(side, high);
      const room = 2 * (1.06 * high / side - 0.06), fit = Math.min(1, room / Math.max(1e-6, span[1] - span[0]));
      const out = this.image.data;
      for (let i = 0; i < out.length; i += 4) {
        out[i] = background[0], out[i + 1] = background[1], out[i + 2] = background[2], out[i + 3] = 255;
      }
      const [cy, sy] = [Math.cos(camera.yaw), Math.sin(camera.yaw)];
      const [cp, sp] = [Math.cos(camera.pitch), Math.sin(camera.pitch)];
      const p = this.points, n = this.count, half = side / 2;
      const middle = high / 2 + half * camera.zoom * fit * (span[0] + span[1]) / 2 / 1.06, flat = new Float64Array(4 * n);
      for (let i = 0; i < n; i++) {
        const [x, y, z] = [p[3 * i] * this.scale, p[3 * i + 1] * this.scale, p[3 * i + 2] * this.scale];
        const right = x * cy + z * sy, back = z * cy - x * sy;
        const up = y * cp - back * sp, near = y * sp + back * cp;
        const zoom = camera.zoom * fit * Math.sqrt(view.distance ** 2 - 1) / Math.max(0.1, view.distance - near) / 1.06;
        flat[4 * i] = half + half * zoom * right;
        flat[4 * i + 1] = middle - half * zoom * up;
        flat[4 * i + 2] = Math.max(0.6, half * zoom * 1.06 * this.dot * this.sizes[i] / 32); // radius in pixels
        const depth = Math.min(1, Math.max(0, (1 - near) / 2));
        flat[4 * i + 3] = view.fog * depth ** 1.5;
        this.keys[i] = near;
      }
      this.order.sort((a, b) => this.keys[a] - this.keys[b]); // far ones first
      for (const i of this.order) this.splat(out, side, high, i, flat, background);
      context.putImageData(this.image, 0, 0);
    }

    splat(out, side, high, i, flat, background) {
      const [x, y, radius, fog] = [flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]];
      const lift = background[0] < 128 ? 0.2 : 0; // dark colours have to be seen on dark too
      const colour = [0, 1, 2].map((k) => {
        const own = this.colours[3 * i + k];
        return (own + (255 - own) * lift) * (1 - fog) + background[k] * fog;
      });
      const [left, right] = [Math.max(0, Math.floor(x - radius)), Math.min(side - 1, Math.ceil(x + radius))];
      const [top, bottom] = [Math.max(0, Math.floor(y - radius)), Math.min(high - 1, Math.ceil(y + radius))];
      for (let row = top; row <= bottom; row++) {
        for (let column = left; column <= right; column++) {
          const cover = Math.min(1, radius + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y)); // smooth rims
          if (cover <= 0) continue;
          const place = 4 * (row * side + column);
          for (let k = 0; k < 3; k++) out[place + k] += (colour[k] - out[place + k]) * cover;
        }
      }
    }
  }

  function start(block) {
    const view = JSON.parse(block.dataset.view);
    const clouds = [...block.querySelectorAll("canvas")].map((canvas) => new Cloud(canvas));
    const first = { yaw: view.yaw, pitch: view.pitch, zoom: 1 };
    const camera = { ...first }, fingers = new Map();
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    let waiting = false, spread = 0, pitch, spans;

    const draw = (chosen, background = dark.matches ? view.dark : view.background) => {
      if (pitch !== camera.pitch) spans = {};
      for (const cloud of pitch !== camera.pitch ? clouds : []) {
        const [low, high] = cloud.upright(view, camera.pitch), [l, h] = spans[cloud.row] || [low, high];
        spans[cloud.row] = [Math.min(l, low), Math.max(h, high)];
      }
      pitch = camera.pitch;
      for (const cloud of chosen) cloud.draw(view, camera, spans[cloud.row], background);
    };
    const redraw = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        draw(clouds.filter((cloud) => cloud.visible));
      });
    };
    const turn = (dx, dy) => {
      camera.yaw += dx;
      camera.pitch = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, camera.pitch + dy));
      redraw();
    };
    const zoom = (factor) => {
      camera.zoom = Math.min(12, Math.max(0.4, camera.zoom * factor));
      redraw();
    };
    const reset = () => { Object.assign(camera, first); redraw(); };
    const between = () => {
      const [a, b] = [...fingers.values()];
      return Math.hypot(a.x - b.x, a.y - b.y);
    };

    for (const { canvas } of clouds) {
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
        spread = fingers.size === 2 ? between() : 0;
      });
      canvas.addEventListener("pointermove", (event) => {
        const last = fingers.get(event.pointerId);
        if (!last) return;
        fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
        if (fingers.size === 1) {
          const speed = Math.PI / Math.max(100, canvas.clientWidth); // across the panel is half a turn
          turn((event.clientX - last.x) * speed, (event.clientY - last.y) * speed);
        } else if (fingers.size === 2) {
          const now = between();
          if (spread > 0 && now > 0) zoom(now / spread);
          spread = now;
        }
      });
      for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
        canvas.addEventListener(name, (event) => { fingers.delete(event.pointerId); spread = 0; });
      }
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
      }, { passive: false });
      canvas.addEventListener("dblclick", reset);
      canvas.addEventListener("keydown", (event) => {
        const step = 0.15, keys = {
          ArrowLeft: () => turn(-step, 0), ArrowRight: () => turn(step, 0), ArrowUp: () => turn(0, -step),
          ArrowDown: () => turn(0, step), "+": () => zoom(1.15), "-": () => zoom(1 / 1.15), Home: reset,
        };
        if (!(event.key in keys)) return;
        event.preventDefault();
        keys[event.key]();
      });
    }
    if (window.IntersectionObserver) { // long pages: what is out of sight need not be drawn
      const observer = new IntersectionObserver((entries) => {
        for (const entry of entries) {
          clouds.find((cloud) => cloud.canvas === entry.target).visible = entry.isIntersecting;
        }
        redraw();
      });
      for (const { canvas } of clouds) observer.observe(canvas);
    }
    window.addEventListener("resize", redraw);
    dark.addEventListener("change", redraw);
    window.addEventListener("beforeprint", () => draw(clouds, view.background));
    window.addEventListener("afterprint", redraw);
    draw(clouds);
  }

  document.querySelectorAll(".clouds").forEach(start);
})();
