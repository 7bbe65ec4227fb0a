"use strict";
// Tables sort by their headings and are filtered by the box above them. A table with many rows has its values as data,
// and only its first rows as HTML: more are made when the end of those is scrolled to, and after sorting or filtering.

const ROWS_AT_ONCE = 100;
const longTables = JSON.parse(document.getElementById("long-tables").textContent);
const { compare } = new Intl.Collator("en", { numeric: true });
const counted = (number) => number.toLocaleString("en");

function valueOf(row, column, numeric) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return numeric ? -Infinity : cell.textContent;
}

// A table whose rows are all in the page.
class WholeTable {
  constructor(table) {
    this.body = table.tBodies[0];
    this.length = this.body.rows.length;
  }

  sort(column, numeric, direction) {
    const rows = [...this.body.rows].map((row) => [valueOf(row, column, numeric), row]);
    rows.sort(([a], [b]) => direction * (typeof a === "number" && typeof b === "number" ? a - b || 0 : compare(a, b)));
    this.body.append(...rows.map(([, row]) => row));
  }

  filter(query) {
    this.texts ??= new Map([...this.body.rows].map((row) => [row, row.textContent.toLowerCase()]));
    let shown = 0;
    for (const [row, text] of this.texts) {
      row.hidden = !text.includes(query);
      shown += row.hidden ? 0 : 1;
    }
    return shown;
  }
}

// The same text as Python's f"{value:.3f}", which rounds halves to even.
function threeDigits(value) {
  const thousands = Math.floor(value * 1000);
  const isHalf = value * 1000 - thousands === 0.5 && Number.isInteger(value * 2 ** 20);
  return (isHalf ? (thousands + (thousands % 2)) / 1000 : value).toFixed(3);
}

const TEXTS = { text: (value) => value, integer: counted, share: threeDigits };

// A table whose rows are made from its values when they are looked at.
class LongTable {
  constructor(table, columns) {
    this.body = table.tBodies[0];
    this.columns = columns;
    this.length = columns[0].values.length;
    this.order = Array.from({ length: this.length }, (_, index) => index);
    this.rows = this.order;
    this.view = table.closest(".scroll");
    this.view.addEventListener("scroll", () => this.extend(), { passive: true });
  }

  text(column, index) {
    return TEXTS[column.kind](column.values[index]);
  }

  cell(column, index, first) {
    const cell = document.createElement(first ? "th" : "td");
    if (first) cell.scope = "row";
    if (column.kind !== "text") cell.className = "number";
    if (column.kind === "share") {
      cell.classList.add("bar");
      cell.style.setProperty("--share", Math.max(0, Math.min(1, column.values[index])));
    }
    cell.textContent = this.text(column, index);
    return cell;
  }

  row(index, position) {
    const row = document.createElement("tr");
    row.setAttribute("aria-rowindex", position + 2);
    row.append(...this.columns.map((column, number) => this.cell(column, index, number === 0)));
    return row;
  }

  append() {
    const start = this.body.rows.length;
    this.body.append(...this.rows.slice(start, start + ROWS_AT_ONCE).map((index, number) => this.row(index, start + number)));
  }

  extend() {
    const { scrollTop, clientHeight, scrollHeight } = this.view;
    if (this.body.rows.length < this.rows.length && scrollTop + 2 * clientHeight > scrollHeight) this.append();
  }

  show(rows) {
    this.rows = rows;
    this.body.replaceChildren();
    this.view.scrollTop = 0;
    this.append();
  }

  matching() {
    return this.query ? this.order.filter((index) => this.texts[index].includes(this.query)) : this.order;
  }

  sort(column, numeric, direction) {
    const { values } = this.columns[column];
    this.order.sort((a, b) => direction * (numeric ? values[a] - values[b] : compare(values[a], values[b])));
    this.show(this.matching());
  }

  filter(query) {
    this.texts ??= this.columns[0].values.map((_, index) => this.columns.map((column) => this.text(column, index)).join("").toLowerCase());
    this.query = query;
    this.show(this.matching());
    return this.rows.length;
  }
}

const shownTables = new Map();
for (const table of document.querySelectorAll("table")) {
  const columns = longTables[table.id], shown = columns ? new LongTable(table, columns) : new WholeTable(table);
  shownTables.set(table.id, shown);
  if (shown.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const numeric = heading.classList.contains("number"), was = heading.getAttribute("aria-sort");
      const direction = was ? (was === "descending" ? 1 : -1) : numeric ? -1 : 1;
      shown.sort(column, numeric, direction);
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    });
  });
}

for (const input of document.querySelectorAll("[data-filters]")) {
  const table = shownTables.get(input.dataset.filters), box = input.closest(".filter");
  box.hidden = table.length < 12;
  input.addEventListener("input", () => {
    const query = input.value.trim().toLowerCase(), shown = table.filter(query);
    box.querySelector(".count").textContent = query ? `${counted(shown)} of ${counted(table.length)}` : "";
  });
}
