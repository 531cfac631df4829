// The maps: a panel per component (and per frame: before, after, difference), rows are layers, columns are
// tokens or roles. Cells are chosen by click, box and keyboard; what is chosen is what Python says is chosen.

const SCALES = {
  light: {
    up: ["#f7f6f4", "#fbd9c6", "#f2a384", "#d55f4c", "#ad1a2d", "#67001f"],
    down: ["#f7f6f4", "#d3e5ef", "#93c4dd", "#4a93c2", "#2367ab", "#08305f"],
  },
  dark: {
    up: ["#24272e", "#56302f", "#95403a", "#d65f4b", "#f79a7d", "#ffdccb"],
    down: ["#24272e", "#28415b", "#2f6a9c", "#4f9bd4", "#93c8f2", "#d9edff"],
  },
};

function mix(stops, share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (stops.length - 1);
  const [low, high] = [stops[Math.floor(place)], stops[Math.floor(place) + 1]];
  const channel = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  const rest = place - Math.floor(place);
  const rgb = [0, 1, 2].map((i) => Math.round(channel(low, i) * (1 - rest) + channel(high, i) * rest));
  return `rgb(${rgb.join(" ")})`;
}

const colour = (effect, scale, largest) =>
  mix(effect >= 0 ? scale.up : scale.down, Math.abs(effect) / largest);

const FRAMES = { before: "before", after: "after the edit", difference: "difference, after less before" };

class Maps {
  constructor(page) {
    this.page = page;
    this.view = null;
    this.frame = "before";
    this.scale = "shared";
    this.cursor = null; // [panel, layer, column] of the keyboard
    this.panels = [];
    this.pending = []; // what was asked for, and is not done yet
    this.tip = h("div", { class: "tip", role: "tooltip", hidden: true });
    this.live = h("div", { class: "unseen", "aria-live": "polite" });
    this.chooser = h("select", { "aria-label": "which request", onchange: () => this.show(+this.chooser.value) });
    this.frames = h("div", { class: "segments", role: "radiogroup", "aria-label": "which map" });
    this.scales = h(
      "select",
      { "aria-label": "colour scale", onchange: () => { this.scale = this.scales.value; this.draw(); } },
      h("option", { value: "shared" }, "one colour scale"),
      h("option", { value: "panel" }, "a scale per panel"),
    );
    this.facts = h("p", { class: "facts" });
    this.body = h("div", { class: "panels" });
    this.legend = h("div", { class: "legend" });
    this.element = h(
      "section",
      { class: "maps", "aria-label": "maps" },
      h("div", { class: "bar" }, this.chooser, this.frames, this.scales),
      this.facts,
      this.body,
      this.legend,
      this.tip,
      this.live,
    );
    page.on("map", () => this.update());
    page.on("sites", () => this.mark());
    page.onEvent("done", () => {
      this.pending = this.pending.filter((choice) => page.asked.has(choice.ticket));
      this.mark();
    });
    page.onEvent("cells", ({ cells }) => this.measured(cells));
    page.onTheme(() => this.draw());
    const resized = new ResizeObserver(() => { if (this.map?.views?.length && this.body.clientWidth !== this.width) this.draw(); });
    resized.observe(this.body);
    page.ended.push(() => resized.disconnect());
  }

  get map() {
    return this.page.get("map");
  }

  update() {
    const views = this.map.views ?? [];
    this.view = Math.min(this.view ?? (views.length === 2 ? 1 : 0), Math.max(0, views.length - 1));
    if (!this.map.after) this.frame = "before";
    else if (!this.hadAfter) this.frame = "all";
    this.hadAfter = this.map.after;
    replace(this.chooser, views.map((view, i) => h("option", { value: i, selected: i === this.view }, view.text)));
    this.chooser.hidden = this.scales.hidden = views.length === 0;
    const frames = this.map.after ? ["before", "after", "difference", "all"] : [];
    replace(
      this.frames,
      frames.map((name) =>
        h(
          "button",
          {
            type: "button",
            role: "radio",
            "data-frame": name,
            "aria-checked": String(name === this.frame),
            onclick: () => { this.frame = name; this.update(); },
          },
          name === "all" ? "all three" : name,
        ),
      ),
    );
    this.draw();
  }

  show(view) {
    this.view = view;
    this.cursor = null;
    this.draw();
    this.page.viewed?.(this.map.views[view]);
  }

  grid(view, component, frame) {
    const before = view.grids[component];
    if (frame === "before") return before;
    const after = view.after?.[component] ?? [];
    if (frame === "after") return after;
    return after.map((row, l) =>
      row.map((cell, c) => (cell && before[l]?.[c] ? [cell[0] - before[l][c][0]] : null)),
    );
  }

  draw() {
    const { map, page } = this;
    this.panels = [];
    if (!map.views?.length) {
      replace(this.facts);
      replace(this.legend);
      const requests = page.get("settings").trace.number;
      replace(
        this.body,
        h(
          "div",
          { class: "empty" },
          h("p", {}, "Where does this model keep what it should not say, and can it be taken out?"),
          h("ol", {},
            h("li", {}, h("b", {}, "Trace"), ` corrupts the subject of ${requests === 1 ? "one request" : `each of ${requests} requests`} and restores one state at a `,
              "time: the more of the answer comes back, the redder the cell. An estimate comes first; then the cells at the subject and at the last token are measured."),
            h("li", {}, h("b", {}, "Suggest"), " chooses cells to edit, or click some."),
            h("li", {}, h("b", {}, "Plan"), " computes a change there that brings a refusal, and forecasts it. Nothing is changed yet."),
            h("li", {}, h("b", {}, "Apply"), " makes the change. ", h("b", {}, "Undo"), " takes it back, bit for bit."),
            h("li", {}, h("b", {}, "Ask"), " and ", h("b", {}, "Check"), " compare the model without and with it.")),
        ),
      );
      return;
    }
    const view = map.views[this.view];
    const frames = this.frame === "all" ? ["before", "after", "difference"] : [this.frame];
    const grids = map.components.flatMap((component) =>
      frames.map((frame) => ({ component, frame, grid: this.grid(view, component, frame) })),
    );
    const largestOf = (parts) =>
      Math.max(0.05, ...parts.flatMap(({ grid }) => grid.flatMap((row) => row.map((cell) => Math.abs(cell?.[0] ?? 0)))));
    const shared = largestOf(grids);
    this.width = this.body.clientWidth;
    const words = Object.fromEntries(page.get("model").components.map(([name, text]) => [name, text]));
    const panels = grids.map((part) => this.panel(part, view, words, this.scale === "shared" ? shared : largestOf([part])));
    replace(this.body, frames.length === 1 ? panels : map.components.map((_, row) =>
      h("div", { class: "panels row" }, panels.slice(row * frames.length, (row + 1) * frames.length))));
    replace(
      this.facts,
      view.answer ? [h("b", {}, "The answer that is read: "), "“", h("span", { class: "token", dir: "auto" }, view.answer), "” "] : null,
      map.how,
    );
    this.drawLegend(shared);
    this.mark();
  }

  drawLegend(largest) {
    const scale = SCALES[this.page.theme()];
    const steps = Array.from({ length: 21 }, (_, i) => (i - 10) / 10);
    replace(
      this.legend,
      this.scale === "shared" && [
        h("span", {}, number(-largest)),
        h("span", { class: "ramp" }, steps.map((share) => h("i", { style: `background:${colour(share, scale, 1)}` }))),
        h("span", {}, number(largest)),
      ],
      h("span", { class: "key" }, h("i", { class: "chosen" }), "chosen"),
      h("span", { class: "key" }, h("i", { class: "significant" }), "more than chance (q < .05)"),
      h("span", { class: "key" }, h("i", { class: "estimated" }), "dotted: estimated by attribution patching"),
      h("span", { class: "key" }, h("i", { class: "untraced" }), "not traced"),
    );
  }

  panel({ component, frame, grid }, view, words, largest) {
    const scale = SCALES[this.page.theme()];
    const { layers } = this.map;
    const columns = view.columns;
    const width = this.body.clientWidth || 860;
    const beside = Math.max(1, Math.min(this.frame === "all" ? 3 : this.map.components.length, 3, Math.floor(width / 200)));
    const tall = this.frame === "all" ? 270 : width < 400 ? 330 : 440;
    const cellHeight = Math.max(6, Math.min(24, Math.floor(tall / layers)));
    const lengths = columns.map((column) => 6.3 * [...column.text].length); // of the labels, which are turned
    const beyond = Math.max(8, ...lengths.map((length, c) => 0.8 * length - 24 * (columns.length - c - 0.5)));
    const room = width / beside - 34 - beyond - 22; // for the cells: without axis, overhang and gap
    const cellWidth = Math.max(13, Math.min(48, Math.floor(Math.min(room, 420) / columns.length)));
    const widths = columns.map((column) => (column.role ? cellWidth : 12));
    const lefts = widths.map((_, i) => 34 + widths.slice(0, i).reduce((a, b) => a + b, 0));
    const right = lefts.at(-1) + widths.at(-1);
    const bottom = 8 + layers * cellHeight;
    const angle = cellWidth < 18 ? 62 : 38; // of the labels: those of narrow columns would lie on one another
    const [across, down] = [Math.cos((angle * Math.PI) / 180), Math.sin((angle * Math.PI) / 180)];
    const labels = 20 + down * Math.max(...lengths);
    const overhang = Math.max(8, ...lengths.map((length, c) => lefts[c] + widths[c] / 2 + across * length - right));
    const editable = this.page.get("model").components.find(([name]) => name === component)?.[2];
    const index = this.panels.length;
    const svg = s("svg", {
      viewBox: `0 0 ${right + overhang} ${bottom + labels}`,
      width: right + overhang,
      height: bottom + labels,
      tabindex: 0,
      role: "grid",
      "aria-label": `${words[component]}, ${FRAMES[frame]}: layers by tokens. Arrows move, space chooses, escape clears.`,
      "data-component": component,
      "data-frame": frame,
    });
    const cells = [];
    for (let layer = 0; layer < layers; layer++) {
      const y = 8 + (layers - 1 - layer) * cellHeight;
      if (layer % Math.ceil(layers / 12) === 0 || layer === layers - 1) {
        svg.append(s("text", { x: 28, y: y + cellHeight / 2, class: "axis", "text-anchor": "end", "dominant-baseline": "central" }, layer));
      }
      cells.push(
        columns.map((column, c) => {
          const cell = grid[layer]?.[c];
          const rect = s("rect", {
            x: lefts[c], y, width: widths[c], height: cellHeight,
            fill: cell ? colour(cell[0], scale, largest) : "var(--untraced)",
            class: column.role && editable && column.site ? "cell site" : "cell",
            "data-l": layer, "data-c": c,
          });
          svg.append(rect);
          if (cell && cell.length === 1 && frame === "before") {
            svg.append(s("circle", { cx: lefts[c] + widths[c] / 2, cy: y + cellHeight / 2, r: 0.9, class: "estimate" }));
          }
          return rect;
        }),
      );
    }
    columns.forEach((column, c) => {
      svg.append(
        s("text", {
          transform: `translate(${lefts[c] + widths[c] / 2} ${bottom + 10}) rotate(${angle})`,
          class: column.subject ? "axis subject" : "axis",
        }, column.text),
      );
    });
    const spans = columns.map((column, c) => (column.subject ? c : -1)).filter((c) => c >= 0);
    if (spans.length) {
      svg.append(s("line", {
        x1: lefts[spans[0]], x2: lefts[spans.at(-1)] + widths[spans.at(-1)], y1: bottom + 3, y2: bottom + 3, class: "bracket",
      }));
    }
    if (frame === "before" && view.significant) {
      for (const [name, layer, role] of view.significant) {
        const c = columns.findIndex((column) => column.role === role);
        if (name === component && c >= 0) cells[layer][c].classList.add("significant");
      }
    }
    const marks = s("g", { class: "marks" });
    const box = s("rect", { class: "box", visibility: "hidden" });
    svg.append(marks, box);
    const panel = { component, frame, grid, columns, cells, marks, box, svg, lefts, widths, cellHeight, editable, index, largest };
    this.panels.push(panel);
    this.listen(panel);
    const title = this.frame === "all" ? `${words[component]}: ${frame}` : words[component];
    return h("figure", { class: "panel" }, h("figcaption", {}, title), svg);
  }

  // ---- choosing ----------------------------------------------------------------------------------------

  address(panel, layer, column) {
    return { component: panel.component, layer, role: panel.columns[column].role };
  }

  choosable(panel, column) {
    return !this.page.frozenChoice && panel.editable && panel.columns[column].site;
  }

  choose(cells, how) {
    const ticket = this.page.send("choose", { cells, how });
    if (this.page.asked.has(ticket)) this.pending.push({ ticket, cells });
    this.mark();
  }

  listen(panel) {
    const { svg } = panel;
    const cellAt = (event) => {
      const rect = event.target.closest?.("rect.cell");
      return rect ? [+rect.dataset.l, +rect.dataset.c] : null;
    };
    let start = null;
    const place = (event) => {
      const bounds = svg.getBoundingClientRect();
      const zoom = svg.viewBox.baseVal.width / bounds.width;
      return [(event.clientX - bounds.left) * zoom, (event.clientY - bounds.top) * zoom];
    };
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      start = { at: place(event), cell: cellAt(event), moved: false };
    });
    svg.addEventListener("pointermove", (event) => {
      this.hover(panel, cellAt(event), event);
      if (!start || !(event.buttons & 1)) return;
      const [x, y] = place(event);
      const [x0, y0] = start.at;
      if (Math.hypot(x - x0, y - y0) > 5 && !start.moved) {
        start.moved = true;
        svg.setPointerCapture(event.pointerId);
      }
      if (start.moved) {
        fill(panel.box, {
          x: Math.min(x, x0), y: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0), visibility: "visible",
        }, []);
      }
    });
    svg.addEventListener("pointerup", (event) => {
      if (!start) return;
      const { moved, cell, at } = start;
      start = null;
      panel.box.setAttribute("visibility", "hidden");
      const more = event.shiftKey || event.ctrlKey || event.metaKey;
      if (moved) this.chooseBox(panel, at, place(event), more);
      else if (cell) this.click(panel, cell, more);
    });
    svg.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    svg.addEventListener("keydown", (event) => this.key(panel, event));
    svg.addEventListener("blur", () => { this.cursor = null; this.mark(); });
  }

  click(panel, [layer, column], more) {
    if (!this.choosable(panel, column)) {
      this.page.note(panel.editable
        ? "This column stands for many tokens, or for none that an edit could address; choose a subject's, the next or the last token."
        : "Attention outputs cannot be edited; choose cells of the residual stream or of MLP outputs.");
      return;
    }
    const cell = this.address(panel, layer, column);
    const chosen = this.page.get("sites").sites;
    const alone = chosen.length === 1 && same(chosen[0], cell);
    if (more) this.choose([cell], "toggle");
    else this.choose(alone ? [] : [cell], "set");
  }

  chooseBox(panel, [x0, y0], [x1, y1], more) {
    const cells = [];
    panel.cells.forEach((row, layer) =>
      row.forEach((rect, column) => {
        const [x, y] = [panel.lefts[column], +rect.getAttribute("y")];
        const touched = x < Math.max(x0, x1) && x + panel.widths[column] > Math.min(x0, x1)
          && y < Math.max(y0, y1) && y + panel.cellHeight > Math.min(y0, y1);
        if (touched && this.choosable(panel, column)) cells.push(this.address(panel, layer, column));
      }),
    );
    const unique = cells.filter((cell, i) => cells.findIndex((other) => same(other, cell)) === i);
    if (unique.length || !more) this.choose(unique, more ? "add" : "set");
  }

  key(panel, event) {
    const moves = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [, layer = 0, column = panel.columns.findIndex((c) => c.site)] =
      this.cursor?.[0] === panel.index ? this.cursor : [panel.index];
    if (event.key in moves) {
      const [up, right] = moves[event.key];
      const stepped = this.cursor?.[0] === panel.index ? [layer + up, column + right] : [layer, Math.max(0, column)];
      const within = (value, size) => Math.min(size - 1, Math.max(0, value));
      this.cursor = [panel.index, within(stepped[0], panel.cells.length), within(stepped[1], panel.columns.length)];
      this.mark();
      const [, l, c] = this.cursor;
      this.live.textContent = this.words(panel, l, c).join(", ");
      const at = panel.cells[l][c].getBoundingClientRect();
      this.hover(panel, [l, c], { clientX: at.right, clientY: at.bottom });
    } else if ((event.key === " " || event.key === "Enter") && this.cursor?.[0] === panel.index) {
      this.click(panel, [layer, column], event.key === " " || event.shiftKey);
    } else if (event.key === "Escape") {
      this.tip.hidden = true;
      this.choose([], "set");
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  words(panel, layer, column) {
    const { text, words, role } = panel.columns[column];
    if (!role) return [words];
    const cell = panel.grid[layer]?.[column];
    const lines = [text === words ? null : `“${text}”`, words, `layer ${layer}`];
    if (!cell) lines.push("not traced");
    else {
      lines.push(`effect ${number(cell[0], 3)}`);
      if (cell.length > 1) lines.push(`from ${number(cell[1], 3)} to ${number(cell[2], 3)}`);
      else if (panel.frame === "before") lines.push("estimated");
    }
    if (this.page.get("sites").sites.some((site) => same(site, this.address(panel, layer, column)))) lines.push("chosen");
    return lines.filter(Boolean);
  }

  hover(panel, cell, event) {
    this.tip.hidden = !cell;
    if (!cell) return;
    replace(this.tip, this.words(panel, ...cell).map((line, i) => h(i ? "div" : "b", {}, line)));
    const bounds = this.element.getBoundingClientRect();
    const x = Math.min(event.clientX - bounds.left + 14, bounds.width - 190);
    this.tip.style.transform = `translate(${Math.max(0, x)}px, ${event.clientY - bounds.top + 14}px)`;
  }

  // Every cell of a chosen site is marked, in every panel, whatever was traced.
  mark() {
    const sites = this.page.get("sites").sites ?? [];
    for (const panel of this.panels) {
      const mark = (layer, c, kind) => s("rect", {
        x: panel.lefts[c] + 1, y: +panel.cells[layer][c].getAttribute("y") + 1,
        width: panel.widths[c] - 2, height: panel.cellHeight - 2, class: kind, rx: 1,
      });
      const of = (list, kind) =>
        list
          .filter((site) => site.component === panel.component)
          .flatMap(({ layer, role }) =>
            panel.columns.flatMap((column, c) => (column.role === role && panel.cells[layer] ? [mark(layer, c, kind)] : [])),
          );
      const cursor = this.cursor?.[0] === panel.index ? [mark(this.cursor[1], this.cursor[2], "cursor")] : [];
      replace(panel.marks, of(sites, "mark"), of(this.pending.flatMap((choice) => choice.cells), "pending"), cursor);
    }
  }

  // Cells that a running trace has measured take the estimate's place one by one, in the mean as well.
  measured(cells) {
    const { views } = this.map;
    if (!views) return;
    const mean = views[0];
    for (const [request, component, layer, position, effect] of cells) {
      const view = views[request + 1];
      const column = view?.columns.findIndex((c) => c.position === position) ?? -1;
      if (column < 0 || !view.grids[component]?.[layer]) continue;
      view.grids[component][layer][column] = [effect, effect, effect];
      const { role } = view.columns[column];
      const known = views.slice(1).flatMap((one) => {
        const found = one.columns.flatMap((c, i) => (c.role === role ? [one.grids[component][layer][i]?.[0]] : [])).filter((e) => e != null);
        return found.length ? [found.reduce((a, b) => a + b) / found.length] : [];
      });
      const place = mean.columns.findIndex((c) => c.role === role);
      if (place >= 0 && known.length) mean.grids[component][layer][place] = [known.reduce((a, b) => a + b) / known.length];
      this.repaint(component, layer, this.view === 0 ? place : this.view === request + 1 ? column : -1);
    }
  }

  repaint(component, layer, column) {
    for (const panel of this.panels) {
      if (panel.component !== component || panel.frame !== "before" || column < 0) continue;
      const cell = panel.cells[layer][column];
      cell.setAttribute("fill", colour(panel.grid[layer][column][0], SCALES[this.page.theme()], panel.largest));
      cell.classList.add("fresh");
    }
  }
}

const same = (a, b) => a.component === b.component && a.layer === b.layer && a.role === b.role;
