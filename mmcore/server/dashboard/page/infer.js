// A box that sends one request to a model, over the same REST path as everybody's.

import { el, json, ms, signed } from "./shown.js";

const MOST_ELEMENTS = 4096;

// An input filled with zeros, free dimensions being one.
function filled({ name, datatype, shape }, sizes = shape.map((size) => Math.max(1, Number(size)))) {
  const length = sizes.reduce((product, size) => product * size, 1);
  const zero = { BYTES: "", BOOL: false }[datatype] ?? 0;
  return { name, datatype, shape: sizes, data: Array(Math.min(length, MOST_ELEMENTS)).fill(zero) };
}

export function inferBox(name) {
  const path = `/v2/models/${encodeURIComponent(name)}`;
  const fields = el("div");
  const body = el("textarea", { id: "body", spellcheck: "false", "aria-describedby": "body-note" });
  const note = el("div", { id: "body-note", class: "note" }, "Describe the model for a form, or write the request yourself.");
  const outcome = el("div", { class: "outcome", role: "status" });
  const answer = el("pre", { hidden: "", tabindex: "0", "aria-label": "Answer" });
  const describe = el("button", { type: "button", id: "describe" }, "Describe inputs");
  const send = el("button", { class: "main", id: "send" }, "Send request");
  body.value = json({ inputs: [] });

  function told(response, text, began) {
    outcome.textContent = `${response.ok ? "Answered" : `Status ${response.status}`} in ${ms(performance.now() - began)}`;
    outcome.classList.toggle("bad-text", !response.ok);
    let shown = text;
    try { shown = json(JSON.parse(text)); } catch { /* as it is */ }
    answer.hidden = false;
    answer.textContent = shown.length > 200000 ? `${shown.slice(0, 200000)}\n… ${shown.length} characters` : shown;
  }

  // Have the buttons wait for an answer; a model may have to be loaded for it.
  async function waited(work) {
    describe.disabled = send.disabled = true;
    outcome.classList.remove("bad-text");
    outcome.textContent = "Waiting for the answer…";
    try {
      await work();
    } catch (error) {
      outcome.classList.add("bad-text");
      outcome.textContent = `No answer: ${error.message}`;
    }
    describe.disabled = send.disabled = false;
  }

  function write(inputs) {
    body.value = json({ inputs });
  }

  // One input of the form: its shape and its elements, each change of which is written into the JSON.
  function field(spec, inputs, at) {
    const values = el("input", { id: `input-${at}`, autocomplete: "off", spellcheck: "false" });
    const shape = el("input", { id: `shape-${at}`, "aria-label": `Shape of ${spec.name}`, autocomplete: "off" });
    const fill = () => {
      values.value = JSON.stringify(inputs[at].data).slice(1, -1);
      shape.value = inputs[at].shape.join(", ");
    };
    fill();
    shape.onchange = () => {
      const sizes = shape.value.split(/[\s,x×]+/).filter(Boolean).map(Number);
      if (!sizes.every((size) => Number.isInteger(size) && size >= 0)) { shape.setCustomValidity("whole numbers, separated by commas"); shape.reportValidity(); return; }
      shape.setCustomValidity("");
      inputs[at] = filled(spec, sizes);
      fill();
      write(inputs);
    };
    values.oninput = () => {
      try {
        inputs[at].data = JSON.parse(`[${values.value}]`);
        values.setCustomValidity("");
        write(inputs);
      } catch {
        values.setCustomValidity("Elements as JSON, separated by commas");
      }
    };
    return el("div", { class: "field" },
      el("label", { for: `input-${at}` }, el("b", {}, spec.name), ` ${spec.datatype} [${spec.shape.join(", ")}], elements and shape`),
      el("div", { class: "tensor" }, values, shape));
  }

  describe.onclick = () => waited(async () => {
    const began = performance.now();
    const response = await fetch(path, { headers: signed() });
    const text = await response.text();
    if (!response.ok) { told(response, text, began); return; }
    const inputs = JSON.parse(text).inputs ?? [];
    const request = inputs.map((spec) => filled(spec));
    fields.replaceChildren(...inputs.map((spec, at) => field(spec, request, at)));
    write(request);
    note.textContent = "The form writes the request; it can be changed here too.";
    outcome.textContent = "";
    answer.hidden = true;
  });

  const form = el("form", { class: "body" }, fields,
    el("div", { class: "field" }, el("label", { for: "body" }, `Request: POST ${path}/infer`), body, note),
    el("div", { class: "row" }, send, describe), outcome, answer);
  form.onsubmit = (event) => {
    event.preventDefault();
    waited(async () => {
      const began = performance.now();
      const response = await fetch(`${path}/infer`, { method: "POST", headers: signed({ "content-type": "application/json" }), body: body.value });
      told(response, await response.text(), began);
    });
  };
  return el("section", { class: "card", "aria-label": "Test request" }, el("h2", {}, "Test request ", el("small", {}, "loads the model if it is not")), form);
}
