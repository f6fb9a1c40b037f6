"use strict";
document.documentElement.classList.add("js");

const copy = document.querySelector("[data-copy]");
if (copy) {
  copy.addEventListener("click", async () => {
    const source = document.getElementById(copy.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      copy.textContent = "Copied";
    } catch {
      // Some browsers refuse the clipboard to a page opened from a file.
      getSelection().selectAllChildren(source);
      copy.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 2500);
  });
}

for (const box of document.querySelectorAll("[data-filter]")) {
  const list = document.getElementById(box.dataset.filter);
  const said = list.querySelector("[data-found]");
  box.addEventListener("input", () => {
    const wanted = box.value.trim().toLowerCase();
    let found = 0;
    for (const item of list.querySelectorAll(".case")) {
      item.hidden = wanted !== "" && !item.textContent.toLowerCase().includes(wanted);
      found += item.hidden ? 0 : 1;
    }
    for (const more of list.querySelectorAll("details")) if (wanted) more.open = true;
    said.textContent = wanted ? `${found} found` : "";
  });
}

const opened = [];
addEventListener("beforeprint", () => {
  for (const more of document.querySelectorAll("details:not([open])")) {
    more.open = true;
    opened.push(more);
  }
});
addEventListener("afterprint", () => { for (const more of opened.splice(0)) more.open = false; });
