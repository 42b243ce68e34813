// The widget's source: Python answers through the kernel.
import { mount } from "./explorer.js";

const ARRAYS = { f4: Float32Array, u2: Uint16Array, u1: Uint8Array };
const PATIENCE = 20_000; // milliseconds without an answer
const GONE = "Python does not answer: its kernel was restarted or has ended. Run the cell again; what is shown here stays.";

/** Questions and answers over a widget's messages. */
class KernelSource {
  constructor(model) {
    Object.assign(this, { model, meta: model.get("meta"), begin: model.get("selection"), waiting: new Map(), count: 0 });
    this.received = (message, buffers) => {
      const { number, answer } = message;
      const { resolve, reject } = this.waiting.get(number) ?? {};
      this.waiting.delete(number);
      if (answer.error) reject?.(new Error(answer.error));
      else resolve?.(unpacked(answer, buffers));
    };
    model.on("msg:custom", this.received);
    for (const question of ["overview", "rows", "costs", "cross", "calculation", "picture"]) this[question] = (...args) => this.ask(question, args);
  }

  ask(question, args) {
    const names = { overview: ["model"], rows: ["model", "query", "k"], costs: ["model", "query", "k"], cross: ["model", "query"], picture: ["model", "name"], calculation: ["model", "query", "k", "change", "layer", "head", "channel"] }[question];
    const parts = names.map((name, i) => [name, args[i]]).filter(([name]) => name !== "change");
    const number = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(number, { resolve, reject });
      setTimeout(() => this.waiting.delete(number) && reject(new Error(GONE)), PATIENCE);
      this.model.send({ number, question, arguments: Object.fromEntries(parts) });
    });
  }

  keep(selection, still) {
    this.keeping = true; // our own change is no news
    this.model.set("selection", selection);
    this.model.set("still", still());
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
  model.on("comm_live_update", () => explorer.trouble(GONE)); // the next answer takes the words away
  return () => source.stop();
}

export default { render };
