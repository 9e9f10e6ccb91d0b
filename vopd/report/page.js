
"use strict";
// Filters the cards of the gallery; a picture is put in when its card is first shown.
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const totals = JSON.parse(document.getElementById("totals").textContent);
const cards = [...document.querySelectorAll(".card")];
const selects = [...document.querySelectorAll("#filters select")];
const count = document.getElementById("count");

function wanted(card) {
  return selects.every((select) => select.value === "" || card.dataset[select.name] === select.value);
}

function fill(card) {
  for (const image of card.querySelectorAll("img[data-picture]")) {
    image.src = pictures[image.dataset.picture];
    image.removeAttribute("data-picture");
  }
}

function show() {
  let shown = 0;
  for (const card of cards) {
    card.hidden = !wanted(card);
    if (!card.hidden) {
      shown += 1;
      fill(card);
    }
  }
  const chosen = Object.fromEntries(selects.map((select) => [select.name, select.value]));
  const keys = Object.keys(totals).filter((key) => {
    const [method, outcome] = key.split("\0");
    return (!chosen.method || chosen.method === method) && (!chosen.outcome || chosen.outcome === outcome);
  });
  const all = keys.reduce((sum, key) => sum + totals[key], 0);
  const of = chosen.split || chosen.family ? "" : ` of ${all}`;
  count.textContent = `${shown}${of} shown`;
}

for (const select of selects) select.addEventListener("change", show);
show();
