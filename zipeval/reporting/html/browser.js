"use strict";

// The browser of questions. Its state is the address: `#questions?lost=visionzip+16&kind=color`, so that every state is
// a link and the back button works. Rows come from the page itself (FileSource) or from `zipeval view` (ServerSource).
// Everything from records is put in as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("browser-data").textContent);
  const ROOT = "#questions";
  const SVG = "http://www.w3.org/2000/svg";
  // What is known of an answer, as bits: zipeval/reporting/html/browser.py has the same.
  const SCORED = 1, FAILS = 2, LOST = 4, GAINED = 8;
  const OUTCOMES = ["lost", "gained", "wrong", "right"];
  const SORTS = ["", "most-fail", "fewest-fail"];
  const PLAIN = ["table", "benchmark", "kind", "method", "budget", "text", "sort"];
  const ANY = "*";
  const TYPING = 200; // milliseconds after a letter until it is searched for

  const byId = (id) => document.getElementById(id);
  const count = (number) => number.toLocaleString("en-US");

  // ---------------------------------------------------------------- elements

  function element(tag, { className = "", text = null, ...attributes } = {}, children = []) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawing(tag, attributes = {}, children = []) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // A text with the places marked at which what is searched for stands.
  function marked(text, wanted) {
    const lower = text.toLowerCase();
    const needle = wanted.startsWith("#") ? "" : wanted.toLowerCase();
    // Some letters have another length in lower case; then the places are not the same.
    if (!needle || lower.length !== text.length) return [text];
    const pieces = [];
    let from = 0;
    for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, from)) {
      pieces.push(text.slice(from, at), element("mark", { text: text.slice(at, at + needle.length) }));
      from = at + needle.length;
    }
    return [...pieces, text.slice(from)];
  }

  // ---------------------------------------------------------------- where questions come from

  // All questions are in the page, in columns; equal texts are there once, in a pool.
  class FileSource {
    constructor(sections) {
      this.all = sections;
    }

    async sections() {
      return this.all;
    }

    section(state) {
      return this.all.find((section) => section.id === state.table) || this.all[0];
    }

    // A value of a column; a column of equal values is a single one.
    value(section, column, row) {
      return section.pool[typeof column === "number" ? column : column[row]];
    }

    flags(benchmark, run, row) {
      return parseInt(benchmark.answers[run].flags[row], 16);
    }

    shownRuns(section, state) {
      return section.runs.flatMap((run, number) => {
        const wanted = (!state.method || state.method === run.label) && (!state.budget || state.budget === run.budget);
        return run.bound || wanted ? [number] : [];
      });
    }

    // The places of the wanted questions, in their order: [benchmark, row, how many runs fail].
    select(section, state) {
      const shown = this.shownRuns(section, state);
      const asked = [ANY, ""].includes(state.run) ? shown : [section.runs.findIndex((run) => run.name === state.run)];
      const places = [];
      for (const benchmark of section.benchmarks) {
        if (state.benchmark && state.benchmark !== benchmark.task) continue;
        const answering = shown.filter((run) => benchmark.answers[run]);
        const judged = asked.filter((run) => benchmark.answers[run]);
        for (let row = 0; row < benchmark.count; row += 1) {
          if (state.kind && this.value(section, benchmark.kind_of, row) !== state.kind) continue;
          if (state.outcome && !judged.some((run) => this.has(this.flags(benchmark, run, row), state.outcome))) continue;
          if (state.text && !this.holds(section, benchmark, row, state.text, answering)) continue;
          const fails = answering.filter((run) => this.flags(benchmark, run, row) & FAILS).length;
          places.push([benchmark, row, fails]);
        }
      }
      if (state.sort) {
        const sign = state.sort === "most-fail" ? -1 : 1;
        places.sort((one, other) => sign * (one[2] - other[2])); // equal ones keep their order
      }
      return { places, shown };
    }

    has(flags, outcome) {
      if (outcome === "right") return (flags & (SCORED | FAILS)) === SCORED;
      return (flags & { lost: LOST, gained: GAINED, wrong: FAILS }[outcome]) > 0;
    }

    holds(section, benchmark, row, text, runs) {
      if (text.startsWith("#")) return this.value(section, benchmark.documents, row) === text.slice(1).trim();
      const wanted = text.toLowerCase();
      const columns = [benchmark.questions, benchmark.targets, ...runs.map((run) => benchmark.answers[run].texts)];
      const texts = columns.map((column) => this.value(section, column, row));
      texts.push(...(this.value(section, benchmark.choices, row) || []));
      return texts.some((candidate) => candidate !== null && candidate.toLowerCase().includes(wanted));
    }

    row(section, benchmark, row, shown) {
      const answers = shown
        .filter((run) => benchmark.answers[run])
        .map((run) => ({
          run,
          text: this.value(section, benchmark.answers[run].texts, row),
          verdict: this.value(section, benchmark.answers[run].verdicts, row),
          flags: this.flags(benchmark, run, row),
        }));
      const image = benchmark.pictures[row] && byId(benchmark.pictures[row]);
      return {
        task: benchmark.task,
        document: this.value(section, benchmark.documents, row),
        question: this.value(section, benchmark.questions, row),
        choices: this.value(section, benchmark.choices, row),
        target: this.value(section, benchmark.targets, row),
        kind: this.value(section, benchmark.kind_of, row),
        picture: image ? image.getAttribute("href") : "",
        answers,
      };
    }

    async rows(state) {
      const section = this.section(state);
      const { places, shown } = this.select(section, state);
      const start = (state.page - 1) * data.page;
      const rows = places
        .slice(start, start + data.page)
        .map(([benchmark, row]) => this.row(section, benchmark, row, shown));
      return { total: places.length, runs: shown, rows };
    }

    async sample(state) {
      const section = this.section(state);
      const [task, document] = state.open;
      const benchmark = section.benchmarks.find((candidate) => candidate.task === task);
      const numbers = benchmark ? [...Array(benchmark.count).keys()] : [];
      const row = numbers.find((number) => this.value(section, benchmark.documents, number) === document);
      if (row === undefined) return { problem: `There is no question ${document} of ${task} here.` };
      const { places, shown } = this.select(section, state);
      const position = places.findIndex((place) => place[0] === benchmark && place[1] === row);
      const tokens = {};
      for (const [run, answers] of Object.entries(benchmark.answers)) {
        tokens[run] = { layers: this.value(section, answers.layers, row), ...answers.tokens[row] };
      }
      const neighbour = (place) => place && [place[0].task, this.value(section, place[0].documents, place[1])];
      const found = this.row(section, benchmark, row, shown);
      return {
        row: found,
        tokens,
        pictured: Boolean(found.picture),
        position,
        total: places.length,
        neighbours: position < 0 ? [null, null] : [neighbour(places[position - 1]), neighbour(places[position + 1])],
      };
    }
  }

  // Questions of `zipeval view`, a page at a time.
  class ServerSource {
    async ask(what, parameters = {}) {
      const address = `/api/${what}?${new URLSearchParams(parameters)}`;
      let response;
      try {
        response = await fetch(address);
      } catch {
        return { problem: "`zipeval view` does not answer any more. Start it again, and reload the page." };
      }
      if (!response.ok) return { problem: await response.text() };
      return response.json();
    }

    parameters(state) {
      const { open, page, ...query } = state;
      return { ...query, page: String(page) };
    }

    pictureOf(state, row) {
      const names = { table: state.table, task: row.task, document: row.document };
      return `/picture?${new URLSearchParams(names)}`;
    }

    async sections() {
      const answer = await this.ask("sections");
      if (answer.problem) throw new Error(answer.problem);
      return answer.sections;
    }

    async rows(state) {
      const answer = await this.ask("rows", this.parameters(state));
      for (const row of answer.rows || []) row.picture = this.pictureOf(state, row);
      return answer;
    }

    async sample(state) {
      const [task, document] = state.open;
      const answer = await this.ask("sample", { ...this.parameters(state), task, document });
      if (answer.row) answer.row.picture = answer.pictured ? this.pictureOf(state, answer.row) : "";
      return answer;
    }
  }

  // ---------------------------------------------------------------- the state and its address

  function parsed(hash) {
    if (hash !== ROOT && !hash.startsWith(`${ROOT}?`)) return null;
    const query = new URLSearchParams(hash.slice(ROOT.length + 1));
    const state = Object.fromEntries(PLAIN.map((name) => [name, query.get(name) || ""]));
    state.outcome = OUTCOMES.find((outcome) => query.has(outcome)) || "";
    state.run = state.outcome ? query.get(state.outcome) || ANY : "";
    state.page = Math.max(1, parseInt(query.get("page"), 10) || 1);
    const open = query.get("open") || "";
    const slash = open.indexOf("/");
    state.open = slash < 0 ? null : [open.slice(0, slash), open.slice(slash + 1)];
    return state;
  }

  function address(state) {
    const query = new URLSearchParams();
    for (const name of PLAIN) if (state[name]) query.set(name, state[name]);
    if (state.outcome) query.set(state.outcome, state.run || ANY);
    if (state.page > 1) query.set("page", state.page);
    if (state.open) query.set("open", state.open.join("/"));
    const text = query.toString();
    return text ? `${ROOT}?${text}` : ROOT;
  }

  // ---------------------------------------------------------------- the page

  const source = data.live ? new ServerSource() : new FileSource(data.sections || []);
  const root = byId("questions");
  const form = byId("filters");
  const tableSelect = root.querySelector("select[name=table]");
  const title = document.title;
  let state = null; // what is shown; null is the scores
  let sections = null;
  let shown = null; // the rows of the list that is shown, and how many there are
  let current = -1; // the row of it that the keyboard is at
  let entering = 0; // where it is to be in the list that comes next
  let latest = 0; // the last question to the source; older answers are not shown any more
  let fromList = false; // whether the entry before this one in the history is the list
  let scoresAt = 0; // how far the scores were scrolled

  function go(next, replace = false) {
    const hash = address(next);
    if (hash === location.hash) return;
    if (replace) {
      history.replaceState(null, "", hash);
      route();
    } else {
      location.hash = hash;
    }
  }

  const changed = (changes) => ({ ...state, page: 1, open: null, ...changes });

  async function route() {
    const next = parsed(location.hash);
    const before = state;
    state = next;
    if (!next) return showScores(before);
    if (!before) scoresAt = window.scrollY;
    document.body.dataset.view = "questions";
    root.hidden = false;
    if (!data.live && !data.sections) return busy(false); // the page says why
    const number = (latest += 1);
    busy(true);
    try {
      sections = sections || (await source.sections());
      if (number === latest) await show(number, before);
    } catch (error) {
      problem(error.message);
    } finally {
      if (number === latest) busy(false);
    }
  }

  async function show(number, before) {
    const section = sections.find((candidate) => candidate.id === state.table) || sections[0];
    const unknown = unknownName(section);
    fillFilters(section);
    if (unknown) return problem(`There is no ${unknown} here. Perhaps the link is of other results.`);
    if (state.open) {
      fromList = before ? (before.open ? fromList : true) : false;
      const sample = await source.sample(state);
      if (number !== latest) return;
      if (sample.problem) return problem(sample.problem);
      showSample(section, sample);
    } else {
      const rows = await source.rows(state);
      if (number !== latest) return;
      if (rows.problem) return problem(rows.problem);
      showList(section, rows, before);
    }
  }

  // The first name of a link that is not in its table.
  function unknownName(section) {
    const known = {
      table: ["", ...sections.map((other) => other.id)],
      benchmark: ["", ...section.benchmarks.map((benchmark) => benchmark.task)],
      run: ["", ANY, ...section.runs.map((run) => run.name)],
      method: ["", ...section.runs.map((run) => run.label)],
      budget: ["", ...section.runs.map((run) => run.budget)],
      sort: SORTS,
    };
    const name = Object.keys(known).find((candidate) => !known[candidate].includes(state[candidate]));
    return name ? `${name} “${state[name]}”` : "";
  }

  function showScores(before) {
    latest += 1;
    delete document.body.dataset.view;
    root.hidden = true;
    document.title = title;
    busy(false);
    if (before && !location.hash.slice(1)) window.scrollTo(0, scoresAt);
    else if (before && byId(location.hash.slice(1))) byId(location.hash.slice(1)).scrollIntoView();
  }

  function busy(is) {
    root.classList.toggle("busy", is);
    root.setAttribute("aria-busy", is);
    if (!is) root.dataset.shown = location.hash; // for whoever waits for it
  }

  function problem(text) {
    byId("question-list").hidden = false;
    byId("sample").hidden = true;
    byId("count").textContent = text;
    byId("rows").tBodies[0].replaceChildren();
    byId("rows").tHead.replaceChildren();
    root.querySelector(".pages").hidden = true;
    byId("clear").hidden = false;
  }

  // ---------------------------------------------------------------- filters

  function fillSelect(select, entries, value) {
    const before = [...select.options].map((option) => `${option.value}\n${option.text}`).join("\n");
    if (before !== entries.map((entry) => entry.join("\n")).join("\n")) {
      select.replaceChildren(...entries.map(([key, text]) => element("option", { value: key, text })));
    }
    select.value = value;
  }

  function unique(values) {
    return [...new Set(values)];
  }

  function fillFilters(section) {
    const of = (name) => form.elements[name];
    const others = section.runs.filter((run) => !run.bound);
    const bound = section.runs.find((run) => run.bound);
    fillSelect(tableSelect, sections.map((each) => [each.id, each.about]), section.id);
    byId("table-choice").hidden = sections.length < 2;
    const againstBound = ["lost", "gained"].includes(state.outcome);
    const runs = (againstBound ? others : section.runs).map((run) => [run.name, run.name]);
    fillSelect(of("run"), [[ANY, "any run shown"], ...runs], state.run || ANY);
    byId("run-choice").hidden = !state.outcome;
    of("outcome").value = state.outcome;
    const benchmarks = section.benchmarks.map((benchmark) => [benchmark.task, benchmark.column]);
    fillSelect(of("benchmark"), [["", "all"], ...benchmarks], state.benchmark);
    const inView = section.benchmarks.filter((benchmark) => !state.benchmark || benchmark.task === state.benchmark);
    const kinds = unique([...inView.flatMap((benchmark) => benchmark.kinds), ...(state.kind ? [state.kind] : [])]);
    fillSelect(of("kind"), [["", "all"], ...kinds.map((kind) => [kind, kind])], state.kind);
    const methods = unique([...others.map((run) => run.label), ...(state.method ? [state.method] : [])]);
    fillSelect(of("method"), [["", "all"], ...methods.map((label) => [label, label])], state.method);
    const budgets = unique([...others.map((run) => run.budget), ...(state.budget ? [state.budget] : [])]);
    fillSelect(of("budget"), [["", "all"], ...budgets.map((budget) => [budget, budgetName(budget, false)])], state.budget);
    of("sort").value = state.sort;
    if (document.activeElement !== of("text")) of("text").value = state.text;
    for (const [name, entries] of [["benchmark", benchmarks], ["kind", kinds], ["method", methods], ["budget", budgets]]) {
      of(name).closest("label").hidden = entries.length < (name === "kind" ? 1 : 2) && !state[name];
    }
    byId("clear").hidden = !PLAIN.some((name) => name !== "table" && state[name]) && !state.outcome;
    root.dataset.bound = bound ? bound.name : "";
  }

  function budgetName(budget, isBound) {
    if (budget === "all") return isBound ? "all tokens" : "no budget";
    return `${budget} tokens`;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    const { name, value } = event.target;
    if (name === "text") return;
    const changes = { [name]: value };
    if (name === "outcome") changes.run = value ? state.run || ANY : "";
    if (name === "benchmark") changes.kind = "";
    const isBound = (run) => run.bound && run.name === changes.run;
    if (["lost", "gained"].includes(value) && sections.some((section) => section.runs.some(isBound))) changes.run = ANY;
    go(changed(changes));
  });
  let typing = 0;
  form.elements.text.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      if (state) go(changed({ text: form.elements.text.value.trim() }), Boolean(state.text)); // one entry for a word
    }, TYPING);
  });
  tableSelect.addEventListener("change", () => {
    const { text, sort } = state;
    go({ ...parsed(ROOT), text, sort, table: tableSelect.value });
  });
  byId("clear").addEventListener("click", () => go({ ...parsed(ROOT), table: state.table }));

  // ---------------------------------------------------------------- the list

  function showList(section, rows, before) {
    shown = { ...rows, page: state.page };
    byId("sample").hidden = true;
    byId("question-list").hidden = false;
    document.title = `Questions - ${title}`;
    byId("count").replaceChildren(...countText(section, rows));
    byId("rows").tHead.replaceChildren(...headings(section, rows.runs));
    const ending = commonEnding(rows.rows);
    byId("rows").tBodies[0].replaceChildren(
      ...rows.rows.map((row, index) => tableRow(section, rows, row, index, ending)),
    );
    byId("rows").classList.toggle("many", rows.runs.length > 5);
    root.classList.toggle("pictured", rows.rows.some((row) => row.picture));
    const pages = Math.ceil(rows.total / data.page);
    root.querySelector(".pages").hidden = pages < 2;
    byId("page-number").textContent = `page ${count(state.page)} of ${count(pages)}`;
    byId("page-before").disabled = state.page <= 1;
    byId("page-after").disabled = state.page >= pages;
    current = -1;
    const left = before && before.open && before.open.join("/");
    const returned = left ? rows.rows.findIndex((row) => `${row.task}/${row.document}` === left) : -1;
    const typed = document.activeElement === form.elements.text;
    if (returned >= 0) choose(returned);
    else if (!typed && entering) choose(entering > 0 ? 0 : rows.rows.length - 1);
    else root.querySelector(".rows").scrollTo(0, 0);
    entering = 0;
  }

  function countText(section, rows) {
    const all = section.benchmarks.reduce((sum, benchmark) => sum + benchmark.count, 0);
    const number = element("strong", { text: count(rows.total) });
    const words = { lost: "lost by", gained: "gained by", wrong: "failed by", right: "not failed by" }[state.outcome];
    const who = state.run === ANY ? "any run shown" : state.run;
    const text = ` of ${count(all)} questions${words ? `, ${words} ${who}` : ""}`;
    const nothing = rows.total ? "" : ". Clear a filter to see more.";
    return [number, text + nothing];
  }

  // Two lines: budgets, and below them the methods.
  function headings(section, runs) {
    const budgets = element("tr");
    const methods = element("tr");
    const fixed = [["picture", "picture"], ["question", "question"], ["target", "target"], ["fails", "fail"]];
    for (const [name, text] of fixed) budgets.append(element("th", { className: name, text, scope: "col", rowspan: 2 }));
    let last = null;
    for (const number of runs) {
      const run = section.runs[number];
      const name = budgetName(run.budget, run.bound);
      if (last && last.textContent === name) last.colSpan += 1;
      else budgets.append((last = element("th", { className: "budget-name", text: name, scope: "colgroup", colspan: 1 })));
      methods.append(element("th", { className: "method", text: run.label, scope: "col" }));
    }
    return [budgets, methods];
  }

  function tableRow(section, rows, row, index, ending) {
    const benchmark = section.benchmarks.find((candidate) => candidate.task === row.task);
    const link = address({ ...state, open: [row.task, row.document] });
    const about = [`${benchmark.column} #${row.document}`, row.kind].filter(Boolean).join(", ");
    const asked = element("a", { className: "asked-text", href: link });
    const question = row.question === null ? `Question ${row.document}` : row.question.slice(0, -ending.length || undefined);
    asked.append(...marked(question, state.text));
    const made = element("tr", { "data-index": index }, [
      element("td", { className: "picture" }, row.picture ? [thumbnail(row.picture)] : []),
      element("th", { className: "question", scope: "row" }, [asked, element("small", { text: about })]),
      element("td", { className: "target" }, [element("bdi", { className: "clamped" }, marked(row.target, state.text))]),
    ]);
    const scored = row.answers.filter((answer) => answer.flags & SCORED).length;
    const failing = row.answers.filter((answer) => answer.flags & FAILS).length;
    made.append(element("td", { className: "fails", text: `${failing} of ${scored}` }));
    for (const number of rows.runs) {
      const answer = row.answers.find((candidate) => candidate.run === number);
      made.append(answer ? answerCell(section.runs[number], answer) : element("td", { className: "answer", text: "-" }));
    }
    made.addEventListener("click", (event) => {
      const selecting = String(window.getSelection());
      if (!selecting && !event.target.closest("a")) location.hash = link;
    });
    return made;
  }

  function thumbnail(picture) {
    const image = element("img", { src: picture, alt: "", decoding: "async", width: 56, height: 56 });
    image.addEventListener("load", () => {
      if (image.naturalWidth > 1) return;
      image.remove(); // the server's sign for a picture that it does not have
      root.classList.toggle("pictured", Boolean(byId("rows").querySelector("img")));
    });
    return image;
  }

  // The last lines that all questions of a page have, such as how to answer: the list leaves them out.
  function commonEnding(rows) {
    const texts = rows.map((row) => row.question || "");
    if (texts.length < 2) return "";
    const lines = texts[0].split("\n");
    for (let first = 1; first < lines.length; first += 1) {
      const ending = `\n${lines.slice(first).join("\n")}`;
      if (texts.every((text) => text.endsWith(ending) && text.length > ending.length)) return ending;
    }
    return "";
  }

  function answerCell(run, answer) {
    const text = element("bdi", {}, marked(answer.text || "(nothing)", state.text));
    const attributes = { className: `answer ${outcomeClass(answer)}`, "data-run": run.name };
    return element("td", attributes, [element("div", { className: "clamped" }, [verdict(answer), text])]);
  }

  function outcomeClass(answer) {
    if (answer.flags & LOST) return "lost";
    return answer.flags & GAINED ? "gained" : "";
  }

  function plainOutcome(answer) {
    if (answer.flags & FAILS) return "wrong";
    return answer.flags & SCORED ? "right" : "none";
  }

  // A sign for the eye, and the same in words.
  function verdict(answer) {
    const flip = outcomeClass(answer);
    const plain = plainOutcome(answer);
    const isWord = ["right", "wrong"].includes(answer.verdict);
    const children = [];
    // A grade is neither right nor wrong: only better or worse than that of the upper bound.
    if (isWord || plain === "none") children.push(element("span", { className: `mark ${plain}`, "aria-hidden": "true" }));
    if (flip) children.push(element("span", { className: `flip ${flip}`, "aria-hidden": "true" }));
    const words = flip ? `${answer.verdict}, ${flip}` : answer.verdict;
    if (!isWord) children.push(element("small", { text: answer.verdict }));
    children.push(element("span", { className: "unseen", text: isWord ? `${words}: ` : `, ${flip}: ` }));
    return element("span", { className: "verdicts", title: words }, children);
  }

  function choose(index) {
    const rows = [...byId("rows").tBodies[0].rows];
    if (!rows[index]) return;
    if (rows[current]) rows[current].removeAttribute("aria-current");
    current = index;
    rows[index].setAttribute("aria-current", "true");
    rows[index].querySelector("a").focus({ preventScroll: true });
    rows[index].scrollIntoView({ block: "nearest" });
  }

  function turn(step) {
    const pages = Math.ceil(shown.total / data.page);
    const page = state.page + step;
    if (page >= 1 && page <= pages) go({ ...state, page });
  }

  function step(by) {
    const next = current + by;
    if (next >= 0 && next < shown.rows.length) return choose(next);
    if (current < 0) return choose(by > 0 ? 0 : shown.rows.length - 1);
    entering = by;
    turn(by);
  }

  byId("page-before").addEventListener("click", () => turn(-1));
  byId("page-after").addEventListener("click", () => turn(1));
  byId("rows").addEventListener("focusin", (event) => {
    const row = event.target.closest("tr[data-index]");
    if (row && Number(row.dataset.index) !== current) choose(Number(row.dataset.index));
  });

  // ---------------------------------------------------------------- one question

  let neighbours = [null, null];

  function showSample(section, sample) {
    const { row, tokens } = sample;
    const benchmark = section.benchmarks.find((candidate) => candidate.task === row.task);
    neighbours = sample.neighbours;
    byId("question-list").hidden = true;
    byId("sample").hidden = false;
    const name = `${benchmark.column} #${row.document}`;
    document.title = `${name} - ${title}`;
    byId("sample-title").textContent = [name, row.kind].filter(Boolean).join(", ");
    byId("sample-question").textContent = row.question === null ? "(records of this age do not hold it)" : row.question;
    // Most prompts list the choices themselves.
    const isListed = (choice) => row.question !== null && row.question.includes(choice);
    byId("sample-choices-part").hidden = !row.choices || row.choices.every(isListed);
    byId("sample-choices").replaceChildren(...(row.choices || []).map((text) => element("li", { text })));
    byId("sample-target").textContent = row.target;
    const place = sample.position < 0 ? "" : `${count(sample.position + 1)} of ${count(sample.total)}`;
    byId("sample-place").textContent = place;
    byId("sample-before").disabled = !neighbours[0];
    byId("sample-after").disabled = !neighbours[1];
    const picture = row.picture ? [element("img", { src: row.picture, alt: "what the question is about" })] : [];
    byId("sample-picture").replaceChildren(...picture);
    const most = Math.max(1, ...Object.values(tokens).flatMap((of) => of.layers));
    const groups = new Map();
    for (const answer of row.answers) {
      const run = section.runs[answer.run];
      const heading = budgetName(run.budget, run.bound);
      if (!groups.has(heading)) groups.set(heading, []);
      groups.get(heading).push(card(run, answer, tokens[answer.run] || { layers: [] }, benchmark, row.picture, most));
    }
    byId("sample-runs").replaceChildren(
      ...[...groups].map(([heading, cards]) =>
        element("div", { className: "budget" }, [
          element("h3", { text: heading }),
          element("div", { className: "cards" }, cards),
        ]),
      ),
    );
    byId("sample-note").textContent = note(row, tokens, sample.pictured);
    shownPosition = sample.position;
    byId("sample").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }

  let shownPosition = -1;

  function note(row, tokens, pictured) {
    const traced = Object.values(tokens).some((of) => of.kept !== undefined);
    const sentences = [];
    if (traced) {
      sentences.push(
        "Bright is what is kept as itself up to the decoder's last layer, dim what is dropped or merged away; an outline " +
          "is where a merged token stands. Of several crops or frames the first is shown; counts are of all.",
      );
    }
    if (!pictured && data.live) sentences.push("The picture is not on this machine.");
    if (!pictured && !data.live) {
      sentences.push("This file holds the pictures and the kept tokens of a benchmark's first questions.");
      sentences.push(`${root.dataset.command} shows those of all questions.`);
    }
    return sentences.join(" ");
  }

  function card(run, answer, tokens, benchmark, picture, most) {
    const caption = element("figcaption", {}, [element("b", { text: run.label })]);
    const traced = tokens.kept !== undefined;
    if (traced) {
      const merged = tokens.merged_count ? ` + ${count(tokens.merged_count)} merged` : "";
      caption.append(element("small", { className: "kept-count", text: `${count(tokens.kept_count)} kept${merged}` }));
    }
    caption.append(element("bdi", { className: "said", text: answer.text || "(nothing)" }), verdictBadge(answer));
    if (tokens.layers.length) caption.append(layerChart(tokens.layers, most), element("small", { className: "layers", text: layerText(tokens.layers) }));
    const children = picture || traced ? [overlay(run, tokens, benchmark, picture), caption] : [caption];
    return element("figure", { className: `card ${outcomeClass(answer)}`, "data-run": run.name }, children);
  }

  function verdictBadge(answer) {
    const flip = outcomeClass(answer);
    const badges = [element("span", { className: `verdict ${plainOutcome(answer)}`, text: answer.verdict })];
    if (flip) badges.push(" ", element("span", { className: `verdict flipped ${flip}`, text: flip }));
    return element("span", { className: "badges" }, badges);
  }

  // The picture under what a method keeps of it, in units of a token.
  function overlay(run, tokens, benchmark, picture) {
    const side = benchmark.side;
    const counts = tokens.kept === undefined ? "" : `: ${tokens.kept_count} tokens kept, ${tokens.merged_count} merged`;
    const attributes = { viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": run.name + counts };
    const square = { width: side, height: side };
    const parts = [drawing("rect", { ...square, class: picture ? "blank" : "blank alone" })];
    if (picture) parts.push(drawing("image", { ...square, href: picture, preserveAspectRatio: benchmark.fit }));
    if (tokens.kept !== undefined) {
      const kept = positions(tokens.kept, side);
      const merged = positions(tokens.merged, side);
      parts.push(drawing("path", { class: "dropped", d: covering(side, (place) => !kept.has(place) && !merged.has(place)) }));
      parts.push(drawing("path", { class: "merged", d: outlining(merged, side) }));
    }
    return drawing("svg", attributes, parts);
  }

  // The positions in a number in hexadecimal: bit i is set where i is one.
  function positions(text, side) {
    const found = new Set();
    for (let place = 0; place < side * side; place += 1) {
      const digit = text[text.length - 1 - (place >> 2)];
      if (digit && (parseInt(digit, 16) >> (place & 3)) & 1) found.add(place);
    }
    return found;
  }

  // The squares of a grid that are covered, neighbours of a row in one piece.
  function covering(side, isCovered) {
    let path = "";
    for (let row = 0; row < side; row += 1) {
      for (let column = 0; column < side; column += 1) {
        const start = column;
        while (column < side && isCovered(row * side + column)) column += 1;
        if (column > start) path += `M${start} ${row}h${column - start}v1h-${column - start}z`;
      }
    }
    return path;
  }

  function outlining(places, side) {
    return [...places].map((place) => `M${(place % side) + 0.1} ${Math.floor(place / side) + 0.1}h.8v.8h-.8z`).join("");
  }

  // Layers with the same number of visual tokens, in words.
  function layerText(layers) {
    const pieces = [];
    for (let first = 0; first < layers.length; ) {
      let last = first;
      while (last + 1 < layers.length && layers[last + 1] === layers[first]) last += 1;
      const which = first === last ? `layer ${first + 1}` : `layers ${first + 1}-${last + 1}`;
      pieces.push(`${which}: ${count(layers[first])}`);
      first = last + 1;
    }
    return `Visual tokens in ${pieces.join(", ")}`;
  }

  function layerChart(layers, most) {
    const height = 20;
    const level = (tokens) => height - (height * tokens) / most;
    const line = layers.map((tokens, layer) => `${layer ? "V" : `M0 ${height}V`}${level(tokens).toFixed(2)}H${layer + 1}`);
    const attributes = { viewBox: `0 0 ${layers.length} ${height}`, class: "layer-chart", preserveAspectRatio: "none" };
    return drawing("svg", { ...attributes, "aria-hidden": "true" }, [drawing("path", { d: `${line.join("")}V${height}z` })]);
  }

  function openNeighbour(side) {
    const place = neighbours[side];
    if (!place) return;
    const position = shownPosition + (side ? 1 : -1);
    go({ ...state, open: place, page: Math.floor(position / data.page) + 1 }, true);
  }

  function closeSample() {
    // The list that it was opened from is the entry before, unless another page of it was reached meanwhile.
    const page = shownPosition < 0 ? 1 : Math.floor(shownPosition / data.page) + 1;
    if (fromList && shown && state.page === page && shown.page === page) history.back();
    else go({ ...state, open: null, page }, fromList);
  }

  byId("sample-before").addEventListener("click", () => openNeighbour(0));
  byId("sample-after").addEventListener("click", () => openNeighbour(1));
  byId("sample-close").addEventListener("click", closeSample);

  // ---------------------------------------------------------------- keyboard

  const KEYS_OF_LIST = {
    j: () => step(1),
    k: () => step(-1),
    Enter: () => current >= 0 && byId("rows").tBodies[0].rows[current].querySelector("a").click(),
    Escape: () => (location.hash = ""),
    "/": () => form.elements.text.select(),
  };
  const KEYS_OF_SAMPLE = {
    j: () => openNeighbour(1),
    k: () => openNeighbour(0),
    Escape: closeSample,
    "/": () => {
      closeSample();
      setTimeout(() => form.elements.text.select(), TYPING);
    },
  };

  document.addEventListener("keydown", (event) => {
    if (!state || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) {
      if (event.key === "Escape" || (event.key === "Enter" && event.target.name === "text")) {
        event.preventDefault();
        event.target.blur();
        if (event.key === "Enter" && shown) choose(0);
      }
      return;
    }
    if (event.key === "Enter" && event.target.closest("a, button, summary")) return; // it is its own
    const keys = byId("sample").hidden ? KEYS_OF_LIST : KEYS_OF_SAMPLE;
    if (!Object.hasOwn(keys, event.key) || (byId("sample").hidden && !shown && event.key !== "Escape")) return;
    event.preventDefault();
    keys[event.key]();
  });

  window.addEventListener("hashchange", route);
  route();
})();
