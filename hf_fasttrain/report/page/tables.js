"use strict";
// Tables sort by their headings and are filtered by the box above them.

function valueOf(row, column, numeric) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return numeric ? -Infinity : cell.textContent;
}

function sortBy(table, heading, column) {
  const down = heading.getAttribute("aria-sort") === "descending";
  const numeric = heading.classList.contains("number");
  const direction = heading.hasAttribute("aria-sort") ? (down ? 1 : -1) : numeric ? -1 : 1;
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column, numeric), row]);
  rows.sort(([a], [b]) => direction * (typeof a === "number" && typeof b === "number" ? a - b || 0 : compare(a, b)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sortBy(table, heading, column));
  });
}

for (const input of document.querySelectorAll("[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase()), box = input.closest(".filter");
  box.hidden = rows.length < 12;
  input.addEventListener("input", () => {
    const query = input.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, index) => {
      row.hidden = !texts[index].includes(query);
      shown += row.hidden ? 0 : 1;
    });
    box.querySelector(".count").textContent = query ? `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}` : "";
  });
}
