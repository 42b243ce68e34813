// The live page: unpacks what it holds, takes a photograph, and gives the explorer a source.
import { mount } from "./explorer.js";
import { LiveSource } from "./live.js";
import { PictureError } from "./live_pictures.js";

// A module of one SIMD instruction, which browsers without SIMD do not take for valid (wasm-feature-detect).
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

// What this browser lacks, in a sentence, or nothing.
function lacks() {
  if (typeof DecompressionStream === "undefined") {
    return "This browser cannot unpack the model (it has no DecompressionStream). Firefox 113, Chrome 80, Safari 16.4 can.";
  }
  if (typeof WebAssembly === "undefined" || !WebAssembly.validate(Uint8Array.from(SIMD))) {
    return "This browser cannot run the model (it has no WebAssembly SIMD). Firefox 89, Chrome 91, Safari 16.4 can.";
  }
  return "";
}

class PageError extends Error {}

// The bytes of a part of the page. gzip carries a checksum, so damage does not go unnoticed.
async function unpacked(name) {
  const element = document.getElementById(`part-${name}`);
  try {
    const text = element.textContent.trim();
    const packed = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); // the first is quick
    element.remove(); // the text is no longer needed, and large
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new PageError(`This page is damaged: its part "${name}" cannot be unpacked. Get the file again.`);
  }
}

async function runtime() {
  const script = new Blob([await unpacked("runtime")], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(script)); // a page from the disk may import from itself alone
  ort.env.wasm.wasmBinary = (await unpacked("wasm")).buffer;
  ort.env.wasm.numThreads = 1; // a page from the disk has no shared memory
  return ort;
}

async function readPicture(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } catch {
    throw new PictureError(`${blob.name || "What was given"} is not a picture that this browser can read.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
  return image;
}

export async function boot() {
  const [status, root, chooser] = ["status", "explorer", "photo"].map((id) => document.getElementById(id));
  const bar = document.getElementById("progress");
  const say = (words, part) => {
    status.textContent = part === undefined ? words : `${words}, ${Math.round(100 * part)} %`;
    bar.hidden = part === undefined || part === 1;
    bar.value = part ?? 0;
  };
  const fail = (error) => {
    const known = error instanceof PageError || error instanceof PictureError;
    say(known ? error.message : `Something went wrong that nobody expected: ${error.message}`);
    status.dataset.state = "failed";
  };

  let engine;
  const open = async (blob) => {
    status.dataset.state = "working";
    const source = await LiveSource.open(engine, await readPicture(blob), say);
    say(source.meta.note || "Every number here is computed in this page.");
    globalThis.liveSource = source; // for whoever looks from outside
    mount(root, source);
    status.dataset.state = "ready";
  };
  let last = Promise.resolve();
  const take = (blob) => (last = last.then(() => engine && open(blob)).catch(fail)); // one picture after the other
  addEventListener("dragover", (event) => event.preventDefault()); // from the first moment: else a file takes the page's place
  addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file && engine) take(file);
  });

  try {
    const missing = lacks();
    if (missing) throw new PageError(missing);
    const facts = JSON.parse(document.getElementById("facts").textContent);
    say("unpacking the runtime", 0);
    const ort = await runtime();
    const sessions = {}; // the runtime compiles while the next graph is unpacked
    for (const [i, name] of facts.graphs.entries()) {
      say("unpacking the model", (i + 1) / (facts.graphs.length + 1));
      const graph = await unpacked(name);
      sessions[name] = ort.InferenceSession.create(graph, { graphOptimizationLevel: "all" });
      sessions[name].catch(() => {}); // said when it is waited for
    }
    engine = { ort, sessions, facts };
    await take(new Blob([await unpacked("picture")]));
  } catch (error) {
    return fail(error);
  }

  chooser.disabled = false;
  chooser.addEventListener("change", () => {
    if (chooser.files.length) take(chooser.files[0]);
    chooser.value = ""; // the same file may be chosen again
  });
  addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files[0]));
}
