// The page at a local address: parts come as lines of JSON, commands go as requests, both with the token.

import page from "/explorer.js";

const token = location.hash.slice(1) || sessionStorage.getItem("token") || "";
sessionStorage.setItem("token", token);

class Link {
  constructor() {
    this.parts = {};
    this.listeners = new Map();
  }
  get(name) { return this.parts[name]; }
  on(name, action) {
    if (!this.listeners.has(name)) this.listeners.set(name, new Set());
    this.listeners.get(name).add(action);
  }
  off(name, action) { this.listeners.get(name)?.delete(action); }
  emit(name, value) { for (const action of [...(this.listeners.get(name) ?? [])]) action(value); }

  receive(name, value) {
    if (name === "event:ready") this.ready();
    else if (name.startsWith("event:")) this.emit("msg:custom", { event: name.slice(6), ...value });
    else {
      this.parts[name] = value;
      this.emit(`change:${name}`);
    }
  }

  // One after the other: two that are sent at once could come in another order.
  send(message) {
    this.sent = (this.sent ?? Promise.resolve()).then(() => this.post(message));
  }

  async post(message) {
    try {
      const answer = await fetch("/do", { method: "POST", headers: { "X-Token": token }, body: JSON.stringify(message) });
      if (answer.ok) return;
      this.receive("message", await answer.text());
    } catch {
      this.receive("message", "the command that serves this page has ended; start it again");
    }
    this.emit("msg:custom", { event: "done", ticket: message.ticket });
  }

  async follow() {
    const answer = await fetch("/state", { headers: { "X-Token": token } });
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line) this.receive(...JSON.parse(line));
    }
  }
}

document.body.style.margin = 0;
const link = new Link();
const element = document.getElementById("page");
link.ready = () => {
  if (!element.firstChild || element.dataset.failed) page.render({ model: link, el: element });
  else link.emit("msg:custom", { event: "done" }); // an answer may have been lost with the old connection
  delete element.dataset.failed;
};
for (let wait = 200; ; wait = Math.min(4000, wait * 2)) {
  try {
    await link.follow();
    wait = 200;
  } catch (error) {
    const text = error.message.includes("fetch") ? "the command that serves this page has ended; start it again, and load the new address" : error.message;
    if (link.parts.message != null) link.receive("message", text);
    else {
      element.textContent = text;
      element.dataset.failed = "yes";
    }
  }
  await new Promise((resume) => setTimeout(resume, wait));
}
