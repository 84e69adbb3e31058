// Small mends for readers without a mouse or a screen: folding buttons get names, the bibliography's list has list items,
// and what scrolls inside itself can be reached by keyboard.
document.querySelectorAll(".bd-links summary").forEach((summary) => {
  summary.ariaLabel = `Pages under ${summary.closest("li").querySelector("a").textContent.trim()}`;
});

document.querySelectorAll("[role=list] > [role=doc-biblioentry]").forEach((entry) => {
  entry.role = "listitem";
});

const reach = () => {
  for (const box of document.querySelectorAll("div.math, .bd-article table.table, .cell_output, pre")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
};
addEventListener("load", () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(reach));
