// The worker: it holds the network and runs it, so that the page stays responsive. `ort` stands above this text.

const sessions = {};

async function answer({ wasm, models, providers, model, inputs }) {
  if (wasm) {
    ort.env.wasm.numThreads = 1; // threads need memory that a page from disk may not share
    ort.env.wasm.wasmBinary = wasm;
    ort.env.logLevel = "error";
    for (const [name, bytes] of Object.entries(models)) {
      sessions[name] = await ort.InferenceSession.create(bytes, { executionProviders: providers, logSeverityLevel: 3 });
    }
    return {};
  }
  const feeds = {};
  for (const [name, { data, shape }] of Object.entries(inputs)) feeds[name] = new ort.Tensor("float32", data, shape);
  const outputs = {};
  for (const [name, tensor] of Object.entries(await sessions[model].run(feeds))) outputs[name] = tensor.data;
  return outputs;
}

// One question after the other: a session on a GPU takes no second one while it waits.
let last = Promise.resolve();
self.onmessage = ({ data: { id, ...question } }) => {
  last = last.then(async () => {
    try {
      self.postMessage({ id, outputs: await answer(question) });
    } catch (error) {
      self.postMessage({ id, error: String(error.message || error) });
    }
  });
};
