"use strict";
// Filters, sorting, charts and samples of the study page. Text enters the document as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const element = (tag, name, ...children) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...children);
    return made;
  };

  // ---- which arms are shown
  const filters = find("#filters");
  const shown = () => {
    const wanted = filters ? Object.fromEntries(new FormData(filters)) : {};
    // An arm without a value, such as the unpruned model, which has no metric, stays as what the others are compared to.
    const fits = (arm) => Object.entries(wanted).every(([name, value]) => !value || arm[name] === null || arm[name] === value);
    return new Set(data.arms.filter(fits).map((arm) => arm.name));
  };
  let visible = shown();

  const filter = () => {
    visible = shown();
    for (const row of all("[data-arm]")) {
      row.hidden = !visible.has(row.dataset.arm) || (row.dataset.other !== undefined && !visible.has(row.dataset.other));
    }
    if (filters) find("#count").textContent = `${visible.size} of ${data.arms.length} arms`;
    drawAll();
    if (browsers.answers) browsers.answers();
  };
  if (filters) {
    filters.addEventListener("change", filter);
    filters.addEventListener("submit", (event) => event.preventDefault());
    filters.addEventListener("reset", () => setTimeout(filter));
  }

  // ---- sorting
  const sort = (header) => {
    const table = header.closest("table");
    const column = [...header.parentNode.children].indexOf(header);
    const direction = header.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    for (const other of all("thead th", table)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => {
      const cell = row.children[column];
      if (cell.dataset.order === undefined) return cell.textContent.trim();
      return cell.dataset.order === "" ? null : Number(cell.dataset.order);
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is not known comes last either way
      return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
    };
    const body = find("tbody", table);
    body.append(...[...body.rows].sort(compare));
  };
  for (const header of all(".sortable thead th")) find("button", header).addEventListener("click", () => sort(header));

  // ---- light and dark
  const button = find("#theme");
  const preference = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (preference.matches ? "dark" : "light")) === "dark";
  const showTheme = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(dark()));
    drawAll();
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    showTheme();
  });
  preference.addEventListener("change", showTheme);
  find("#print").addEventListener("click", async () => { // paper is light: charts are drawn anew for it, and then again
    const before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    await drawAll();
    addEventListener("afterprint", () => {
      if (before) document.documentElement.dataset.theme = before;
      else delete document.documentElement.dataset.theme;
      showTheme();
    }, { once: true });
    print();
  });

  // ---- charts
  const views = new Map();
  const looks = (width, longest) => {
    const [ink, soft, line, ground] = dark()
      ? ["#e4e7eb", "#a3abb5", "#333942", "#15181d"]
      : ["#1d2126", "#59616b", "#e4e6ea", "#ffffff"];
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: ground,
      font,
      lineBreak: "\n",
      view: { stroke: null },
      rule: { color: soft },
      text: { color: ink },
      tick: { color: ink },
      axis: {
        labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft, tickColor: soft,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, labelPadding: 5, titlePadding: 9, tickSize: 4,
        labelLimit: Math.min(320, 0.42 * width), maxExtent: 340,
      },
      legend: {
        orient: "bottom", direction: "horizontal", columns: Math.max(1, Math.floor(width / (60 + 6.5 * longest))), labelColor: ink,
        titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, labelLimit: Math.min(420, width - 110),
        symbolLimit: 0, symbolSize: 110, symbolStrokeWidth: 0, offset: 12, // a dash would fray the outline
      },
    };
  };

  const NARROW = 560;
  const broken = (text, most) => text.replace(new RegExp(`(.{1,${most}})( |$)`, "g"), "$1\n").trimEnd();
  const LABEL = "length(datum.label) > 22 ? replace(datum.label, regexp('^(.{8,22}) '), '$1\\n') : datum.label";

  // The specification with the rows of visible arms, legends of what is left, colours for the ground, and lines that fit.
  const specification = (name, width) => {
    const spec = structuredClone(data.charts[name]);
    spec.width = Math.max(width, spec.usermeta.least);
    spec.datasets.rows = spec.datasets.rows.filter((row) => row.arm === undefined || visible.has(row.arm));
    const walk = (node) => {
      if (node === null || typeof node !== "object") return;
      const { field, scale, x, y } = node;
      if (width < NARROW && typeof x?.title === "string") x.axis = { ...x.axis, title: broken(x.title, Math.floor(width / 13)) };
      if (width < NARROW && y?.type === "nominal") y.axis = { ...y.axis, labelExpr: LABEL };
      if (field && scale && Array.isArray(scale.domain) && Array.isArray(scale.range) && typeof scale.domain[0] === "string") {
        const present = new Set(spec.datasets.rows.map((row) => row[field]));
        const kept = scale.domain.map((value, index) => [value, scale.range[index]]).filter(([value]) => present.has(value));
        scale.domain = kept.map(([value]) => value);
        scale.range = kept.map(([, look]) => (dark() && data.dark[look]) || look);
        spec.usermeta.longest = Math.max(...scale.domain.map((value) => value.length));
      }
      Object.values(node).forEach(walk);
    };
    walk({ ...spec, datasets: null });
    return spec;
  };

  const draw = async (figure) => {
    const name = figure.dataset.chart;
    const place = find(".plot", figure);
    const turn = (draw.turns.get(figure) ?? 0) + 1;
    draw.turns.set(figure, turn);
    const spec = specification(name, place.clientWidth);
    if (!spec.datasets.rows.length) {
      views.get(name)?.finalize();
      views.delete(name);
      place.replaceChildren(element("p", "empty", "No arm of this figure matches the filters."));
      return;
    }
    const config = looks(place.clientWidth, spec.usermeta.longest ?? 20);
    const fresh = element("div", "");
    const made = await window.vegaEmbed(fresh, spec, {
      actions: false, renderer: "svg", ast: true, config, defaultStyle: false, tooltip: { disableDefaultStyle: true },
    });
    if (draw.turns.get(figure) !== turn) return made.finalize(); // a later drawing has begun
    views.get(name)?.finalize();
    views.set(name, made);
    place.replaceChildren(fresh);
  };
  draw.turns = new Map();
  const drawAll = () => Promise.all(all("[data-chart]").map(draw));

  for (const figure of all("[data-chart]")) {
    figure.addEventListener("click", async (event) => {
      const type = event.target.dataset?.save;
      if (!type || !views.has(figure.dataset.chart)) return;
      const link = element("a", "");
      link.href = await views.get(figure.dataset.chart).view.toImageURL(type, 2);
      link.download = `${figure.dataset.chart}.${type}`;
      link.click();
    });
  }
  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    if (innerWidth !== width) waiting = setTimeout(() => { width = innerWidth; drawAll(); }, 150);
  });

  // ---- samples
  const STEP = 8;
  const browsers = {};
  const looksOf = new Map(data.arms.map((arm) => [arm.name, arm.look]));

  const browse = (name, items, contains, show) => {
    const form = find(`[data-browser="${name}"]`);
    const more = find(`[data-more="${name}"]`);
    const place = find(`[data-samples="${name}"]`);
    let limit = STEP;
    const refresh = () => {
      const wanted = Object.fromEntries(new FormData(form));
      const query = (wanted.query ?? "").trim().toLowerCase();
      const found = items(wanted).filter((item) => !query || contains(item).some((text) => text.toLowerCase().includes(query)));
      place.replaceChildren(...found.slice(0, limit).map((item) => show(item, wanted)));
      find("output", form).textContent = `${Math.min(limit, found.length)} of ${found.length} shown`;
      more.hidden = found.length <= limit;
    };
    const restart = () => { limit = STEP; refresh(); };
    for (const kind of ["input", "change"]) form.addEventListener(kind, restart);
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => { limit += STEP; refresh(); });
    browsers[name] = restart;
    restart();
  };

  const block = (label, text, extra) => {
    const head = element("p", "label", element("span", "", label));
    if (extra) head.append(extra);
    return element("div", "", head, element("p", "text", text === "" ? "(empty)" : text));
  };

  if (data.answers) {
    const { arms, anchors, seeds, texts, items } = data.answers;
    const said = (item) => item.said.map((each, index) => [each, index]).filter(([each, index]) => each && visible.has(arms[index]));
    const verdict = (score) =>
      score === 1 ? element("span", "right", "✓ right") : score === 0 ? element("span", "wrong", "✗ wrong") : element("span", "part", score.toFixed(2));
    const chosen = ({ task, apart }) =>
      items.filter((item) => (!task || item.task === task) && (!apart || new Set(said(item).map(([[, score]]) => score)).size > 1));
    const contains = (item) => [item.prompt, item.answer, ...said(item).map(([[number]]) => number)].filter((n) => n !== undefined).map((n) => texts[n]);
    const show = (item) => {
      const asked = element("div", "asked", block("prompt", texts[item.prompt] ?? ""));
      if (item.answer !== undefined) asked.append(block("expected answer", texts[item.answer]));
      const answers = said(item).map(([[number, score], index]) => {
        const link = element("a", "", arms[index] + (seeds[index] === null ? "" : `, seed ${seeds[index]}`));
        link.href = `#${anchors[index]}`;
        const glyph = element("span", `glyph look-${looksOf.get(arms[index])}`);
        glyph.setAttribute("aria-hidden", "true");
        return block(element("span", "", glyph, link), texts[number], verdict(score));
      });
      return element("article", "sample", element("h3", "", `${item.task} · ${item.id}`), asked, element("div", "said", ...answers));
    };
    browse("answers", chosen, contains, show);
  }

  if (data.rewrites) {
    const { texts, sets } = data.rewrites;
    const form = find('[data-browser="rewrites"]');
    const reasons = () => {
      const names = [...new Set(sets[form.elements.set.value].rows.map((row) => row.reason))];
      form.elements.reason.replaceChildren(new Option("all", ""), ...names.map((each) => new Option(each.replaceAll("_", " "), each)));
    };
    form.elements.set.addEventListener("change", reasons);
    reasons();
    const chosen = ({ set, reason }) => sets[set].rows.filter((row) => !reason || row.reason === reason);
    const contains = (row) => [texts[row.prompt], texts[row.reference], texts[row.rewrite]];
    const show = (row) => {
      const why = row.reason.replaceAll("_", " ");
      const verdict = row.kept ? element("span", "right", `✓ kept: ${why}`) : element("span", "wrong", `✗ reference kept: ${why}`);
      return element(
        "article", "sample", element("h3", "", row.id), element("div", "asked", block("prompt", texts[row.prompt])),
        element("div", "said", block("reference", texts[row.reference]), block("rewrite", texts[row.rewrite], verdict)),
      );
    };
    browse("rewrites", chosen, contains, show);
  }

  // ---- the contents, and links into closed details
  const open = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  const contents = find("nav details");
  if (matchMedia("(max-width: 68rem)").matches) contents.open = false;
  addEventListener("beforeprint", () => { for (const each of all("section details")) each.open = true; });

  showTheme();
  drawAll().then(() => { document.documentElement.dataset.ready = "true"; open(); });
})();
