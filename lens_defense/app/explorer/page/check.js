// Check: the rates with their intervals; every rate opens the answers behind it, failures first.

const VERDICTS = { yes: "known", no: "not known" };

class Check {
  constructor(page) {
    this.page = page;
    this.opened = null;
    this.search = "";
    this.go = button("Check these edits", "ask the suite without and with the edits", () => page.send("check", {}), "live primary");
    this.body = h("div", {});
    this.element = h("section", { class: "check" }, h("h2", {}, "Check"), h("div", { class: "bar live" }, this.go), this.body);
    page.on("check", () => this.update());
    const buttons = () => { this.go.disabled = Boolean(page.get("job").name) || !page.get("stack").edits.length; };
    page.on("job", buttons);
    page.on("stack", buttons);
  }

  update() {
    const check = this.page.get("check");
    if (!check.rates) {
      replace(this.body, h("p", { class: "quiet" }, this.page.get("stack").edits.length ? "" : "For when an edit is in the model. ", "Asks a small suite without and with the edits, and judges the answers: paraphrases, jailbreaks, other spellings and names of the edited subjects; harmless questions about them; everyday requests; facts."));
      return;
    }
    const rate = (row, when) => {
      const [share, low, high] = [row[when], row[`${when} low`], row[`${when} high`]];
      if (share == null) return h("td", {});
      return h("td", { class: "rate" },
        h("span", { class: "whisker", "aria-hidden": "true" },
          h("i", { class: "interval", style: `left:${100 * low}%;width:${100 * (high - low)}%` }),
          h("i", { class: `point ${when}`, style: `left:${100 * share}%` })),
        h("span", { class: "value" }, percent(share)), h("span", { class: "quiet" }, ` ${percent(low)}–${percent(high)}`));
    };
    const key = (row) => `${row.arm}/${row.measure}`;
    const changed = (row) => row.p != null && row.p < 0.05;
    replace(this.body,
      check.stale ? h("p", { class: "warning" }, "Other edits stand now than when this was checked; check again.") : null,
      h("table", { class: "rates" },
        h("thead", {}, h("tr", {}, ["asked", "answer is", "wanted", "n", "without edits", "with edits", "p"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, check.rates.flatMap((row, i) => [
          h("tr", { class: changed(row) ? "changed" : "" },
            h("th", { scope: "row" }, check.rates[i - 1]?.arm === row.arm ? "" : row.name),
            h("td", {}, h("button", { type: "button", class: "link", "aria-expanded": String(this.opened === key(row)), title: "show the answers behind this rate",
              onclick: () => { this.opened = this.opened === key(row) ? null : key(row); this.search = ""; this.update(); } }, row.words)),
            h("td", {}, row.wanted),
            h("td", {}, row.n, row.subjects < row.n ? h("span", { class: "quiet" }, ` (${row.subjects} subjects)`) : null),
            rate(row, "before"), rate(row, "after"),
            h("td", {}, row.p == null ? "" : row.p < 0.001 ? "<.001" : number(row.p, 3))),
          this.opened === key(row) ? h("tr", { class: "rows" }, h("td", { colspan: 7 }, this.rows(check, row))) : null,
        ]))),
      h("p", { class: "quiet" }, "Refused: the answer begins like a refusal. Refused, coherent: the whole answer is one. Bold: changed, p < .05. Press a measure for the answers behind it, those first that are not as wanted."),
      h("p", { class: "quiet" }, check.costs.map((cost) => `${cost.cost} ${number(cost.mean, 4)} [${number(cost.low, 4)}, ${number(cost.high, 4)}]`).join(" · "),
        check.dropped ? ` · ${check.dropped} rows were left out because an edit had seen their text` : ""));
  }

  rows(check, { arm, measure }) {
    const all = check.answers.filter((row) => row.arm === arm);
    const found = h("div", { class: "answers" });
    const list = () => {
      const words = this.search.toLowerCase();
      const matching = all.filter((row) => [row.id, row.question, row.before, row.after, row.subject, row.family].some((text) => text.toLowerCase().includes(words)));
      replace(found, matching.length ? matching.map((row) =>
        h("article", { class: row.failed ? "failed" : "" },
          h("header", {}, h("b", {}, row.failed ? "not as wanted" : "as wanted"), row.changed ? " · changed" : "", h("span", { class: "quiet" }, ` ${row.id} ${row.family}`)),
          row.question ? prose(row.question, "prose question") : null,
          h("div", { class: "sides" },
            [0, 1].map((when) => h("div", {}, h("h4", {}, when ? "with edits" : "without", h("span", { class: "quiet" }, ` · ${VERDICTS[row.verdicts[measure]?.[when]] ?? row.verdicts[measure]?.[when] ?? ""}`)), prose(when ? row.after : row.before)))))) : h("p", {}, "No answer has these words."));
    };
    const input = h("input", { type: "search", placeholder: `search ${all.length} answers`, "aria-label": "search the answers", value: this.search, oninput: () => { this.search = input.value; list(); } });
    list();
    return [input, found];
  }
}

// Take away: files, and the Python that does it again.
class TakeAway {
  constructor(page) {
    this.path = h("input", { type: "text", placeholder: "path of a new folder on this machine", "aria-label": "folder" });
    this.code = h("pre", {}, h("code", {}));
    const copy = button("Copy", "copy the Python", async () => {
      await navigator.clipboard?.writeText(page.get("code"));
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    const take = (what, text, title) => button(text, title, () => page.send("take", { what }), "live");
    this.edit = take("edit", "", "ld.Edit.load reads it");
    const maps = [take("svg", "Map as SVG", "the map as a paper figure"), take("pdf", "Map as PDF", "the map as a paper figure")];
    const report = take("report", "HTML report", "the last check, its edits and the maps as one file");
    page.on("map", () => { for (const one of maps) one.disabled = !page.get("map").views; });
    page.on("check", () => { report.disabled = !page.get("check").rates; });
    this.element = h("section", { class: "take" }, h("h2", {}, "Take away"),
      h("div", { class: "bar live" },
        this.edit,
        maps,
        report,
        h("span", {}, this.path, 
          button("Hugging Face folder", "the model with all edits that stand", () => page.send("take", { what: "folder", path: this.path.value }), "live"),
          button("LoRA adapter", "all edits that stand, as an adapter that peft loads", () => page.send("take", { what: "adapter", path: this.path.value }), "live"))),
      h("details", { open: true }, h("summary", {}, "The Python that does this again"), copy, this.code));
    const name = () => {
      const { edits } = page.get("stack");
      const planned = Boolean(page.get("plan").by_subject);
      this.edit.disabled = !planned && !edits.length;
      this.edit.textContent = planned || !edits.length ? "Plan as a file" : edits.length === 1 ? "Edit as a file" : `Last of ${edits.length} edits as a file`;
    };
    page.on("stack", name);
    page.on("plan", name);
    page.on("code", () => { this.code.firstChild.textContent = page.get("code"); });
    page.onEvent("file", ({ file: name, data }) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      const link = h("a", { href: URL.createObjectURL(new Blob([bytes])), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      page.note(`${name} was handed to the browser's downloads.`);
    });
  }
}
