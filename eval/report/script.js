"use strict";
// Sorting, copying, and opening a run that a link names. Without this script the page is complete, only unsorted.

// A column's order: by data-sort where cells have one, else by their words; cells without either stand last.
function sortBy(table, column, descending) {
  const key = (row) => {
    const cell = row.cells[column];
    const words = cell.dataset.sort ?? cell.textContent.trim();
    return words === "n/a" || words === "" ? null : words;
  };
  const compare = (one, other) => {
    const numbers = [Number(one), Number(other)];
    return numbers.some(Number.isNaN) ? one.localeCompare(other) : numbers[0] - numbers[1];
  };
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [key(row), row]);
  rows.sort(([one], [other]) => {
    if (one === null || other === null) return (one === null) - (other === null);
    return descending ? compare(other, one) : compare(one, other);
  });
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}

for (const line of navigator.clipboard ? document.querySelectorAll(".command") : []) {
  const text = line.textContent;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  });
  line.prepend(button);
}

// Browsers open what a link names by themselves, but not all of them do.
function open() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = named; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (named?.closest("details")) {
    named.scrollIntoView({ block: "nearest" });
    named.focus();
  }
}
addEventListener("hashchange", open);
if (location.hash) open();
