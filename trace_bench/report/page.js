// The browser of samples. All texts are data of a run: they reach the page through textContent only.
"use strict";
(() => {
  const PAGE = 20;
  const byId = (id) => document.getElementById(id);
  const fold = byId("fold");
  if (!fold) return;
  const data = JSON.parse(byId("data").textContent);
  const [task, before, after, change, search] = ["task", "before", "after", "change", "search"].map(byId);
  // A row as it is embedded: number of the task, name, prompt, target, different texts, [stage, text, score, verdict].
  const rows = data.rows.map(([t, name, prompt, target, texts, answers]) => ({
    t, name, prompt, target, texts, answers: new Map(answers.map(([stage, ...rest]) => [stage, rest])), plain: null,
  }));
  let found = [];
  let page = 0;

  function option(select, value, text) {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    select.append(made);
  }

  function element(parent, tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    parent.append(made);
    return made;
  }

  // The stage that is chosen, for a row: its task's own one differs from task to task.
  const stageOf = (select, row) => (select.value === "own" ? data.own[row.t] : Number(select.value));

  function answer(row, stage) {
    const [place, score, verdict] = row.answers.get(stage);
    return { text: row.texts[place], score, verdict };
  }

  // Of a metric with a unit of its own, four digits that count.
  const shown = (factor, score) => (factor === 100 ? (100 * score).toFixed(1) : String(Number(score.toPrecision(4))));

  // What became of an answer: [group of the filter, words, direction], or null where a stage has no answer.
  function compare(row) {
    const [one, two] = [stageOf(before, row), stageOf(after, row)];
    if (one === two || !row.answers.has(one) || !row.answers.has(two)) return null;
    const [a, b] = [answer(row, one), answer(row, two)];
    if (one === 0 && b.verdict === "lose") return ["worse", "judged worse", "worse"];
    if (one === 0 && b.verdict === "win") return ["better", "judged better", "better"];
    if (a.score !== null && b.score !== null) {
      if (data.binary[row.t]) {
        if (a.score > b.score) return ["lost", "right to wrong", "worse"];
        if (a.score < b.score) return ["won", "wrong to right", "better"];
        const kept = a.score === 1 ? "right at both" : "wrong at both";
        return a.text === b.text ? ["same", kept, ""] : ["other", kept, ""];
      }
      const [factor, sign, unit] = data.units[row.t];
      const gain = sign * (b.score - a.score);
      const words = `${gain > 0 ? "+" : ""}${shown(factor, gain)} ${unit}`;
      if (gain < 0) return ["worse", words, "worse"];
      if (gain > 0) return ["better", words, "better"];
    }
    return a.text === b.text ? ["same", "the same answer", ""] : ["other", "another answer", ""];
  }

  // Whether a score is so much lower that the row counts as lost; of right and wrong each fall is.
  const fell = (row, a, b) => a.score !== null && b.score !== null &&
    data.units[row.t][1] * (b.score - a.score) < -data.enough[row.t] - 1e-9;

  // What became of a row since the first stage: lost at the second and not before, or lost in between and back.
  function history(row) {
    const [one, two] = [stageOf(before, row), stageOf(after, row)];
    const start = answer(row, one);
    const between = [...row.answers.keys()].some((stage) => one < stage && stage < two &&
      fell(row, start, answer(row, stage)));
    const lost = fell(row, start, answer(row, two));
    return lost && !between ? "first" : !lost && between ? "back" : "";
  }

  function plain(row) {
    row.plain ??= [row.name, row.prompt, row.target, ...row.texts].join("\n").toLowerCase();
    return row.plain;
  }

  function matches(row, text) {
    if (task.value !== "all" && row.t !== Number(task.value)) return false;
    const result = compare(row);
    if (!result) return false;
    const [group, , direction] = result;
    const wanted = change.value;
    const fits = wanted === "all" || wanted === history(row) || wanted === group || wanted === direction ||
      (wanted === "other" && answer(row, stageOf(before, row)).text !== answer(row, stageOf(after, row)).text);
    return fits && plain(row).includes(text);
  }

  function box(parent, title, text, className) {
    const made = element(parent, "div", undefined, className);
    element(made, "h4", title);
    const content = element(made, "pre", text || "(empty)", text ? "" : "empty");
    content.tabIndex = 0;
  }

  function scored(row, stage) {
    const { score } = answer(row, stage);
    const name = `stage ${data.stages[stage]}`;
    if (score === null) return name;
    return `${name}: ${data.binary[row.t] ? (score === 1 ? "right" : "wrong") : shown(data.units[row.t][0], score)}`;
  }

  function card(row) {
    const made = document.createElement("article");
    made.className = "sample";
    const [, words, direction] = compare(row);
    const head = element(made, "h3");
    element(head, "span", `${data.tasks[row.t]} · ${row.name}`);
    element(head, "span", words, `change ${direction}`);
    const texts = element(made, "div", undefined, "texts");
    if (row.prompt) box(texts, "prompt", row.prompt, "whole");
    if (row.target) box(texts, "target", row.target, "whole");
    for (const select of [before, after]) {
      const stage = stageOf(select, row);
      box(texts, scored(row, stage), answer(row, stage).text, "");
    }
    return made;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    byId("list").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    byId("count").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} prompts`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("paging").hidden = pages === 1;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }

  function filter() {
    const text = search.value.trim().toLowerCase();
    const order = { worse: 0, better: 1 };
    const place = (row) => order[compare(row)[2]] ?? (compare(row)[0] === "other" ? 2 : 3);
    // What changed comes first; the places are counted once a row, since a comparison looks texts up.
    found = rows.filter((row) => matches(row, text)).map((row) => [place(row), row]).sort((a, b) => a[0] - b[0])
      .map(([, row]) => row);
    page = 0;
    show();
  }

  function turn(pages) {
    page += pages;
    show();
    byId("count").scrollIntoView();
  }

  option(task, "all", "all tasks");
  const present = new Set(rows.map((row) => row.t));
  data.tasks.forEach((name, t) => present.has(t) && option(task, t, name));
  const stages = [...new Set(rows.flatMap((row) => [...row.answers.keys()]))].sort((a, b) => a - b);
  const hasOwn = data.own.some((stage) => stage > 0);
  for (const stage of stages) {
    option(before, stage, data.stages[stage]);
    option(after, stage, data.stages[stage]);
    if (stage === 0 && hasOwn) option(before, "own", "own stage");
  }
  if (hasOwn) option(after, "own", "own stage");
  after.value = String(stages[stages.length - 1]);

  // The samples are folded until a link leads to them. One to a group of rows says in its address what to show:
  // #task=...&before=...&after=...&show=...
  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const place = data.names.indexOf(wanted.get("task"));
    if (place >= 0 || location.hash === "#samples") fold.open = true;
    if (place < 0) return;
    for (const [select, value] of [[task, place], [before, wanted.get("before")], [after, wanted.get("after")],
      [change, wanted.get("show")]]) select.value = String(value);
    search.value = "";
    filter();
    byId("samples").scrollIntoView();
  }
  window.addEventListener("hashchange", follow);

  let timer;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filter, 150);
  });
  for (const select of [task, before, after, change]) select.addEventListener("change", filter);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  fold.hidden = false;
  filter();
  follow();
})();

// Tables whose rows are sorted by a click on a head: by numbers where a cell begins with one, dashes last.
(() => {
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, ""));
    return { text, number, empty: text === "" || text === "\u2013" };
  };

  function sort(table, column, sign) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, place) => [value(row, column), place, row]);
    rows.sort(([a, i], [b, j]) => {
      if (a.empty || b.empty) return a.empty - b.empty || i - j;
      const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
      const order = numbers ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
      return sign * order || i - j;
    });
    body.append(...rows.map(([, , row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        // Numbers begin with the largest, texts with the first.
        const text = column === 0 || head.classList.contains("text");
        const now = head.getAttribute("aria-sort");
        const down = now ? now === "ascending" : !text;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(table, column, down ? -1 : 1);
      });
    });
  }
})();
