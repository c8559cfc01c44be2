// Draws the figure of `picture.py` and changes it in place. Plotly comes from the model `library`, once a page.

function plotly(model) {
  globalThis.workbenchPlotly ??= model.widget_manager
    .get_model(model.get("library").slice("IPY_MODEL_".length))
    .then((library) => {
      const module = { exports: {} };
      // The bundle asks for CommonJS and AMD by these names; a page may have an AMD loader of its own.
      new Function("module", "exports", "define", library.get("source"))(module, module.exports, undefined);
      return module.exports;
    });
  return globalThis.workbenchPlotly;
}

/** A value as Plotly takes it: bytes as buffers, repeated rows as matrices. Copies, since Plotly writes into what it draws. */
function revive(value, texts) {
  if (value instanceof DataView) return value.buffer.slice(value.byteOffset, value.byteOffset + value.byteLength);
  if (Array.isArray(value)) return value.map((inner) => revive(inner, texts));
  if (value === null || typeof value !== "object") return value;
  if ("times" in value && "row" in value) return Array(value.times).fill(texts[value.row]);
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, revive(inner, texts)]));
}

export default {
  async render({ model, el }) {
    const Plotly = await plotly(model);
    const place = document.createElement("div");
    place.style.width = "100%";
    el.appendChild(place);
    let due = 0;
    let drawn = Promise.resolve();
    const draw = () => {
      due = 0;
      const texts = model.get("texts");
      const data = revive(model.get("traces"), texts);
      const layout = { ...revive(model.get("look"), texts), template: revive(model.get("template"), texts) };
      const options = { displaylogo: false, responsive: true };
      drawn = drawn.then(() => Plotly.react(place, data, layout, options));
    };
    // One drawing a frame, however many traits a message changes; none while the page is hidden.
    const changed = () => (due ||= requestAnimationFrame(draw));
    const traits = ["traces", "look", "template", "texts"];
    for (const name of traits) model.on(`change:${name}`, changed);
    const fitting = new ResizeObserver(() => place.offsetWidth && place.data && Plotly.Plots.resize(place));
    fitting.observe(place);
    changed();
    return () => {
      cancelAnimationFrame(due);
      fitting.disconnect();
      for (const name of traits) model.off(`change:${name}`, changed);
      Plotly.purge(place);
    };
  },
};
