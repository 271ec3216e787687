"use strict";
/* Filters of the sample list. Without it the whole list is shown as a plain table. */
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const rows = [...document.querySelectorAll("#sample-list tbody tr")];
  const status = document.getElementById("shown");
  const texts = new Map();
  const field = (name) => form.elements[name].value;
  const text = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };
  const ended = (row, run, outcome) => {
    if (outcome.startsWith("change-")) return row.dataset.x === outcome.slice(7);
    const outcomes = row.dataset.o.split(" ");
    const own = run === "" ? outcomes : [outcomes[Number(run)]];
    return outcome === "" ? own.some((o) => o !== "-") : own.includes(outcome);
  };
  const update = () => {
    const [run, benchmark, category, outcome] = ["run", "benchmark", "category", "outcome"].map(field);
    const words = field("words").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits =
        (benchmark === "" || row.dataset.b === benchmark) &&
        (category === "" || row.dataset.c === category) &&
        ended(row, run, outcome) &&
        words.every((word) => text(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    status.textContent = `${shown} of ${rows.length} samples`;
  };
  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 80);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  form.hidden = false;
  update();
})();
