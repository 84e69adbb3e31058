// Draws the page's stored Plotly figures with the local plotly.js, in the colors of the page's theme.
(() => {
  const plots = [];
  const SMALL = 12; // pixels of a letter

  // The theme's colors as Plotly attributes, for every axis that the layout has.
  function themeColors(layout) {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--pst-color-text-base").trim();
    const grid = style.getPropertyValue("--lossbook-grid").trim();
    const clear = "rgba(0,0,0,0)";
    const colors = {
      paper_bgcolor: clear,
      plot_bgcolor: clear,
      "font.color": text,
      "title.font.color": text,
      "legend.bgcolor": clear,
      "legend.font.color": text,
      "coloraxis.colorbar.tickfont.color": text,
    };
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    const scenes = Object.keys(layout).filter((key) => /^scene\d*$/.test(key));
    for (const scene of scenes) {
      for (const axis of ["xaxis", "yaxis", "zaxis"]) {
        axes.push(`${scene}.${axis}`);
        colors[`${scene}.${axis}.backgroundcolor`] = clear;
      }
    }
    for (const axis of axes) {
      colors[`${axis}.color`] = text;
      colors[`${axis}.tickfont.color`] = text;
      colors[`${axis}.title.font.color`] = text;
      for (const line of ["gridcolor", "linecolor", "zerolinecolor"]) colors[`${axis}.${line}`] = grid;
    }
    return colors;
  }

  function setPath(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) {
      if (typeof target[key] === "string") target[key] = { text: target[key] };
      target = target[key] ??= {};
    }
    target[last] = value;
  }

  // Words on lines of at most so many pixels, in the small letters of a narrow figure.
  function fold(text, pixels) {
    if (text.includes("<") || text.includes("$")) return text;
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = `${lines.at(-1)} ${word}`.trim();
      if (lines.at(-1) && longer.length * SMALL * 0.55 > pixels) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    return lines.join("<br>");
  }

  // What a narrow figure has else: the legend below, and titles of axes and subplots in small letters, on as many lines as they need.
  function narrow(layout, width) {
    const changes = { "legend.orientation": "h", "legend.x": 0, "legend.y": 0, "legend.yref": "container", "legend.yanchor": "bottom" };
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    const domain = (axis) => layout[axis].domain ?? [0, 1];
    const inner = { x: 0.75 * width, y: 0.6 * (layout.height ?? 450) };
    const length = (axis) => (domain(axis)[1] - domain(axis)[0]) * inner[axis[0]];
    for (const axis of axes) {
      if (typeof layout[axis].title === "string") layout[axis].title = { text: layout[axis].title };
      const text = layout[axis].title?.text;
      if (!text) continue;
      changes[`${axis}.title.text`] = fold(text, Math.max(length(axis), 60));
      changes[`${axis}.title.font.size`] = SMALL;
    }
    let lines = 1;
    (layout.annotations ?? []).forEach((note, i) => {
      if (note.showarrow !== false || note.xref !== "paper" || note.yanchor !== "bottom") return;
      const below = axes.find((axis) => axis[0] === "x" && Math.abs(note.x - (domain(axis)[0] + domain(axis)[1]) / 2) < 0.01);
      if (!below) return;
      const text = fold(note.text, length(below));
      changes[`annotations.${i}.text`] = text;
      changes[`annotations.${i}.font.size`] = SMALL;
      if (note.y > 0.99) lines = Math.max(lines, text.split("<br>").length);
    });
    if (lines > 1 && layout.height) {
      changes["margin.t"] = (layout.margin?.t ?? 80) + (lines - 1) * SMALL * 1.3;
      changes.height = layout.height + (lines - 1) * SMALL * 1.3;
    }
    return changes;
  }

  // The same paths with the values of the layout as it was; null lets Plotly choose.
  function undone(changes, layout) {
    const value = (path) => path.split(".").reduce((target, key) => target?.[key], layout) ?? null;
    return Object.fromEntries(Object.keys(changes).map((path) => [path, value(path)]));
  }

  // Makes a control of the page do what the control of the figure did.
  function connect(plot, control, steps) {
    const go = (index) => Plotly[steps[index].method || "restyle"](plot, ...structuredClone(steps[index].args));
    for (const button of control.querySelectorAll("button")) button.addEventListener("click", () => go(button.value));
    if (control.matches("select")) control.addEventListener("change", () => go(control.value));
    const range = control.querySelector("input");
    if (!range) return;
    const show = () => {
      const text = `${steps[range.value].label} ${range.dataset.suffix}`.trim();
      control.querySelector("output").textContent = text;
      range.setAttribute("aria-valuetext", text);
    };
    range.addEventListener("input", () => {
      go(range.value);
      show();
    });
    // A play button takes the slider along.
    plot.on("plotly_animatingframe", ({ name }) => {
      const index = steps.findIndex((step) => step.args?.[0]?.[0] === name);
      if (index >= 0) range.value = index;
      show();
    });
    show();
  }

  async function draw(box) {
    const plot = box.querySelector(".lossbook-plot");
    const figure = JSON.parse(box.querySelector("script").textContent);
    figure.layout.xaxis ??= {};
    figure.layout.yaxis ??= {};
    for (const [path, value] of Object.entries(themeColors(figure.layout))) setPath(figure.layout, path, value);
    const wide = structuredClone(figure.layout);
    const isNarrow = () => plot.clientWidth < 500;
    let drawnNarrow = isNarrow();
    if (drawnNarrow) for (const [path, value] of Object.entries(narrow(wide, plot.clientWidth))) setPath(figure.layout, path, value);
    await Plotly.newPlot(plot, {
      data: figure.data,
      layout: figure.layout,
      frames: figure.frames,
      config: { displayModeBar: false, scrollZoom: false },
    });
    box.querySelectorAll(".lossbook-control").forEach((control, i) => connect(plot, control, figure.controls[i]));
    new ResizeObserver(async () => {
      if (!plot.offsetWidth) return;
      if (isNarrow() !== drawnNarrow) {
        drawnNarrow = isNarrow();
        const changes = narrow(wide, plot.clientWidth);
        const layout = structuredClone(plot.layout);
        for (const [path, value] of Object.entries(drawnNarrow ? changes : undone(changes, wide))) setPath(layout, path, value);
        await Plotly.react(plot, plot.data, layout); // relayout would freeze the width
      }
      Plotly.Plots.resize(plot);
    }).observe(box);
    plots.push(plot);
    box.dataset.drawn = document.documentElement.dataset.theme;
  }

  async function recolor(plot) {
    await Plotly.relayout(plot, themeColors(plot.layout));
    plot.closest(".lossbook-figure").dataset.drawn = document.documentElement.dataset.theme;
  }

  document.querySelectorAll(".lossbook-figure").forEach(draw);
  new MutationObserver(() => {
    plots.forEach(recolor);
  }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
})();
