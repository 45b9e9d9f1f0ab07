// Keys, picture tools and theme of the review page. All server calls are htmx's; nothing here makes markup from data.
"use strict";

const $ = (selector) => document.querySelector(selector);
const say = (text, isError = false) => {
  const notice = $("#notice");
  if (!notice) return;
  notice.setAttribute("role", isError ? "alert" : "status");
  notice.classList.toggle("error", isError);
  notice.textContent = text;
};

/* theme: the cookie is read by the server, so that no page flashes */
const THEMES = ["auto", "light", "dark"];
document.addEventListener("click", (event) => {
  const button = event.target.closest("#theme-button");
  if (!button) return;
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  document.documentElement.dataset.theme = next;
  button.querySelector("span").textContent = next;
  document.cookie = `guard_theme=${next}; path=/; max-age=31536000; samesite=strict`;
});

/* the picture */
const ZOOMS = [1, 1.5, 2, 3, 4, 6, 8];
let zoom = 0;
function setZoom(step) {
  const frame = $("#frame");
  if (!frame) return;
  zoom = Math.min(ZOOMS.length - 1, Math.max(0, step));
  frame.style.setProperty("--zoom", ZOOMS[zoom]);
  $("#zoom").textContent = zoom === 0 ? "fit" : `${ZOOMS[zoom]}×`;
  const view = $("#viewport");
  view.scrollTo((view.scrollWidth - view.clientWidth) / 2, (view.scrollHeight - view.clientHeight) / 2);
}
function setContrast(value) {
  const slider = $("#contrast");
  if (!slider) return;
  slider.value = value;
  $("#frame").style.setProperty("--contrast", slider.value);
}
function setView(name) {
  const picture = $("#picture");
  if (!picture) return;
  document.querySelectorAll("[data-view]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.view === name));
  $("#no-picture").hidden = true;
  $("#frame").hidden = false;
  picture.src = picture.dataset[name];
}
function toggleOcclusion() {
  const button = $("#occlusion-button"), overlay = $("#overlay");
  if (!button) return say("No map of where it looks: the page was started without the model.", true);
  if (!overlay.firstElementChild) {
    button.setAttribute("aria-pressed", "true");
    $("#looks").textContent = "Looking …";
    htmx.trigger(button, "load-occlusion");
    return;
  }
  overlay.hidden = !overlay.hidden;
  $("#looks").hidden = overlay.hidden;
  button.setAttribute("aria-pressed", String(!overlay.hidden));
}
function prepare() {
  const picture = $("#picture");
  if (picture) {
    const fit = () => $("#frame").style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight || 1);
    picture.addEventListener("load", fit);
    picture.addEventListener("error", () => {
      $("#frame").hidden = true;
      $("#no-picture").hidden = false;
    });
    if (picture.complete && picture.naturalWidth) fit();
    zoom = 0;
  }
  const box = $("#advance");
  if (box) {
    box.checked = !document.cookie.includes("guard_advance=0");
    box.form.elements.advance.value = box.checked ? "1" : "0";
  }
  typed = "";
  showChosen();
}

/* the true label */
let typed = "";
function form() {
  const found = $("#answer");
  return found && found.querySelector(".labels") ? found : null;
}
function waiting(on) {
  const panel = form();
  if (!panel) return;
  panel.classList.toggle("waiting", on);
  if (on) say("Poisoned. Now its true label: type its key, or x if it cannot be told.");
}
function choose(radio) {
  radio.checked = true;
  radio.closest(".choice").scrollIntoView({ block: "nearest" });
  showTyped("");
  const panel = form();
  if (panel.classList.contains("waiting")) {
    waiting(false);
    panel.querySelector('[value="poisoned"]').click();
  } else {
    say(`True label: ${radio.closest(".choice").querySelector(".choice-name").textContent}. p: poisoned, f: false alarm.`);
  }
}
function showTyped(text) {
  typed = text;
  const output = $("#typed");
  if (output) output.textContent = text;
}
function labelKey(key) {
  const panel = form();
  if (!panel) return false;
  const radios = [...panel.querySelectorAll("[data-code]")];
  const exact = radios.find((radio) => radio.dataset.code === key);
  if (exact && !(typed && /\d/.test(key))) {
    choose(exact);
    return true;
  }
  if (!/^\d$/.test(key) || Number(panel.querySelector(".labels").dataset.codes) < 2) return false;
  const so_far = typed + key;
  if (!radios.some((radio) => radio.dataset.code.startsWith(so_far))) {
    showTyped("");
    say(`There is no class ${so_far}.`, true);
    return true;
  }
  showTyped(so_far);
  const found = radios.find((radio) => radio.dataset.code === so_far);
  if (found) choose(found);
  return true;
}
function filterClasses(text) {
  const wanted = text.trim().toLowerCase();
  document.querySelectorAll(".choices .choice").forEach((choice) => {
    const radio = choice.querySelector("input");
    choice.hidden = !(choice.dataset.name || "").includes(wanted) && radio.dataset.code !== wanted && wanted !== "";
  });
}

/* keys */
// A verdict that comes sooner after a new item than anybody can see is the last key pressed twice.
const TOO_SOON_MS = 200;
let shownAt = 0;
const isTyping = (element) =>
  element.isContentEditable || element.matches('textarea, select, input:not([type=radio]):not([type=checkbox]):not([type=range])');
function press(key) {
  const target = [...document.querySelectorAll("[data-key]")].find((element) => element.dataset.key === key);
  if (!target || target.disabled) return false;
  target.click();
  return true;
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || $("dialog[open]")) return;
  const at = event.target, key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (at.id === "find") {
    if (key === "Enter" || key === "Escape") {
      event.preventDefault();
      const first = document.querySelector(".choices .choice:not([hidden]) input");
      at.value = "";
      at.blur();
      if (key === "Enter" && first) choose(first);
      filterClasses("");
    }
    return;
  }
  if (key === "Escape") {
    showTyped("");
    waiting(false);
    form()?.querySelectorAll("[name=true_label]").forEach((radio) => { radio.checked = false; });
    say("");
    return;
  }
  if (isTyping(at)) return;
  if (key === " " && at.closest("button, a, summary, label, input")) return;
  if (key === "?") {
    $("#keys")?.showModal();
  } else if (key === "/" && $("#find")) {
    $("#find").focus();
  } else if (key === "v" && $("#picture")) {
    const views = [...document.querySelectorAll("[data-view]")];
    const now = views.findIndex((b) => b.getAttribute("aria-pressed") === "true");
    setView(views[(now + 1) % views.length].dataset.view);
  } else if (key === "[" || key === "]") {
    setContrast(Number($("#contrast")?.value) + (key === "]" ? 0.3 : -0.3));
  } else if (key === "=") {
    setZoom(zoom + 1);
  } else if (event.repeat) {
    return; // a key held down answers one item, not ten
  } else if ("pfs ".includes(key) && form() && performance.now() - shownAt < TOO_SOON_MS) {
    say("That was too soon after the last answer, and did not count.");
  } else if (key === "p" && form() && !form().querySelector("[name=true_label]:checked")) {
    waiting(true);
  } else if (!labelKey(key) && !press(key)) {
    return;
  }
  event.preventDefault();
});
document.addEventListener("click", (event) => {
  const at = event.target;
  const view = at.closest("[data-view]"), step = at.closest("[data-zoom]");
  if (view) setView(view.dataset.view);
  if (step) setZoom(zoom + Number(step.dataset.zoom));
  if (at.closest("#reset")) { setZoom(0); setContrast(1); }
  if (at.closest("#occlusion-button")) toggleOcclusion();
  if (at.closest("#keys-button")) $("#keys").showModal();
  if (at.matches("[name=true_label]") && event.detail > 0) choose(at);
  if (at.closest('[value="poisoned"]') && form() && !form().querySelector("[name=true_label]:checked")) {
    event.preventDefault();
    waiting(true);
  }
}, true);
document.addEventListener("input", (event) => {
  if (event.target.id === "contrast") setContrast(event.target.value);
  if (event.target.id === "find") filterClasses(event.target.value);
});
document.addEventListener("change", (event) => {
  if (event.target.id === "order") event.target.form.submit();
  if (event.target.id === "advance") {
    document.cookie = `guard_advance=${event.target.checked ? 1 : 0}; path=/; max-age=31536000; samesite=strict`;
    event.target.form.elements.advance.value = event.target.checked ? "1" : "0";
  }
  if (event.target.name === "include") showChosen();
  if (event.target.name === "verdict" && $("#rule")) {
    $("#rule").value = event.target.value === "poisoned" ? "" : "suspect";
  }
  if (event.target.closest("#group-form") && event.target.name !== "include") markDoubts();
});
function showChosen() {
  const chosen = $("#chosen");
  if (chosen) chosen.textContent = document.querySelectorAll("[name=include]:checked").length;
}
// A second opinion that is not sure is not taken for a group unseen: its item is left out, and says why.
function markDoubts() {
  const group = $("#group-form [name=verdict]:checked")?.value, byOpinion = $("#rule").value === "backup";
  document.querySelectorAll(".tile[data-doubt]").forEach((tile) => {
    const box = tile.querySelector("[name=include]"), verdict = tile.querySelector("select").value || group;
    const own = tile.querySelector(".tile-own input").value !== "";
    const applies = byOpinion && !own && (tile.dataset.doubt === "always" || verdict === "poisoned");
    tile.querySelector(".doubt").hidden = !applies;
    if (applies && box.checked) {
      box.checked = false;
      box.dataset.leftOut = "";
    } else if (!applies && "leftOut" in box.dataset) {
      box.checked = true;
      delete box.dataset.leftOut;
    }
  });
  showChosen();
}
// Who goes elsewhere without an answer gives a group's items back at once.
let isSent = false;
document.addEventListener("submit", (event) => { isSent ||= event.target.id === "group-form"; });
addEventListener("pagehide", () => {
  const group = $("#group-form");
  if (!group || isSent) return;
  const leave = group.querySelector("[formaction$='/leave']").formAction, data = new FormData();
  data.append("csrf", group.elements.csrf.value);
  navigator.sendBeacon(leave, data);
});

/* after a part of the page was replaced */
document.addEventListener("htmx:afterSettle", (event) => {
  if (event.target.id !== "work" && !event.detail.elt?.matches?.("#work")) return;
  prepare();
  shownAt = performance.now();
  $("#item-title")?.focus({ preventScroll: true });
});
document.addEventListener("htmx:sendError", () => say("The server does not answer. Your answer was not saved.", true));
document.addEventListener("DOMContentLoaded", prepare);
if (document.readyState !== "loading") prepare();
