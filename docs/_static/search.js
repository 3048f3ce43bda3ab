// Replaces the search box by that of pagefind, which also finds numbers. The box of Sphinx stays where
// pagefind cannot run: in pages opened as files, from which browsers load no module, and without
// WebAssembly, which some browsers turn off for safety.
function runsWebAssembly() {
  try {
    return new WebAssembly.Memory({ initial: 1 }).buffer.byteLength > 0;
  } catch {
    return false;
  }
}

async function replaceBox() {
  await import("../pagefind/pagefind-component-ui.js");

  // There it finds `pagefind.js`.
  const bundlePath = new URL("./", import.meta.url).href;
  window.PagefindComponents.configureInstance("default", { bundlePath });

  // Before our own style sheet, which gives it the colours of the theme.
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("../pagefind/pagefind-component-ui.css", import.meta.url).href;
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
}

if (runsWebAssembly()) {
  await replaceBox();
}
