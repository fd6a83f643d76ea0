"use strict";
(() => {
  const byId = id => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { duration, labels, colors, inks, lanes, turns, arms } = data;
  const compared = arms.length > 1;
  const buttons = [...document.querySelectorAll("#turns [data-turn]")];
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  byId("app").hidden = false;
  byId("no-script").hidden = true;

  // A turn as the page keeps it: times, lane, and per arm the label's place and the probabilities in thousandths.
  const START = 0, END = 1, LANE = 2, ARM = 3;
  const changed = turn => compared && turn[ARM] && turn[ARM + 1] && turn[ARM][0] !== turn[ARM + 1][0];
  const clock = s => `${String(Math.floor(s / 60)).padStart(2, "0")}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
  const bound = (low, x, high) => Math.max(low, Math.min(x, high));

  // ---------------------------------------------------------------------------------------------------- waveforms

  const bytesOf = text => {
    const raw = atob(text.trim()), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  };
  // Peaks as [low, high, low, high, …]; each further level has a quarter of the last one's, for wide views.
  const levelsOf = text => {
    const levels = [new Int8Array(bytesOf(text).buffer)];
    while (levels.at(-1).length > 512) {
      const fine = levels.at(-1), coarse = new Int8Array(2 * Math.ceil(fine.length / 8));
      for (let i = 0; i < fine.length; i += 2) {
        const k = 2 * Math.floor(i / 8);
        coarse[k] = i % 8 ? Math.min(coarse[k], fine[i]) : fine[i];
        coarse[k + 1] = i % 8 ? Math.max(coarse[k + 1], fine[i + 1]) : fine[i + 1];
      }
      levels.push(coarse);
    }
    return levels;
  };
  const waves = Object.fromEntries(Object.entries(data.peaks).map(([name, text]) => [name, levelsOf(text)]));

  // ----------------------------------------------------------------------------------------------------- the view

  const canvases = [...document.querySelectorAll(".lane canvas")];
  const overview = byId("overview"), overviewCanvas = overview.querySelector("canvas");
  // At first, the usual turn is wide enough for its answer in words.
  const usual = turns.map(turn => turn[1] - turn[0]).sort((a, b) => a - b)[turns.length >> 1];
  const view = { from: 0, length: Math.min(duration, bound(8, canvases[0].clientWidth / 90 * usual, 120)) };
  const ofLane = lanes.map((_, lane) => turns.map((_, i) => i).filter(i => turns[i][LANE] === lane));
  const longest = lanes.map((_, lane) => Math.max(0, ...ofLane[lane].map(i => turns[i][END] - turns[i][START])));
  let chosen = -1, theme;

  const readTheme = () => {
    const style = getComputedStyle(document.documentElement);
    theme = Object.fromEntries(["ground", "ink", "wave", "line"].map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
  };
  const fitted = canvas => {
    const ratio = window.devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = canvas;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    return [pen, width, height];
  };
  // The turns of a lane that may be seen, in order of start.
  const seen = (lane, from, to) => {
    const all = ofLane[lane];
    const first = start => {
      let low = 0, high = all.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (turns[all[middle]][START] < start) low = middle + 1; else high = middle;
      }
      return low;
    };
    return all.slice(first(from - longest[lane]), first(to));
  };

  const WAVE = 64, GAP = 8, ROW = 50, SOLID = 22;
  const drawLane = lane => {
    const [pen, width] = fitted(canvases[lane]);
    const { from, length } = view, scale = width / length, shown = seen(lane, from, from + length);
    const x = s => (s - from) * scale;

    // Bars of three pixels, in the colour of whoever speaks there.
    const STEP = 3, owner = new Int32Array(Math.ceil(width / STEP)).fill(-1);
    for (const i of shown) {
      const last = Math.ceil(Math.min(x(turns[i][END]), width) / STEP);
      for (let k = Math.max(0, Math.floor(x(turns[i][START]) / STEP)); k < last; k++) owner[k] = i;
    }
    const levels = waves[lanes[lane].peaks];
    if (levels) {
      const perBar = STEP / scale * data.rate, depth = bound(0, Math.floor(Math.log(perBar / 2) / Math.log(4)), levels.length - 1);
      const peaks = levels[depth], rate = data.rate / 4 ** depth;
      for (let k = 0; k < owner.length; k++) {
        const first = Math.floor((from + k * STEP / scale) * rate), last = Math.max(first + 1, Math.floor((from + (k + 1) * STEP / scale) * rate));
        let low = 0, high = 0;
        for (let p = Math.max(0, first); p < last && 2 * p + 1 < peaks.length; p++) {
          low = Math.min(low, peaks[2 * p]);
          high = Math.max(high, peaks[2 * p + 1]);
        }
        const answer = owner[k] < 0 ? null : turns[owner[k]][ARM];
        pen.fillStyle = answer ? colors[answer[0]] : theme.wave;
        const up = Math.max(.5, high / 127 * WAVE / 2), down = Math.max(.5, -low / 127 * WAVE / 2);
        pen.fillRect(k * STEP, WAVE / 2 - up, STEP - 1, up + down);
      }
    }
    pen.font = "13px system-ui, sans-serif";
    pen.textBaseline = "middle";
    for (const i of shown) {
      const left = x(turns[i][START]), right = x(turns[i][END]), wide = Math.max(1, right - left - 1);
      if (right < 0) continue;
      arms.forEach((_, arm) => {
        const y = WAVE + GAP + arm * (ROW + GAP), answer = turns[i][ARM + arm];
        if (!answer) {
          if (arm) return;
          pen.fillStyle = theme.line;
          pen.fillRect(left, y, wide, ROW);
          return;
        }
        const [label, ...probabilities] = answer;
        pen.fillStyle = colors[label];
        pen.fillRect(left, y, wide, SOLID);
        let under = y + SOLID + 2;
        probabilities.forEach((p, k) => {
          const tall = p / 1000 * (ROW - SOLID - 2);
          pen.fillStyle = colors[k];
          pen.fillRect(left, under, wide, tall);
          under += tall;
        });
        const start = Math.max(left, 0), room = Math.min(right, width) - start - 10;
        const percent = `${Math.round(probabilities[label] / 10)} %`;
        const words = [`${labels[label]} ${percent}`, labels[label]].find(text => pen.measureText(text).width <= room);
        if (words) {
          pen.fillStyle = inks[label];
          pen.fillText(words, start + 5, y + SOLID / 2 + 1);
        }
      });
      if (changed(turns[i])) {
        pen.fillStyle = theme.ink;
        pen.fillRect(left, WAVE + GAP + ROW + 2, wide, 4);
      }
      if (i === chosen) {
        pen.strokeStyle = theme.ink;
        pen.lineWidth = 2;
        pen.strokeRect(left - 1, 1, wide + 2, canvases[lane].clientHeight - 2);
      }
    }
  };

  const drawOverview = () => {
    const tall = bound(6, 36 / lanes.length, 14);
    overviewCanvas.style.height = `${lanes.length * (tall + 3) + 3}px`;
    const [pen, width] = fitted(overviewCanvas), scale = width / duration;
    lanes.forEach((_, lane) => ofLane[lane].forEach(i => {
      const answer = turns[i][ARM];
      pen.fillStyle = answer ? colors[answer[0]] : theme.line;
      pen.fillRect(turns[i][START] * scale, 3 + lane * (tall + 3), Math.max(1, (turns[i][END] - turns[i][START]) * scale), tall);
    }));
  };
  const drawScale = () => {
    const scale = byId("scale"), width = scale.clientWidth;
    const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800].find(s => s / view.length * width >= 64) || 3600;
    const marks = [];
    for (let s = Math.ceil(view.from / step) * step; s < view.from + view.length; s += step) {
      const mark = document.createElement("span");
      mark.textContent = clock(s);
      mark.style.left = `${(s - view.from) / view.length * 100}%`;
      marks.push(mark);
    }
    scale.replaceChildren(...marks);
  };
  const drawWindow = () => {
    const frame = overview.querySelector(".window");
    frame.style.left = `${view.from / duration * 100}%`;
    frame.style.width = `${view.length / duration * 100}%`;
    frame.hidden = view.length >= duration;
  };
  const drawNeedle = () => {
    const place = (now() - view.from) / view.length;
    byId("needle").style.left = `${place * 100}%`;
    byId("needle").hidden = place < 0 || place > 1;
    overview.querySelector(".needle").style.left = `${now() / duration * 100}%`;
    byId("clock").textContent = `${clock(now())} / ${clock(duration)}`;
  };
  let waiting = 0;
  const draw = () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      lanes.forEach((_, lane) => drawLane(lane));
      drawScale();
      drawWindow();
      drawNeedle();
    });
  };

  let moving = 0;
  const show = (from, length = view.length) => {
    cancelAnimationFrame(moving);
    view.length = bound(Math.min(2, duration), length, duration);
    view.from = bound(0, from, duration - view.length);
    draw();
  };
  // Moves the view so that a time is in it; at once where motion is unwanted.
  const reveal = (start, end = start) => {
    if (start >= view.from && Math.min(end, start + view.length) <= view.from + view.length) return;
    const target = bound(0, start - view.length * .15, duration - view.length), origin = view.from, began = performance.now();
    if (still.matches) return show(target);
    cancelAnimationFrame(moving);
    const move = at => {
      const part = Math.min(1, (at - began) / 220);
      view.from = origin + (target - origin) * (1 - (1 - part) ** 3);
      draw();
      if (part < 1) moving = requestAnimationFrame(move);
    };
    moving = requestAnimationFrame(move);
  };
  const zoom = (factor, middle = view.from + view.length / 2) => {
    const length = bound(Math.min(2, duration), view.length * factor, duration);
    show(middle - (middle - view.from) * length / view.length, length);
  };

  // ------------------------------------------------------------------------------------------------------ the sound

  let audio = null, stopAt = null, at = 0;
  const now = () => audio ? audio.currentTime : at;
  const player = () => {
    if (!audio && byId("audio")) {
      audio = new Audio();
      audio.src = URL.createObjectURL(new Blob([bytesOf(byId("audio").textContent)], { type: data.audio_type }));
      audio.id = "sound";
      audio.hidden = true;
      document.body.append(audio);
      audio.addEventListener("play", () => { playing(true); requestAnimationFrame(follow); });
      audio.addEventListener("pause", () => playing(false));
      audio.addEventListener("seeked", drawNeedle);
    }
    return audio;
  };
  const ICONS = { play: "M7 4v16l13-8z", pause: "M6 4h4.500v16H6zM13.500 4H18v16h-4.500z" };
  const playing = on => {
    byId("play").setAttribute("aria-label", on ? "Pause" : "Play");
    byId("play").setAttribute("aria-pressed", on);
    byId("play").querySelector("path").setAttribute("d", on ? ICONS.pause : ICONS.play);
    byId("turn").setAttribute("aria-live", on ? "off" : "polite");
  };
  const follow = () => {
    if (!audio || audio.paused) return;
    if (stopAt !== null && audio.currentTime >= stopAt) {
      audio.pause();
      stopAt = null;
    } else {
      const current = audio.currentTime;
      if (stopAt === null) {
        const speaking = turnAt(current);
        if (speaking >= 0 && speaking !== chosen) choose(speaking, false);
      }
      reveal(current);
      requestAnimationFrame(follow);
    }
    drawNeedle();
  };
  const play = (from, to = null) => {
    at = from;
    const sound = player();
    if (!sound) return drawNeedle();
    stopAt = to;
    sound.currentTime = from;
    sound.play().catch(() => playing(false));
  };
  const toggle = () => {
    const sound = player();
    if (!sound) return;
    if (!sound.paused) return sound.pause();
    stopAt = null;
    if (sound.currentTime >= duration - .05) sound.currentTime = 0;
    sound.play().catch(() => playing(false));
  };
  // The turn with the latest start among those that cover a time.
  const turnAt = (s, lane = null) => {
    let found = -1;
    for (const one of lane === null ? lanes.keys() : [lane])
      for (const i of seen(one, s, s + .001))
        if (turns[i][END] >= s && (found < 0 || turns[i][START] > turns[found][START])) found = i;
    return found;
  };

  // ------------------------------------------------------------------------------------------------------ the turns

  const made = (tag, properties = {}, ...inside) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...inside);
    return element;
  };
  const barOf = (answer, arm) => {
    const words = labels.map((label, k) => `${label} ${Math.round(answer[k + 1] / 10)} %`).join(", ");
    const bar = made("div", { className: "bar", title: words });
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", `${arm}: ${words}`);
    labels.forEach((label, k) => {
      const p = answer[k + 1] / 1000;
      if (p <= 0) return;
      const part = made("i", {}, made("span", { textContent: `${Math.round(100 * p)} %` }), made("span", { textContent: label }));
      part.style.cssText = `flex-grow:${p};background:${colors[k]};color:${inks[k]}`;
      bar.append(part);
    });
    return bar;
  };
  const choose = (i, move = true) => {
    if (i < 0 || i >= turns.length) return;
    const row = buttons[i].closest("tr");
    if (chosen >= 0) buttons[chosen].closest("tr").removeAttribute("aria-current");
    chosen = i;
    row.setAttribute("aria-current", "true");
    const [start, end] = turns[i], who = made("p", { className: "who" });
    who.append(made("b", {}, made("bdi", { textContent: row.querySelector(".name bdi").textContent })),
      ` ${clock(start)} – ${clock(end)} `, made("span", { className: "quiet", textContent: `turn ${i + 1} of ${turns.length}, ${(end - start).toFixed(1)} s` }));
    const words = row.querySelector(".words")?.textContent.trim(), inside = [who];
    if (words) inside.push(made("p", { className: "said" }, made("bdi", { textContent: words })));
    const grid = made("div", { className: "arms" });
    arms.forEach((arm, k) => {
      const answer = turns[i][ARM + k];
      if (answer) grid.append(made("span", { className: "quiet", textContent: arm }), made("b", { textContent: labels[answer[0]] }), barOf(answer, arm));
    });
    inside.push(grid);
    byId("turn").replaceChildren(...inside);
    if (move) reveal(start, end);
    draw();
  };
  const hear = i => {
    choose(i);
    if (i >= 0) play(turns[i][START], turns[i][END]);
  };
  const step = by => choose(chosen < 0 ? (by > 0 ? Math.max(0, turns.findIndex(turn => turn[END] > now())) : 0) : bound(0, chosen + by, turns.length - 1));
  const nextChange = () => {
    for (let k = 1; k <= turns.length; k++) {
      const i = (Math.max(chosen, -1) + k) % turns.length;
      if (changed(turns[i])) return hear(i);
    }
  };

  byId("turns").addEventListener("click", event => {
    const button = event.target.closest("[data-turn]");
    if (button) hear(Number(button.dataset.turn));
  });
  byId("only-changed")?.addEventListener("change", event => byId("turns").classList.toggle("only-changed", event.target.checked));
  byId("play").addEventListener("click", toggle);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("next-change")?.addEventListener("click", nextChange);
  byId("in").addEventListener("click", () => zoom(.5));
  byId("out").addEventListener("click", () => zoom(2));
  byId("all").addEventListener("click", () => show(0, duration));
  byId("timeline").addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), Enter: () => hear(Math.max(0, chosen)), " ": toggle,
      c: nextChange, "+": () => zoom(.5), "=": () => zoom(.5), "-": () => zoom(2), 0: () => show(0, duration),
      Home: () => choose(0), End: () => choose(turns.length - 1),
    };
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });

  // ----------------------------------------------------------------------------------------------- pointers and sizes

  const area = byId("lanes"), pointers = new Map();
  let pressed = null;
  const timeAt = clientX => {
    const { left, width } = canvases[0].getBoundingClientRect();
    return view.from + (clientX - left) / width * view.length;
  };
  area.addEventListener("pointerdown", event => {
    pointers.set(event.pointerId, event.clientX);
    pressed = pointers.size > 1 ? null : { x: event.clientX, y: event.clientY, from: view.from, moved: false };
  });
  area.addEventListener("pointermove", event => {
    if (!pointers.has(event.pointerId)) return;
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
      const before = Math.abs(pointers.get(event.pointerId) - other), after = Math.abs(event.clientX - other);
      if (before > 10 && after > 10) zoom(before / after, timeAt((event.clientX + other) / 2));
    } else if (pressed && (pressed.moved || Math.abs(event.clientX - pressed.x) > 5)) {
      if (!pressed.moved) area.setPointerCapture(event.pointerId);
      pressed.moved = true;
      show(pressed.from - (event.clientX - pressed.x) / canvases[0].clientWidth * view.length);
    }
    pointers.set(event.pointerId, event.clientX);
  });
  for (const name of ["pointerup", "pointercancel"]) area.addEventListener(name, event => pointers.delete(event.pointerId));
  area.addEventListener("click", event => {
    const lane = canvases.indexOf(event.target);
    if (lane < 0 || pressed?.moved) return;
    const s = bound(0, timeAt(event.clientX), duration), found = turnAt(s, lane);
    if (event.offsetY > WAVE + GAP / 2 && found >= 0) return hear(found);
    if (found >= 0) choose(found, false);
    play(s);
  });
  area.addEventListener("wheel", event => {
    if (event.ctrlKey) zoom(Math.exp(event.deltaY / 200), timeAt(event.clientX));
    else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) show(view.from + event.deltaX / canvases[0].clientWidth * view.length);
    else return;
    event.preventDefault();
  }, { passive: false });
  const drag = event => {
    const { left, width } = overview.getBoundingClientRect();
    show((event.clientX - left) / width * duration - view.length / 2);
  };
  overview.addEventListener("pointerdown", event => { overview.setPointerCapture(event.pointerId); drag(event); });
  overview.addEventListener("pointermove", event => { if (overview.hasPointerCapture(event.pointerId)) drag(event); });

  const redraw = () => { readTheme(); drawOverview(); draw(); };
  new ResizeObserver(redraw).observe(byId("timeline"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
})();
