// Replaces the search box by that of pagefind, which also finds numbers. From a file, browsers load
// neither a module nor pagefind's index: there the box of Sphinx stays.
import "../pagefind/pagefind-component-ui.js";

const bundle = new URL("../pagefind/", import.meta.url).href;
window.PagefindComponents.configureInstance("default", { bundlePath: bundle });

// Before our own style sheet, which gives it the colours of the theme.
const style = document.createElement("link");
style.rel = "stylesheet";
style.href = `${bundle}pagefind-component-ui.css`;
document.head.prepend(style);

const modal = document.createElement("pagefind-modal");
const trigger = document.createElement("pagefind-modal-trigger");
document.querySelector(".sidebar-search-container").replaceWith(trigger, modal);
// Its name is its text then, and the keys are in aria-keyshortcuts.
trigger.querySelector("button")?.removeAttribute("aria-label");

// Enter in the box opens the first hit; after an arrow key, the focus is on another.
modal.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("input")) {
    modal.querySelector(".pf-result-link")?.click();
  }
});

// The other shortcut is its own: Ctrl-K.
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, [contenteditable]");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    modal.open();
  }
});
