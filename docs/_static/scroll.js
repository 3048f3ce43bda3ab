// Code that scrolls can be scrolled with the keyboard, in browsers that do not see to it themselves.
// Only such code is a stop of the Tab key.
function update() {
  for (const code of document.querySelectorAll("article .highlight pre")) {
    if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
    else code.removeAttribute("tabindex");
  }
}
window.addEventListener("load", update);
window.addEventListener("resize", update);

// The sidebars are landmarks, which need names.
document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "All pages");
document.querySelector(".toc-drawer")?.setAttribute("aria-label", "This page");
