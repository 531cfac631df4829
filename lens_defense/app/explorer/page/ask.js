// Ask: any question, answered without and with the edits that stand, token by token.

class Ask {
  constructor(page) {
    this.question = h("textarea", {
      rows: 2, "aria-label": "question", placeholder: "Ask anything; Enter sends it, Shift+Enter is a new line",
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        ask();
      },
    });
    this.template = h("select", { "aria-label": "jailbreak template" });
    const ask = () => page.send("ask", { question: this.question.value, template: this.template.value });
    this.go = button("Ask", "answer without and with the edits", ask, "primary");
    this.suggestions = h("div", { class: "suggestions" });
    this.sides = h("div", { class: "sides" });
    this.element = h("section", { class: "ask" }, h("h2", {}, "Ask"),
      h("div", { class: "live" }, this.suggestions, this.question,
        h("div", { class: "bar" }, this.go, h("label", { title: "wraps the question in a published way to get around a refusal" }, "jailbreak template ", this.template))),
      this.sides);
    page.on("model", () => {
      const { templates } = page.get("model");
      replace(this.template, h("option", { value: "" }, "none"),
        templates.map(([id, family]) => h("option", { value: id }, `${family} (${id})`)));
      this.suggest(page, null);
    });
    page.viewed = (view) => this.suggest(page, view);
    page.on("talk", () => this.update(page));
    page.on("job", () => { this.go.disabled = Boolean(page.get("job").name); });
  }

  suggest(page, view) {
    const known = page.get("model").suggestions ?? [];
    const one = known.find((item) => item.id === view?.id) ?? known[0];
    if (!one) return;
    const chip = (text, kind) => h("button", { type: "button", class: `chip ${kind}`, dir: "auto", onclick: () => { this.question.value = text; this.question.focus(); } }, text);
    const group = (words, chips) => h("div", {}, h("span", { class: "quiet" }, words), h("div", { class: "chips" }, chips));
    replace(this.suggestions, group("to be refused", chip(one.harmful, "harmful")),
      one.harmless.length ? group("to be answered", one.harmless.slice(0, 3).map((text) => chip(text, "harmless"))) : null);
  }

  update(page) {
    const talk = page.get("talk");
    if (talk.question == null) { replace(this.sides); return; }
    const template = (id) => [...(page.get("model").templates ?? [])].filter(([name]) => name === id).map(([name, family]) => `${family} (${name})`)[0] ?? id;
    const side = (title, text, waiting) => h("div", {}, h("h3", {}, title), text ? prose(text, "prose answer") : h("p", { class: "quiet" }, waiting));
    replace(this.sides,
      h("p", { class: "asked", dir: "auto" }, talk.question, talk.template ? h("span", { class: "quiet" }, ` inside the jailbreak template ${template(talk.template)}`) : null),
      talk.stale ? h("p", { class: "warning" }, "Other edits stand now than when this was asked; ask again.") : null,
      side("without edits", talk.before, "…"),
      talk.edits ? side(talk.edits === 1 ? "with the edit that stood" : `with the ${talk.edits} edits that stood`, talk.now, "…") : null);
  }
}
