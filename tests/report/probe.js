// What the browser tests ask of an opened study page.
window.probe = (() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const byChart = (ask) => Object.fromEntries(all("[data-chart]").map((figure) => [figure.dataset.chart, ask(figure)]));
  const marks = (figure) =>
    all("svg .role-mark path, svg .role-mark line", figure)
      .filter((mark) => mark.__data__?.datum?.arm !== undefined || mark.__data__?.href);
  const box = (element) => element.getBoundingClientRect();
  const paper = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    if (!known.has(colour)) {
      paper.fillStyle = colour;
      paper.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...paper.getImageData(0, 0, 1, 1).data].map((value) => linear(value / 255));
      known.set(colour, 0.2126 * r + 0.7152 * g + 0.0722 * b);
    }
    return known.get(colour);
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const WORDS = ".lead, .note, figcaption span, .sortable td, .sortable th a, .sortable small, #filters label, nav a";
  return {
    // The arms that have marks, '' for marks of none; none where a chart says that it is empty.
    arms: () => byChart((figure) => [...new Set(marks(figure).map((mark) => mark.__data__.datum.arm ?? ""))]),
    visible: () => byChart((figure) => marks(figure).filter((mark) => box(mark).width > 2 && box(mark).height > 2).length),
    links: () => byChart((figure) => marks(figure).map((mark) => mark.__data__.href).filter(Boolean)),
    linked: (name) => marks(document.querySelector(`[data-chart="${name}"]`)).find((mark) => mark.__data__.href),
    fills: () => [...new Set(all("[data-chart]").flatMap(marks).filter((mark) => mark.__data__.mark.marktype === "symbol")
      .map((mark) => mark.getAttribute("fill").toUpperCase()))],
    glyphs: () => [...new Set(all(".glyph").map((each) => getComputedStyle(each, "::before"))
      .map((style) => `${style.content} ${style.color}`))],
    rows: () => all("main [data-arm]").map((row) => [row.dataset.arm, row.dataset.other ?? row.dataset.arm, row.hidden]),
    column: (table, place) => [...table.tBodies[0].rows].map((row) => row.children[place].dataset.order),
    grounds: () => [...new Set(all("[data-chart] svg").map((svg) => svg.style.backgroundColor))],
    // The least contrast of words with the ground, of charts' axes and legends and of the page.
    contrast: () => {
      const ground = getComputedStyle(document.body).backgroundColor;
      const drawn = all("svg [class*=role-axis] text, svg [class*=role-legend] text").map((text) => text.getAttribute("fill"));
      const written = all(WORDS).map((element) => getComputedStyle(element).color);
      return Math.min(...[...drawn, ...written].map((colour) => contrast(colour, ground)));
    },
    fitting: () => all("[data-chart]").every((figure) => {
      const own = JSON.parse(document.getElementById("data").textContent).charts[figure.dataset.chart].usermeta.least;
      return box(figure.querySelector("svg")).width <= Math.max(box(figure).width, own) + 1;
    }),
    // Words of charts that reach out of their chart.
    cut: () => all("[data-chart] svg").flatMap((svg) => {
      const at = box(svg);
      const out = (own) => own.left < at.left - 1 || own.right > at.right + 1 || own.top < at.top - 1 || own.bottom > at.bottom + 1;
      return all("text", svg).filter((text) => text.textContent && out(box(text)))
        .map((text) => [svg.closest("figure").dataset.chart, text.textContent]);
    }),
    dangling: () => all("main a").filter((link) => !document.getElementById(link.hash.slice(1))).map((link) => link.href),
    missing: (links) => links.filter((link) => document.querySelector(link)?.tagName !== "DETAILS"),
  };
})();
