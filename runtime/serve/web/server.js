// What the page asks the server for. The API key lives in this module's memory and nowhere else.

let key = null;
let askForKey = async () => null;

/** Says who asks the user for a key: an async function of whether one was wrong, which gives another, or null. */
export function onKeyWanted(asking) {
  askForKey = asking;
}

/** A response of status 200; asks for the key where the server wants one. Throws what the server says otherwise. */
async function request(path, body, signal) {
  for (;;) {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    const used = key;
    if (used !== null) headers.Authorization = `Bearer ${used}`;
    const method = body === undefined ? "GET" : "POST";
    let response;
    try {
      response = await fetch(path, { method, headers, body: JSON.stringify(body), signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached.");
    }
    if (response.ok) return response;
    const said = await response.json().then((answer) => answer.error?.message, () => null);
    if (response.status !== 401) throw new Error(said ?? `The server answered with status ${response.status}.`);
    if (key === used) {
      const given = await askForKey(used !== null);
      if (given === null) throw new Error(said ?? "The server wants its API key.");
      key = given;
    }
  }
}

async function json(path, body, signal) {
  return (await request(path, body, signal)).json();
}

export const facts = () => json("inspect");

/** The ids of a text, or of a conversation that it begins: [{id, text}]. */
export async function tokenize(text, isChat, signal) {
  const what = isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const said = await json("tokenize", { ...what, return_token_strs: true }, signal);
  return said.tokens.map((id, at) => ({ id, text: said.token_strs[at] }));
}

export async function textOf(id, signal) {
  return (await json("detokenize", { tokens: [id] }, signal)).prompt;
}

export const attention = (tokens, layer, head, signal) => json("inspect/attention", { tokens, layer, head }, signal);

/** What follows ids, a token at a time as it comes: {id, text, logprob, candidates}. */
export async function* stream(ids, options, signal) {
  const body = { ...asked(ids, options.candidates), ...options, stream: true };
  delete body.candidates;
  for await (const event of events(await request("v1/completions", body, signal))) {
    const { logprobs, token_ids: tokens } = event.choices[0];
    if (tokens.length) yield { id: tokens[0], text: logprobs.tokens[0], ...likelihood(logprobs, 0) };
  }
}

/** How likely each of a prompt's tokens was, of which the first follows nothing: [{logprob, candidates}]. */
export async function ofPrompt(ids, candidates, signal) {
  const body = { ...asked(ids, candidates), max_tokens: 0, echo: true };
  const { logprobs } = (await json("v1/completions", body, signal)).choices[0];
  return ids.map((_, at) => likelihood(logprobs, at));
}

function asked(ids, candidates) {
  return { prompt: ids, logprobs: candidates, return_token_ids: true, skip_special_tokens: false };
}

/** From the columns of the API: the token's log probability, and the candidates, the likeliest first. */
function likelihood(logprobs, at) {
  const ids = logprobs.top_token_ids[at] ?? {};
  const candidates = Object.entries(logprobs.top_logprobs[at] ?? {}).map(([text, logprob]) => ({ id: ids[text], text, logprob }));
  candidates.sort((one, other) => other.logprob - one.logprob || one.id - other.id); // as greedy decoding breaks ties
  return { logprob: logprobs.token_logprobs[at], candidates };
}

/** The objects of server-sent events, to the last. Throws an error that the server sends among them. */
async function* events(response) {
  const decoder = new TextDecoder();
  let unread = "";
  for (const reader = response.body.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server has closed the connection.");
    unread += decoder.decode(value, { stream: true });
    const lines = unread.split("\n");
    unread = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
