// The page: one state, which Python holds. `link` carries it: get(part), on("change:part"), send(message).

class Page {
  constructor(link, element) {
    this.link = link;
    this.element = element;
    this.frozen = Boolean(link.frozen);
    this.themes = [];
    this.ended = [];
    this.first = []; // what draws a part, as soon as the page is there
    this.name = Math.random().toString(36).slice(2); // of this page among others of the same state
    this.sent = 0;
    this.asked = new Set(); // tickets of what was asked for, and is not done yet
    this.whole = {}; // parts that come as events, because a notebook may save what the link has
    this.onEvent("whole", ({ part, value }) => {
      this.whole[part] = value;
      for (const [name, action] of this.first) if (name === part) action();
    });
    this.onEvent("done", ({ ticket }) => {
      if (ticket) this.asked.delete(ticket); else this.asked.clear();
      this.busy();
    });
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const retheme = () => {
      this.element.dataset.theme = this.theme();
      for (const action of this.themes) action();
    };
    dark.addEventListener("change", retheme);
    const observer = new MutationObserver(retheme);
    observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    this.ended.push(() => { dark.removeEventListener("change", retheme); observer.disconnect(); });
    this.element.dataset.theme = this.theme();
  }

  get(part) { return this.whole[part] ?? this.link.get(part); }
  on(part, action) {
    const call = () => action();
    this.link.on(`change:${part}`, call);
    this.ended.push(() => this.link.off(`change:${part}`, call));
    this.first.push([part, action]);
  }
  draw() { for (const [, action] of this.first) action(); }
  onEvent(name, action) {
    const call = (message) => { if (message.event === name) action(message); };
    this.link.on("msg:custom", call);
    this.ended.push(() => this.link.off("msg:custom", call));
  }
  onTheme(action) { this.themes.push(action); }

  // Asks for something. What is returned comes back in the event "done", once it has been done or refused.
  send(command, values) {
    if (this.cut) {
      this.note("No kernel is connected: this is the page as it was saved. Run its cell to go on.");
      return null;
    }
    const ticket = `${this.name} ${this.sent++}`;
    if (!this.frozen) this.asked.add(ticket);
    this.busy();
    this.link.send({ command, values, ticket });
    return ticket;
  }
  busy() { this.element.setAttribute("aria-busy", String(this.asked.size > 0)); }
  note(text) { this.say?.(text); }

  theme() {
    const lab = document.body.dataset.jpThemeLight;
    if (lab) return lab === "false" ? "dark" : "light";
    return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  }
}

class Header {
  constructor(page) {
    this.title = h("h1", {});
    this.standing = h("p", { class: "standing", role: "status" });
    this.work = h("span", { class: "work" });
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "progress" });
    this.stop = button("Stop", "stop; the model stays as it is", () => page.send("stop", {}), "small");
    this.note = h("p", { class: "quiet" });
    this.job = h("div", { class: "job", hidden: true }, h("div", {}, this.work, this.note), this.progress, this.stop);
    this.message = h("p", { class: "message", role: "alert" });
    this.waiting = h("p", { class: "quiet", role: "status", hidden: true }, "waiting for Python, which is busy …");
    const look = setInterval(() => {
      const waited = page.asked.size > 0 && page.waited;
      page.waited = page.asked.size > 0;
      this.waiting.hidden = !waited;
      this.tick(page);
    }, 400);
    page.ended.push(() => clearInterval(look));
    this.trace = button("Trace", "estimate the map, then measure it", () => page.send("trace", {}), "primary");
    this.choices = h("div", { class: "bar live" });
    this.top = h("header", { class: "top" }, this.title, this.standing, this.waiting, this.job);
    page.say = (text) => { this.message.textContent = text; };
    page.on("message", () => page.say(page.get("message")));
    page.on("model", () => {
      const model = page.get("model");
      replace(this.title, h("span", { class: "brand" }, "lens_defense"), model.name,
        h("span", { class: "quiet" }, ` ${model.layers} layers, ${model.requests.length} requests`));
    });
    page.on("settings", () => this.settings(page));
    page.on("stack", () => {
      const { edits } = page.get("stack");
      this.standing.className = edits.length ? "standing edited" : "standing";
      this.trace.title = edits.length ? "an edit is in the model: undo it first, or press Trace again beside the edits" : "estimate the map, then measure it";
      this.standing.textContent = edits.length ? `${edits.length} edit${edits.length > 1 ? "s" : ""} in the model` : "model as loaded";
      this.trace.disabled = Boolean(page.get("job").name) || edits.length > 0;
    });
    page.on("job", () => {
      const job = page.get("job");
      this.job.hidden = !job.name;
      this.trace.disabled = Boolean(job.name) || page.get("stack").edits.length > 0;
      if (!job.name) return;
      this.started = performance.now() - 1000 * job.seconds;
      this.tick(page);
      if (job.total) this.progress.value = job.done / job.total;
      else this.progress.removeAttribute("value");
      this.work.title = job.note;
      this.note.textContent = job.note;
      this.stop.disabled = job.stopping;
    });
  }

  // The seconds go on between two steps of the work.
  tick(page) {
    const job = page.get("job") ?? {};
    if (!job.name) return;
    const seconds = Math.round((performance.now() - this.started) / 1000);
    this.work.textContent = `${job.stopping ? "stopping: " : ""}${job.name}${job.step ? ` (${job.step})` : ""} · ${page.cut ? Math.round(job.seconds) : seconds} s`;
  }

  settings(page) {
    const { components, metrics } = page.get("model");
    const { components: chosen, metric, direction, number: count } = page.get("settings").trace;
    const total = page.get("model").requests.length;
    const counts = [...new Set([1, 3, count, total])].filter((n) => n <= total).sort((a, b) => a - b);
    const set = (changes) => page.send("set_trace", changes);
    replace(this.choices, this.trace,
      h("span", { class: "checks", role: "group", "aria-label": "components" }, components.map(([name, words]) =>
        h("label", {}, h("input", { type: "checkbox", checked: chosen.includes(name), onchange: (event) =>
          set({ components: components.map(([other]) => other).filter((other) => (other === name ? event.target.checked : chosen.includes(other))) }) }), words))),
      h("select", { "aria-label": "how many requests", title: "a map takes as many times as long", onchange: (event) => set({ number: +event.target.value }) },
        counts.map((n) => h("option", { value: n, selected: n === count }, n === total ? `all ${n} requests` : n === 1 ? "the first request" : `the first ${n} requests`))),
      h("select", { "aria-label": "direction", title: "what is done to one state at a time", onchange: (event) => set({ direction: event.target.value }) },
        [["denoising", "restore one state (denoising)"], ["noising", "corrupt one state (noising)"]].map(([value, words]) =>
          h("option", { value, selected: value === direction }, words))),
      h("label", { title: "what is read of each run" }, "measured by ", h("select", { "aria-label": "metric", onchange: (event) => set({ metric: event.target.value }) },
        metrics.map((name) => h("option", { value: name, selected: name === metric }, METRIC_WORDS[name] ?? name.replaceAll("_", " "))))));
  }
}

const METRIC_WORDS = { answer_logprob: "log probability of the answer", answer_probability: "probability of the answer", kl_to_clean: "KL to the clean run" };

const PARTS = { maps: Maps, cells: Cells, plan: Plan, stack: Stack, ask: Ask, check: Check, take: TakeAway };

function root(link, element) {
  const container = h("div", { class: `lens-explorer${link.frozen ? " frozen" : ""}` });
  element.replaceChildren(container);
  return container;
}

// A notebook's shortcuts come before the page's keys; JupyterLab leaves those alone that come from within
// this attribute. Keys with Ctrl, Alt or Meta stay the notebook's, as Ctrl+S. A shift-click would select
// the notebook's cells down to this one.
function keepKeys(page) {
  const own = (event) => !(event.ctrlKey || event.altKey || event.metaKey);
  const keep = (event) => page.element.toggleAttribute("data-lm-suppress-shortcuts", own(event));
  addEventListener("keydown", keep, true);
  page.ended.push(() => removeEventListener("keydown", keep, true));
  page.element.addEventListener("keydown", (event) => { if (own(event)) event.stopPropagation(); });
  page.element.addEventListener("mousedown", (event) => { if (event.shiftKey) event.stopPropagation(); });
}

// A widget whose kernel has ended, or that was read from a saved notebook, can be looked at.
function followKernel(page, el) {
  const look = () => {
    page.cut = el.classList.contains("jupyter-widgets-disconnected");
    page.element.classList.toggle("cut", page.cut);
  };
  const observer = new MutationObserver(look);
  observer.observe(el, { attributes: true, attributeFilter: ["class"] });
  page.ended.push(() => observer.disconnect());
  look();
  if (!page.cut) page.link.send({ tell: "whole" });
}

// The static form of the same explorer is for readers who have no page.
function hideStaticForm(page) {
  const id = page.link.get("static_form");
  if (!id) return;
  const form = `[data-explorer="${CSS.escape(id)}"]`;
  page.element.append(h("style", {}, `${form}, .jp-OutputArea-child:has(${form}) { display: none; }`));
}

function render({ model: link, el }) {
  const page = new Page(link, root(link, el));
  hideStaticForm(page);
  keepKeys(page);
  followKernel(page, el);
  const header = new Header(page);
  const parts = Object.fromEntries(Object.entries(PARTS).map(([name, Part]) => [name, new Part(page).element]));
  page.element.append(header.top, header.choices,
    h("main", {}, parts.maps, h("aside", {}, parts.cells, parts.plan, parts.stack), parts.ask, parts.check, parts.take),
    header.message);
  page.draw();
  return () => { for (const action of page.ended) action(); };
}

// A page that nobody serves, as in a report: its parts stand in it, and cells can still be chosen, to look at.
class Frozen {
  constructor(parts) {
    this.parts = parts;
    this.frozen = true;
    this.listeners = [];
  }
  get(name) { return this.parts[name]; }
  on(name, action) { this.listeners.push([name, action]); }
  off(name, action) { this.listeners = this.listeners.filter(([, other]) => other !== action); }
  send({ command, values }) {
    if (command !== "choose") return;
    const words = Object.fromEntries(this.parts.model.components.map(([name, text]) => [name, text]));
    const columns = this.parts.map.views.flatMap((view) => view.columns);
    const described = values.cells.map((cell) =>
      this.parts.original.find((site) => same(site, cell)) ?? {
        ...cell, words: `${words[cell.component]}, layer ${cell.layer}, ${columns.find((column) => column.role === cell.role)?.words}`,
      });
    const chosen = this.parts.sites.sites;
    const kept = values.how === "set" ? [] : chosen.filter((site) => values.how === "add" || !described.some((other) => same(site, other)));
    const added = values.how === "toggle" ? described.filter((site) => !chosen.some((other) => same(site, other))) : described;
    this.parts.sites = { ...this.parts.sites, sites: [...kept, ...added] };
    for (const [name, action] of this.listeners) if (name === "change:sites") action();
  }
}

// Puts parts of the page into the elements that ask for them by data-part; data-of renames what they read.
function mount(parts) {
  const link = new Frozen(parts);
  for (const place of document.querySelectorAll("[data-part]")) {
    const { part, of } = place.dataset;
    const renamed = of ? Object.assign(Object.create(link), { get: (name) => link.get(name === part ? of : name) }) : link;
    const page = new Page(renamed, root(link, place));
    page.element.append(new PARTS[part](page).element);
    page.draw();
  }
}

export default { render, mount };
