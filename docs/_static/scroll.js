// Code that scrolls can be scrolled with the keyboard, in browsers that do not see to it themselves.
// Only such code is a stop of the Tab key.
function update() {
  for (const code of document.querySelectorAll("article .highlight pre")) {
    if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
    else code.removeAttribute("tabindex");
  }
}

// A table that is too wide for a phone is stacked: each cell below the other, with the heading of its column.
for (const table of document.querySelectorAll("article .table-wrapper table")) {
  const headings = [...table.querySelectorAll("thead th")].map((each) => each.innerText);
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.cells].forEach((cell, column) => (cell.dataset.heading = headings[column] ?? ""));
  }
}
function stack() {
  for (const wrapper of document.querySelectorAll("article .table-wrapper")) {
    wrapper.classList.remove("stacked");
    wrapper.classList.toggle("stacked", wrapper.scrollWidth > wrapper.clientWidth);
  }
}

for (const each of [update, stack]) {
  window.addEventListener("load", each);
  window.addEventListener("resize", each);
}

// The sidebars are landmarks, which need names.
document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "All pages");
document.querySelector(".toc-drawer")?.setAttribute("aria-label", "This page");
