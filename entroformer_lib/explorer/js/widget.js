// The widget's source: Python answers through the kernel.
import { mount } from "./explorer.js";

const ARRAYS = { f4: Float32Array, u2: Uint16Array, u1: Uint8Array };
const PATIENCE = 10_000; // milliseconds without an answer
const BUSY =
  "Python has not answered yet: it is busy, or its kernel was restarted. In that case run the cell again; what is shown here stays.";
const GONE =
  "Python does not answer: its kernel was restarted or has ended. Run the cell again; what is shown here stays.";

/** Questions and answers over a widget's messages. */
class KernelSource {
  constructor(model) {
    Object.assign(this, {
      model,
      meta: model.get("meta"),
      begin: model.get("selection"),
      waiting: new Map(),
      asked: [], // what goes with the next message: a view asks several things at a time
      count: 0,
      view: crypto.getRandomValues(new Uint32Array(1))[0],
    });
    this.received = ({ answered }, buffers) => {
      this.late(false);
      for (const { number, answer } of answered) {
        const { resolve, reject } = this.waiting.get(number) ?? {}; // another view of the widget may have asked
        this.waiting.delete(number);
        if (answer.error) reject?.(new Error(answer.error));
        else resolve?.(unpacked(answer, buffers));
      }
    };
    this.late = () => {}; // says that no answer comes, or that one has come
    model.on("msg:custom", this.received);
    for (const question of ["overview", "rows", "costs", "cross", "calculation", "picture"])
      this[question] = (...args) => this.ask(question, args);
  }

  ask(question, args) {
    const number = `${this.view}.${++this.count}`;
    return new Promise((resolve, reject) => {
      this.waiting.set(number, { resolve, reject });
      setTimeout(() => this.waiting.has(number) && this.late(true), PATIENCE);
      if (this.asked.push({ number, question, values: args }) === 1)
        setTimeout(() => this.model.send({ asked: this.asked.splice(0) }));
    });
  }

  chosen(selection) {
    this.tell("selection", selection); // at once: what Python chooses before it knows would be lost
  }

  keep(still) {
    this.tell("still", still);
  }

  tell(name, value) {
    this.keeping = true; // our own change is no news
    this.model.set(name, value);
    this.model.save_changes();
    this.keeping = false;
  }

  listen(adopt) {
    this.adopt = () => this.keeping || adopt(this.model.get("selection"));
    this.model.on("change:selection", this.adopt);
  }

  stop() {
    this.model.off("msg:custom", this.received);
    this.model.off("change:selection", this.adopt);
  }
}

function unpacked(answer, buffers) {
  const one = (value) => {
    if (value?.array === undefined) return value;
    const { buffer, byteOffset, byteLength } = buffers[value.array];
    return new ARRAYS[value.dtype](buffer.slice(byteOffset, byteOffset + byteLength));
  };
  return Object.fromEntries(Object.entries(answer).map(([name, value]) => [name, one(value)]));
}

function render({ model, el }) {
  const source = new KernelSource(model);
  const explorer = mount(el, source);
  const said = (words) => explorer.find(".ef-trouble").textContent === words;
  source.late = (late) => (late ? said(GONE) || explorer.trouble(BUSY) : said(BUSY) && explorer.trouble(""));
  const lost = () => explorer.trouble(GONE);
  model.on("comm_live_update", lost);
  return () => (source.stop(), model.off("comm_live_update", lost));
}

export default { render };
