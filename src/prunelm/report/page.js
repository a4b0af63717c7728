"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const views = {};
const asked = new Set();

function draw(id) {
  return vegaEmbed(`#${id}`, data.figures[id], { renderer: "svg", actions: false, tooltip: { theme: "custom" } }).then(
    (made) => { views[id] = made.view; },
  );
}

/* Sorting: the first number in a cell decides where all cells of a column have one, else its text. */
function sortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      const value = (row) => row.cells[column].textContent.trim();
      const number = (text) => parseFloat(text.replace(/,/g, ""));
      const rows = [...body.rows];
      const numeric = rows.every((row) => value(row) === "" || /^[-+]?[\d.]/.test(value(row)));
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return (rising ? 1 : -1) * (numeric ? number(x) - number(y) : x.localeCompare(y));
      };
      rows.sort(compare).forEach((row) => body.append(row));
      table.querySelectorAll("thead th").forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    });
  });
}

/* The harm of a site with some units gone: straight lines between the points that are known. */
function harmAt(site, removed) {
  const { removed: x, harm: y } = site;
  let k = 1;
  while (k < x.length - 1 && x[k] < removed) k += 1;
  return y[k - 1] + (y[k] - y[k - 1]) * (removed - x[k - 1]) / Math.max(1, x[k] - x[k - 1]);
}

/* The lower convex hull of a site's harm, as steps (units, harm per parameter) in the order of their price. */
function steps(site) {
  const hull = [];
  site.removed.forEach((x, k) => {
    const point = { x, y: site.harm[k] };
    const turns = (a, b) => (b.x - a.x) * (point.y - a.y) - (b.y - a.y) * (point.x - a.x) <= 0;
    while (hull.length > 1 && turns(hull[hull.length - 2], hull[hull.length - 1])) hull.pop();
    hull.push(point);
  });
  return hull.slice(1).map((b, k) => {
    const units = b.x - hull[k].x;
    return { site, units, price: (b.y - hull[k].y) / (units * site.cost) };
  });
}

/* How many units every site loses: in the proportion of the plan where widths are equal, else the cheapest parameters first. */
function planned(slider, share) {
  if (Math.abs(share - slider.share) < 1e-5) return new Map(slider.sites.map((site) => [site, site.units - site.kept]));
  const gone = new Map(slider.sites.map((site) => [site, 0]));
  if (slider.even) {
    /* Every site loses more or less in the proportion of the plan; what the plan left whole stays whole. */
    slider.sites.forEach((site) => {
      const cut = (site.units - site.kept) * share / slider.share;
      gone.set(site, Math.min(site.units - 1, Math.round(cut)));
    });
    return gone;
  }
  let left = share * slider.prunable;
  slider.sites.flatMap(steps).sort((a, b) => a.price - b.price).forEach(({ site, units }) => {
    const room = Math.min(units, site.units - 1 - gone.get(site), Math.floor(left / site.cost));
    if (room > 0) { gone.set(site, gone.get(site) + room); left -= room * site.cost; }
  });
  return gone;
}

function predict(id) {
  const slider = data.sliders[id];
  const share = Number(document.getElementById(id).value);
  const gone = planned(slider, share);
  let harm = 0, removed = 0;
  const rows = slider.sites.map((site) => {
    harm += harmAt(site, gone.get(site));
    removed += gone.get(site) * site.cost;
    const kept = site.units - gone.get(site);
    return { block: site.block, kind: site.kind, units: site.units, kept, share: kept / site.units };
  });
  const said = [`${(100 * share).toFixed(0)} % asked: ${Math.round(removed).toLocaleString("en")} parameters go`];
  if (slider.scale !== null) said.push(`predicted KL ${(slider.scale * harm).toPrecision(3)} nats per token`);
  document.getElementById(`${id}-said`).textContent = said.join(", ");
  const view = views[slider.figure];
  if (view) view.data("rows", rows).runAsync();
}

/* A figure is drawn when its place is open; a figure in a closed model has no width to fill. */
const isOpen = (id) => !document.getElementById(id).closest("details.model:not([open])");

function drawOpen() {
  const due = Object.keys(data.figures).filter((id) => !asked.has(id) && isOpen(id));
  due.forEach((id) => asked.add(id));
  return Promise.all(due.map(draw)).then(() => {
    Object.keys(data.sliders).filter((id) => data.sliders[id].figure in views).forEach(predict);
    document.documentElement.dataset.drawn = String(Object.keys(views).length);
  });
}

/* A link to a model opens it. */
function openNamed() {
  const named = location.hash && document.getElementById(location.hash.slice(1));
  if (named instanceof HTMLDetailsElement) { named.open = true; named.scrollIntoView(); }
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("details.model").forEach((model) => model.addEventListener("toggle", () => model.open && drawOpen()));
Object.keys(data.sliders).forEach((id) => document.getElementById(id).addEventListener("input", () => predict(id)));
addEventListener("hashchange", openNamed);

/* Paper shows what is closed too, but for the recipes; figures must be asked for at once, before the page is printed. */
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .recipe)")];
  opened.forEach((one) => { one.open = true; });
  drawOpen();
});
addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));

openNamed();
drawOpen();
