// Draws the page's stored Plotly figures with the local plotly.js, in the colors of the page's theme.
(() => {
  const plots = [];

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
    if (plot.clientWidth < 500) Object.assign((figure.layout.legend ??= {}), { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" });
    await Plotly.newPlot(plot, {
      data: figure.data,
      layout: figure.layout,
      frames: figure.frames,
      config: { displayModeBar: false, scrollZoom: false },
    });
    box.querySelectorAll(".lossbook-control").forEach((control, i) => connect(plot, control, figure.controls[i]));
    new ResizeObserver(() => plot.offsetWidth && Plotly.Plots.resize(plot)).observe(box);
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
