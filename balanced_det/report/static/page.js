// Draws the figures of the page with Vega-Lite, again when light turns to dark.
// document.documentElement.dataset.drawn counts the figures that are there.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // Okabe and Ito's colours, which colour-blind people tell apart; lighter ones on dark paper.
  const categories = {
    false: ["#D55E00", "#0072B2", "#009E73", "#AA4499", "#8C6D1F", "#555555"],
    true: ["#FF9F5A", "#6CB6FF", "#4CC38A", "#E291D0", "#E6CE5B", "#B5BDC6"],
  };
  function config() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    const accent = color("--accent");
    return {
      background: null,
      font: font,
      mark: { color: accent, tooltip: true },
      bar: { color: accent },
      point: { color: accent },
      line: { color: accent },
      rule: { color: color("--ink") },
      rect: { color: accent },
      range: {
        category: categories[dark.matches],
        heatmap: [color("--raised"), accent],
        ramp: [color("--raised"), accent],
      },
      axis: {
        labelColor: color("--dim"), titleColor: color("--ink"), gridColor: color("--line"),
        domainColor: color("--line"), tickColor: color("--line"), titleFontWeight: "normal",
        labelOverlap: true, gridOpacity: 0.7,
      },
      axisX: { grid: false },
      legend: { labelColor: color("--dim"), titleColor: color("--ink"), titleFontWeight: "normal" },
      view: { stroke: null },
    };
  }
  async function draw() {
    const look = config();
    let drawn = 0;
    for (const [index, figure] of figures.entries()) {
      const place = document.getElementById("figure-" + index);
      try {
        await vegaEmbed(place, figure, {
          actions: false, renderer: "svg", config: look,
          tooltip: { theme: dark.matches ? "dark" : "light" },
        });
        drawn += 1;
      } catch (error) {
        place.textContent = "This figure could not be drawn: " + error;
        console.error(error);
      }
    }
    document.documentElement.dataset.drawn = drawn;
  }
  dark.addEventListener("change", draw);
  draw();
})();
