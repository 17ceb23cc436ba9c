// The official OpenAI client for Node, driven by tests/server/test_node_client.py.
// Usage: node client.mjs BASE_URL MODEL; prints one JSON object of what it saw.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused" });
const messages = [{ role: "user", content: "What is the rate?" }];
const seen = {};

seen.models = (await client.models.list()).data.map((entry) => entry.id);

const chat = await client.chat.completions.create({ model, messages, logprobs: true, top_logprobs: 1 });
seen.content = chat.choices[0].message.content;
seen.finish_reason = chat.choices[0].finish_reason;
seen.usage = chat.usage;
seen.num_logprobs = chat.choices[0].logprobs.content.length;

seen.streamed = "";
const options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true, stream_options: options })) {
  seen.streamed += chunk.choices[0]?.delta?.content ?? "";
  seen.last_chunk = { choices: chunk.choices, usage: chunk.usage };
}

const helper = client.chat.completions.stream({ model, messages });
seen.helper = await helper.finalContent();

const completion = await client.completions.create({ model, prompt: ["a", "b"], max_tokens: 3, echo: true });
seen.completions = completion.choices.map((choice) => choice.text);

seen.errors = {};
const attempts = {
  bad: { model, messages, temperature: 3 },
  missing: { model: "gpt-4", messages },
  tools: { model, messages, tools: [{ type: "function", function: { name: "f" } }] },
};
for (const [name, body] of Object.entries(attempts)) {
  try {
    await client.chat.completions.create(body);
  } catch (error) {
    const { status, code, param, type } = error;
    seen.errors[name] = { kind: error.constructor.name, status, code, param, type, has_id: Boolean(error.requestID) };
  }
}

const aborted = await client.chat.completions.create({ model, messages, stream: true });
for await (const _ of aborted) break; // leaving the loop closes the connection

console.log(JSON.stringify(seen));
