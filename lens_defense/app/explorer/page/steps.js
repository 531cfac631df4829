// The steps beside the map: which cells, what is planned there, which edits are in the model.

class Cells {
  constructor(page) {
    this.list = h("ul", { class: "chips", "aria-label": "chosen cells" });
    this.reason = h("p", { class: "quiet" });
    const control = h(
      "select",
      { "aria-label": "control sites", title: "cells that the map did not choose, to compare an edit with", onchange: () => { if (control.value) page.send("control", { which: control.value }); control.value = ""; } },
      h("option", { value: "" }, "control sites …"),
      ["middle layers", "late layers", "at next"].map((name) => h("option", { value: name }, name)),
    );
    const suggest = button("Suggest", "choose the cells that locate finds in this map, and say why", () => page.send("suggest", {}));
    page.on("map", () => { suggest.disabled = !page.get("map").views; });
    this.element = h(
      "section",
      { class: "step" },
      h("h2", {}, "Cells"),
      h("div", { class: "bar live" }, suggest, control,
        button("Clear", "choose nothing", () => page.send("choose", { cells: [], how: "set" }))),
      this.reason,
      this.list,
    );
    const update = () => {
      const { sites, reason, layers } = page.get("sites");
      const roles = [...new Set(sites.map((site) => site.role))];
      replace(this.reason, sites.length
        ? `${reason} An edit here rewrites the MLP output matrices of layers ${layers}${roles.length > 1 ? "; choose one role to plan" : ""}.`
        : page.get("map").views
          ? "Where to edit: Suggest chooses for you. Or click a cell, shift-click for more, or draw a box."
          : "Where to edit. The map comes first: press Trace.");
      replace(this.list, sites.map((site) =>
        h("li", {},
          h("span", {}, site.words, site.effect == null ? "" : ` · ${number(site.effect)}`),
          button("×", `remove ${site.words}`, () => page.send("choose", { cells: [site], how: "toggle" }), "live small"))));
    };
    page.on("sites", update);
    page.on("map", update);
  }
}

class Plan {
  constructor(page) {
    this.method = h("select", { "aria-label": "method", title: "how the change is computed; each stands in docs/methods", onchange: () => page.send("set_plan", { method: this.method.value }) });
    this.strength = h("input", {
      type: "range", min: 5, max: 200, step: 5, value: 100, "aria-label": "strength", title: "a factor of the fitted values; Apply solves for it, nothing is fitted again",
      oninput: () => { this.shown.textContent = `${this.strength.value}%`; tell(this.strength.value / 100); },
    });
    const tell = throttled((strength) => page.send("set_plan", { strength }), 60);
    this.shown = h("output", {}, "100%");
    this.requests = h("div", { class: "requests" });
    this.count = h("summary", {});
    this.go = button("Plan", "fit the values and solve; nothing is changed yet", () => page.send("plan", {}), "live");
    this.apply = button("Apply", "make this change in the model", () => page.send("apply", {}), "live primary");
    this.forecast = h("div", { class: "forecast" });
    this.element = h(
      "section",
      { class: "step" },
      h("h2", {}, "Plan"),
      h("div", { class: "bar live" }, h("label", {}, "method ", this.method),
        h("label", { class: "slider" }, "strength ", this.strength, this.shown)),
      h("details", { class: "live" }, this.count, this.requests),
      h("div", { class: "bar live" }, this.go, this.apply),
      this.forecast,
    );
    page.on("settings", () => this.settings(page));
    page.on("plan", () => this.update(page));
    page.on("sites", () => this.update(page));
    page.on("job", () => this.buttons(page));
  }

  settings(page) {
    const { methods, requests } = page.get("model");
    const { method, strength, requests: chosen } = page.get("settings").plan;
    replace(this.method, methods.map((name) => h("option", { value: name, selected: name === method }, name)));
    if (document.activeElement !== this.strength) this.strength.value = 100 * strength;
    this.shown.textContent = `${Math.round(100 * strength)}%`;
    replace(this.count, chosen.length === requests.length ? `all ${chosen.length} requests: ` : `${chosen.length} of ${requests.length} requests: `,
      h("span", { dir: "auto" }, chosen.map((i) => requests[i].subject).join(", ")));
    const toggle = (index, on) =>
      page.send("set_plan", { requests: requests.map((_, i) => i).filter((i) => (i === index ? on : chosen.includes(i))) });
    if (!this.requests.contains(document.activeElement)) {
      replace(this.requests, requests.map((item, i) =>
        h("label", {},
          h("input", { type: "checkbox", checked: chosen.includes(i), onchange: (event) => toggle(i, event.target.checked) }),
          h("span", { dir: "auto", title: item.text }, item.subject))));
    }
  }

  buttons(page) {
    const busy = Boolean(page.get("job").name);
    this.go.disabled = busy || !page.get("sites").sites.length;
    this.apply.disabled = busy || !page.get("plan").by_subject;
  }

  update(page) {
    const plan = page.get("plan");
    this.buttons(page);
    if (!plan.by_subject) {
      replace(this.forecast, h("p", { class: "quiet" }, page.get("sites").sites.length
        ? "No plan for these cells yet. Plan computes a change that makes these requests meet a refusal, and forecasts it; Apply makes it."
        : "Choose cells first."));
      return;
    }
    this.apply.className = plan.warnings.length ? "live primary warned" : "live primary";
    this.apply.textContent = plan.warnings.length ? "Apply in spite of the warning" : "Apply";
    const widest = Math.max(1, ...plan.by_subject.map((row) => Math.max(row.reach, row.leak, row.harmless ?? 0)));
    const bar = (value, kind, title) =>
      h("td", { title },
        h("span", { class: "bartrack" }, h("i", { class: kind, style: `width:${Math.min(100, (100 * Math.max(0, value ?? 0)) / widest)}%` })),
        h("span", { class: "value" }, number(value)));
    const contrast = plan.by_subject.some((row) => row.harmless != null);
    replace(
      this.forecast,
      plan.warnings.map((sentence) => h("p", { class: "warning" }, sentence)),
      h("table", {},
        h("thead", {}, h("tr", {}, h("th", {}, "forecast"), h("th", {}, "delivered"),
          contrast && h("th", {}, "in harmless uses"), h("th", {}, "off target"))),
        h("tbody", {},
          plan.by_subject.map((row) =>
            h("tr", {}, h("th", { dir: "auto" }, row.name),
              bar(row.reach, row.weak ? "bad" : "good", "share of the fitted value that arrives in contexts the edit has not seen"),
              contrast && bar(row.harmless, "neutral", "the same in harmless questions about the subject; best near 0"),
              bar(row.leak, "neutral", "what safe-sounding text meets, as a share of a value"))),
          h("tr", { class: "sum" }, h("th", {}, "all together"), h("td", {}), contrast && h("td", {}),
            bar(plan.leak, plan.risky ? "bad" : "neutral", `from ${plan.threshold} on over-refusal was seen`)))),
      h("p", { class: "quiet" }, "Delivered: the share of the fitted value that arrives in contexts the edit has not seen; below .4 is little. ",
        contrast && "In harmless uses: the same in harmless questions about the subject; best near 0. ",
        "Off target: what safe-sounding text meets", plan.threshold == null ? "." : `; from ${number(plan.threshold)} all together on, over-refusal was seen on smollm2.`),
      h("p", { class: "quiet" },
        `${plan.method} at layers ${plan.layers}, ${plan.role}; rank ${plan.rank}, up to ${number(100 * plan.change, 1)}% of a matrix's norm.`,
        plan.strength === 1 ? "" : ` Strength ${Math.round(100 * plan.strength)}%.`,
        plan.scaled ? " The forecast is to first order; Apply solves for this strength." : ""),
    );
  }
}

class Stack {
  constructor(page) {
    this.list = h("ol", { class: "stack" });
    this.undo = button("Undo", "take the last change back, bit for bit", () => page.send("undo", {}), "live");
    this.redo = button("Redo", "make the change again that was taken back last", () => page.send("redo", {}), "live");
    this.again = button("Trace again", "trace the edited model: before, after, difference", () => page.send("trace_after", {}), "live");
    this.element = h("section", { class: "step" }, h("h2", {}, "Edits in the model"), this.list, h("div", { class: "bar live" }, this.undo, this.redo, this.again));
    const update = () => {
      const { edits, undone } = page.get("stack");
      const busy = Boolean(page.get("job").name);
      this.undo.disabled = busy || !edits.length;
      this.redo.disabled = busy || !undone;
      this.again.disabled = busy || !edits.length || !page.get("map").views;
      replace(this.list, edits.length
        ? edits.map((edit, i) =>
          h("li", {},
            h("div", {}, h("b", {}, edit.method), ` at layers ${edit.layers}, ${edit.role}`, edit.strength === 1 ? "" : `, ${Math.round(100 * edit.strength)}%`,
              h("span", { class: "quiet", dir: "auto" }, edit.subjects.join(", "), edit.more ? ` and ${edit.more} more` : "")),
            button("Remove", `take edit ${i + 1} out, also from the middle`, () => page.send("remove", { index: i }), "live small")))
        : h("li", { class: "none" }, "None: the model is as it was loaded, bit for bit."));
    };
    for (const part of ["stack", "job", "map"]) page.on(part, update);
  }
}
