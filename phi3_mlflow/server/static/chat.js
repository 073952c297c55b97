"use strict";
// Answers are Markdown. What a model writes is never trusted: HTML in it is shown as text, the tags
// that Markdown makes pass DOMPurify, and the page's policy runs nothing but the server's own files.
const at = (id) => document.getElementById(id);
const messages = [];
let running = null;
let last = null; // the exchange shown last: what was asked, its articles, whether it is in messages

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre",
    "blockquote", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "a",
  ],
  ALLOWED_ATTR: ["href", "align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const SPELLED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"};
const escaped = (text) => text.replace(/[&<>"']/g, (letter) => SPELLED[letter]);

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({text}) => escaped(text),
    image: ({text, href}) => escaped(text || href),
    checkbox: ({checked}) => (checked ? "\u2611 " : "\u2610 "),
  },
});

function plain(text) {
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  return paragraph;
}

function rendered(text) {
  let html;
  try { html = marked.parse(text); }
  catch { return plain(text); } // nested deeper than anybody reads
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  return fragment;
}

function headers() {
  const key = at("key").value.trim();
  return key ? {Authorization: "Bearer " + key} : {};
}

function showVersion(version) {
  if (version) at("version").textContent = "version " + version;
}

function add(role, text) {
  at("empty").hidden = true;
  const article = document.createElement("article");
  article.className = role;
  const who = document.createElement("h2");
  who.textContent = {user: "You", assistant: "Model", wrong: "Error"}[role];
  const said = document.createElement("div");
  said.className = "said";
  if (text) said.append(plain(text));
  article.append(who, said);
  at("talk").append(article);
  at("talk").scrollTop = at("talk").scrollHeight;
  if (last) last.articles.push(article);
  return {article, said};
}

function following() {
  const talk = at("talk");
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
}

function keepingUp(change) {
  const low = following();
  change();
  if (low) at("talk").scrollTop = at("talk").scrollHeight;
}

async function failure(response) {
  if (response.status === 401) { at("keyed").hidden = false; at("key").focus(); }
  try { return (await response.json()).error.message; }
  catch { return "The server answered with status " + response.status + "."; }
}

async function who() {
  try {
    const response = await fetch("v1/models", {headers: headers()});
    if (!response.ok) { at("figures").textContent = await failure(response); return; }
    const model = (await response.json()).data[0];
    at("name").textContent = document.title = model.id;
    showVersion(model.version);
    at("figures").textContent = "";
  } catch { at("figures").textContent = "The server does not answer."; }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const found = (rest + value).split("\n\n");
    rest = found.pop();
    for (const event of found) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
    }
  }
}

function request() {
  const system = at("system").value.trim();
  const body = {
    messages: system ? [{role: "system", content: system}, ...messages] : messages,
    stream: true,
    stream_options: {include_usage: true},
  };
  const temperature = at("temperature").value;
  if (temperature !== "") body.temperature = Number(temperature);
  return body;
}

// Markdown is rendered anew as text comes, but not for each piece of it.
function painter(said) {
  const pause = 60; // milliseconds
  let text = "", due = null;
  const paint = () => {
    clearTimeout(due);
    due = null;
    keepingUp(() => said.replaceChildren(rendered(text)));
  };
  return {
    show(now) { text = now; due ??= setTimeout(paint, pause); },
    finish() { if (due !== null) paint(); },
  };
}

function below(article, note) {
  const line = document.createElement("div");
  line.className = "below";
  if (note) {
    const small = document.createElement("small");
    small.textContent = note;
    line.append(small);
  }
  const again = document.createElement("button");
  again.type = "button";
  again.className = "plain retry";
  again.textContent = "Retry";
  again.addEventListener("click", retry);
  for (const earlier of document.querySelectorAll("button.retry")) earlier.remove();
  line.append(again);
  keepingUp(() => article.append(line));
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
}

async function ask(text) {
  const exchange = last = {text, articles: [], answered: false};
  const question = {role: "user", content: text};
  messages.push(question);
  add("user", text);
  const {article, said} = add("assistant", "");
  const paper = painter(said);
  const mine = running = new AbortController();
  busy(true);
  at("figures").textContent = "waiting ...";
  const began = performance.now();
  let first = 0, answer = "", end = "", note = "", version = "";
  let shown = article;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: {"Content-Type": "application/json", ...headers()},
      body: JSON.stringify(request()),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    version = response.headers.get("x-model-version");
    showVersion(version);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const piece = choice?.delta.content || "";
      if (piece && !first) {
        first = performance.now();
        at("figures").textContent = "";
      }
      if (piece) paper.show(answer += piece);
      if (choice?.finish_reason === "length") end = " · cut at its limit";
      if (event.usage) {
        const tokens = event.usage.completion_tokens;
        const seconds = (performance.now() - first) / 1000;
        const rate = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–";
        note = `version ${version} · ${tokens} tokens · ${rate} tokens/s · first after ` +
          `${((first - began) / 1000).toFixed(2)} s${end}`;
        at("figures").textContent = `${rate} tokens/s`;
      }
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (exchange === last) at("figures").textContent = stopped ? "stopped" : "";
    note = stopped ? "stopped" : "";
    if (exchange === last && !stopped) shown = add("wrong", error.message).article;
    if (!answer && !stopped) article.remove();
  }
  paper.finish();
  if (exchange === last) {
    exchange.answered = Boolean(answer);
    if (answer) messages.push({role: "assistant", content: answer});
    else messages.splice(messages.indexOf(question), 1);
    below(shown, note);
  }
  if (running === mine) {
    running = null;
    busy(false);
    at("text").focus();
  }
}

function retry() {
  if (running || !last) return;
  const {text, articles, answered} = last;
  for (const article of articles) article.remove();
  if (answered) messages.length -= 2;
  ask(text);
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running) return;
  at("text").value = "";
  ask(text);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running && running.abort());
at("fresh").addEventListener("click", () => {
  last = null;
  if (running) running.abort();
  messages.length = 0;
  at("talk").replaceChildren(at("empty"));
  at("empty").hidden = false;
  at("figures").textContent = "";
  at("text").focus();
});
at("key").addEventListener("change", who);
who();
