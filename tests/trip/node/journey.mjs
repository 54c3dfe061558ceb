// The official Node SDK, unchanged, through every operation; asks for a kill by saying KILL.
// Usage: node journey.mjs http://127.0.0.1:8000 openai
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const [base, upstream] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused" });
const model = (script) => `${upstream}:${script}`;
const messages = [{ role: "user", content: "Hello?" }];
const words = (count) => Array.from({ length: count }, (_, n) => `w${n} `).join("");
const schema = {
  type: "object",
  properties: { path: { type: "string" } },
  required: ["path"],
  additionalProperties: false,
};
const weather = { name: "weather", parameters: { type: "object", properties: {} } };

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

async function models() {
  const ids = (await all(client.models.list())).map((each) => each.id);
  assert(ids.includes("openai:gpt-5-mini") && ids.includes("anthropic:claude-haiku-4-5"));
  assert.equal((await client.models.retrieve("openai:gpt-5-mini")).owned_by, "openai");
}

async function chats() {
  const asked = { model: model("ok-t4"), messages, metadata: { from: `node ${upstream}` } };
  const made = await client.chat.completions.create(asked);
  assert.equal(made.choices[0].message.content, words(4));
  assert("cost_usd" in made.usage);
  assert.deepEqual(await client.chat.completions.retrieve(made.id), made);
  const listed = await all(client.chat.completions.list({ metadata: asked.metadata }));
  assert.deepEqual(listed.map((each) => each.id), [made.id]);
  assert.equal((await all(client.chat.completions.messages.list(made.id))).length, 1);
  await client.chat.completions.update(made.id, { metadata: {} });
  assert((await client.chat.completions.delete(made.id)).deleted);
  await assert.rejects(client.chat.completions.retrieve(made.id), OpenAI.NotFoundError);

  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await client.chat.completions.create({ ...asked, ...options }));
  assert.equal(chunks.map((each) => each.choices[0]?.delta.content ?? "").join(""), words(4));
  assert.equal(chunks.at(-1).usage.completion_tokens, 4);
  const helped = client.chat.completions.stream({ model: model("ok-t6"), messages });
  assert.equal(await helped.finalContent(), words(6));

  const tools = [{ type: "function", function: weather }];
  const called = await client.chat.completions
    .stream({ model: model("tools"), messages, tools })
    .finalChatCompletion();
  assert.equal(called.choices[0].message.tool_calls[0].function.arguments, '{"q": "w0"}');
  const format = { type: "json_schema", json_schema: { name: "seen", schema, strict: true } };
  const parsed = await client.chat.completions.create({
    model: model("echo"), messages, response_format: format,
  });
  assert(JSON.parse(parsed.choices[0].message.content).path.startsWith("/v1/"));

  const refused = client.chat.completions.create({ ...asked, n: 2 });
  await assert.rejects(refused, (error) => error.status === 400 && error.param === "n");
  const failed = client.chat.completions.create({ model: model("context"), messages });
  await assert.rejects(failed, (error) => error.code === "context_length_exceeded");
}

async function responses() {
  const made = await client.responses.create({ model: model("ok-t4"), input: "one" });
  assert.equal(made.output_text, words(4));
  const again = await client.responses.retrieve(made.id);
  assert.deepEqual(again.output, made.output);
  assert.equal((await all(client.responses.inputItems.list(made.id))).length, 1);
  const next = await client.responses.create({
    model: model("echo"), input: "two", previous_response_id: made.id,
  });
  assert.equal(JSON.parse(next.output_text).body.messages.length, 3);

  const asked = { model: model("reasoning-t8-d5"), input: "one", stream: true };
  const live = await all(await client.responses.create(asked));
  assert.deepEqual(live.map((each) => each.sequence_number), [...live.keys()]);
  const { id } = live[0].response;
  const resumed = await client.responses.retrieve(id, { stream: true, starting_after: 4 });
  assert.deepEqual(await all(resumed), live.slice(5));
  const helped = await client.responses.stream({ model: model("ok-t6"), input: "one" });
  assert.equal((await helped.finalResponse()).output_text, words(6));
  const replayed = client.responses.stream({ response_id: id, starting_after: 4 });
  assert.equal((await replayed.finalResponse()).id, id);

  const tools = [{ type: "function", ...weather, strict: false }];
  const called = client.responses.stream({ model: model("tools"), input: "one", tools });
  const [call] = (await called.finalResponse()).output;
  assert.deepEqual([call.type, call.arguments], ["function_call", '{"q": "w0"}']);
  const format = { type: "json_schema", name: "seen", schema, strict: true };
  const parsed = await client.responses.parse({
    model: model("echo"), input: "one", text: { format },
  });
  assert(parsed.output_parsed.path.startsWith("/v1/"));

  const running = await client.responses.create({
    model: model("ok-t200-d50"), input: "one", background: true,
  });
  assert.equal((await client.responses.cancel(running.id)).status, "cancelled");
  await client.responses.delete(running.id);
  await assert.rejects(client.responses.retrieve(running.id), OpenAI.NotFoundError);
}

async function batches() {
  const line = (script, id) => ({
    custom_id: id,
    method: "POST",
    url: "/v1/chat/completions",
    body: { model: model(script), messages },
  });
  const lines = [line("ok-t4", "a"), line("status-400", "b"), line("ok-t2", "c")];
  const content = lines.map((each) => JSON.stringify(each)).join("\n");
  const file = await client.files.create({
    file: await toFile(Buffer.from(content), "in.jsonl"),
    purpose: "batch",
    expires_after: { anchor: "created_at", seconds: 3600 },
  });
  assert.equal((await client.files.waitForProcessing(file.id)).bytes, content.length);
  assert.equal(await (await client.files.content(file.id)).text(), content);
  assert((await all(client.files.list({ purpose: "batch" }))).some(({ id }) => id === file.id));

  const asked = { input_file_id: file.id, endpoint: "/v1/chat/completions" };
  let batch = await client.batches.create({ ...asked, completion_window: "24h" });
  while (!batch.completed_at) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    batch = await client.batches.retrieve(batch.id);
  }
  assert.deepEqual(batch.request_counts, { total: 3, completed: 2, failed: 1 });
  const records = async (id) =>
    (await (await client.files.content(id)).text()).trim().split("\n").map(JSON.parse);
  const output = await records(batch.output_file_id);
  assert.deepEqual(output.map((each) => each.custom_id).sort(), ["a", "c"]);
  const [{ response }] = output;
  assert.deepEqual(await client.chat.completions.retrieve(response.body.id), response.body);
  const [error] = await records(batch.error_file_id);
  assert.deepEqual([error.custom_id, error.response.status_code], ["b", 400]);
  assert.equal((await all(client.batches.list({ limit: 1 })))[0].id, batch.id);
  await assert.rejects(client.batches.cancel(batch.id), OpenAI.ConflictError);
  assert((await client.files.delete(file.id)).deleted);
}

async function aWorkerDies() {
  const asked = { model: model("ok-t40-d50") };
  const chat = await client.chat.completions.create({ ...asked, messages, stream: true });
  const broken = assert.rejects(all(chat), (error) => error.code === "attempt_restarted");
  const helped = client.responses.stream({ ...asked, input: "one" });
  let deltas = 0;
  for await (const event of helped) {
    if (event.type === "response.output_text.delta" && ++deltas === 5) console.log("KILL");
  }
  assert.equal((await helped.finalResponse()).output_text, words(40));
  await broken;
}

await models();
await chats();
await responses();
await batches();
if (upstream === "openai") await aWorkerDies();
console.log("ARRIVED");
