"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;

  // ---- theme and charts
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const views = [];
  function config() {
    const css = getComputedStyle(root), ink = css.getPropertyValue("--ink").trim(), line = css.getPropertyValue("--line").trim();
    const text = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return { background: null, font: "system-ui, Segoe UI, Roboto, sans-serif", view: { stroke: line },
      axis: { ...text, gridColor: line, domainColor: line, tickColor: line, gridOpacity: 0.6 },
      legend: { ...text, symbolStrokeWidth: 2 }, title: { color: ink } };
  }
  async function draw() {
    while (views.length) views.pop().finalize();
    const options = { actions: false, renderer: "svg", config: config(), ast: false };
    await Promise.all([...document.querySelectorAll("[data-chart]")].map(async (place) => {
      const spec = structuredClone(data.charts[place.dataset.chart]);
      views.push(await vegaEmbed(place, spec, options));
    }));
    root.dataset.drawn = isDark() ? "dark" : "light";
  }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (!root.dataset.theme) draw(); });
  draw();

  // ---- sortable tables
  const valueOf = (row, column) => {
    const given = row.cells[column].dataset.value;
    return given !== "" && !Number.isNaN(Number(given)) ? Number(given) : given;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    table.tHead.querySelectorAll("button").forEach((button, column) => button.addEventListener("click", () => {
      const head = button.parentElement, down = head.getAttribute("aria-sort") === "ascending";
      table.tHead.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (one, two) => {
        const a = valueOf(one, column), b = valueOf(two, column);
        return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      };
      const rows = [...table.tBodies[0].rows].sort((one, two) => (down ? -1 : 1) * compare(one, two));
      table.tBodies[0].append(...rows);
    }));
  }

  // ---- viewer
  const RAMP = [[68, 1, 84], [49, 104, 142], [53, 183, 121], [253, 231, 37]];
  function colour(value) {
    const at = value * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2), part = at - low;
    const mixed = RAMP[low].map((channel, i) => Math.round(channel + part * (RAMP[low + 1][i] - channel)));
    return `rgba(${mixed.join(",")},${0.3 + 0.35 * value})`;
  }
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const judged = (score) => score === null ? "" : score >= 1 ? "right" : score >= 0.5 ? `${Math.round(100 * score)} %` : "wrong";

  function hatch(context) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const pen = tile.getContext("2d");
    pen.fillStyle = "rgba(60,60,60,0.85)";
    pen.fillRect(0, 0, 8, 8);
    pen.strokeStyle = "rgba(190,190,190,0.55)";
    pen.lineWidth = 1.5;
    pen.beginPath(); pen.moveTo(0, 8); pen.lineTo(8, 0); pen.stroke();
    return context.createPattern(tile, "repeat");
  }

  function start(element) {
    const viewer = data.viewers[element.dataset.viewer], find = (name) => element.querySelector(`.${name}`);
    const choose = find("sample"), slider = find("layer"), panels = find("panels");
    let sample, attention, pictures = [];
    viewer.samples.forEach((one, number) => {
      const mark = judged(one.pruned_score);
      choose.append(new Option(`${number + 1}. ${mark ? mark + ": " : ""}${one.question}`, number));
    });
    slider.max = viewer.num_layers - 1;

    function load() {
      sample = viewer.samples[Number(choose.value)];
      attention = bytes(sample.attention);
      panels.replaceChildren();
      pictures = sample.panels.map((panel) => {
        const canvas = document.createElement("canvas"), picture = new Image();
        canvas.setAttribute("role", "img");
        panels.append(canvas);
        picture.addEventListener("load", paint);
        picture.src = panel.picture;
        return { canvas, picture, panel };
      });
      find("question").textContent = sample.question;
      find("reference").textContent = sample.references.join(" / ") || "(none)";
      for (const which of ["full", "pruned"]) {
        find(which).textContent = sample[`${which}_answer`] || "(empty)";
        const score = find(`${which}-score`);
        score.textContent = judged(sample[`${which}_score`]);
        score.className = `${which}-score ${score.textContent}`;
      }
      find("missing").textContent = sample.note ? `Note: ${sample.note}.` : "";
      find("previous").disabled = choose.selectedIndex === 0;
      find("next").disabled = choose.selectedIndex === viewer.samples.length - 1;
      paint();
    }

    function leftAt(layer) {
      const done = sample.stages.filter((stage) => stage.layer < layer);
      return done.length ? new Set(done[done.length - 1].kept) : null;
    }
    function recorded(layer) {
      // The nearest layer at or before this one; -1 without one.
      let found = -1;
      sample.layers.forEach((known, index) => { if (known <= layer) found = index; });
      return found;
    }

    function paint() {
      const layer = Number(slider.value), count = sample.places.length, index = layer < 0 ? -1 : recorded(layer);
      const left = layer < 0 ? null : leftAt(layer);
      for (const { canvas, picture, panel } of pictures) {
        if (!picture.complete || !picture.naturalWidth) continue;
        const scale = Math.max(1, Math.ceil(480 / picture.naturalWidth));
        canvas.width = picture.naturalWidth * scale;
        canvas.height = picture.naturalHeight * scale;
        const context = canvas.getContext("2d");
        context.drawImage(picture, 0, 0, canvas.width, canvas.height);
        paintTokens(context, canvas, panel, pictures.findIndex((one) => one.canvas === canvas), index, left);
      }
      const number = left ? left.size : count;
      const name = layer < 0 ? "image, before pruning" : `${layer}`;
      find("layer-name").textContent = name;
      slider.setAttribute("aria-valuetext", layer < 0 ? name : `layer ${layer}, ${number} of ${count} tokens`);
      let text = layer < 0 ? `${count} vision tokens.` : `Layer ${layer} computes ${number} of ${count} vision tokens.`;
      if (index >= 0) {
        text += ` Largest attention: ${sample.peaks[index]} times the mean of the layer.`;
        if (sample.layers[index] !== layer) text += ` Attention shown is that of layer ${sample.layers[index]}.`;
      }
      find("state").textContent = text;
      pictures.forEach(({ canvas }, at) => canvas.setAttribute("aria-label", `Picture ${at + 1}. ${text}`));
      element.dataset.painted = `${choose.value}:${layer}`;
    }

    function paintTokens(context, canvas, panel, which, index, left) {
      const width = canvas.width * panel.width / panel.columns, height = canvas.height * panel.height / panel.rows;
      const heat = find("heat").checked && index >= 0, drop = find("drop").checked && left, gone = hatch(context);
      const count = sample.places.length;
      sample.places.forEach((place, token) => {
        if (!place || place[0] !== which) return;
        const box = [place[2] * width, place[1] * height, width, height];
        if (drop && !left.has(token)) {
          context.fillStyle = gone;
          context.fillRect(...box);
        } else if (heat) {
          const relative = attention[index * count + token] / 255 * sample.peaks[index];
          context.fillStyle = colour(Math.min(1, Math.max(0, (Math.log2(Math.max(relative, 0.01)) + 2) / 4)));
          context.fillRect(...box);
        }
        context.strokeStyle = "rgba(255,255,255,0.25)";
        context.strokeRect(...box);
      });
    }

    choose.addEventListener("change", load);
    slider.addEventListener("input", paint);
    find("heat").addEventListener("change", paint);
    find("drop").addEventListener("change", paint);
    find("previous").addEventListener("click", () => { choose.selectedIndex -= 1; load(); });
    find("next").addEventListener("click", () => { choose.selectedIndex += 1; load(); });
    load();
  }
  document.querySelectorAll("[data-viewer]").forEach(start);
})();
