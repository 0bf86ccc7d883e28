// An agent that may be killed at any time, and goes on where it was: `skialith serve` in one terminal, this in another.

import { SkialithAgent } from "@skialith/agent-core";

const QUESTIONS = ["What is a write-ahead log?", "What does a PubAck prove?", "What is a lease for?"];

// Stands for the call of a model, which takes its time and costs money.
async function ask(step, question) {
  console.log(`asking (${step.id}): ${question}`);
  await new Promise((resolve) => setTimeout(resolve, 300));
  return { role: "assistant", content: `An answer to: ${question}` };
}

const agent = new SkialithAgent({ agentId: "example-agent" });
try {
  const state = await agent.resume(); // from here on this process owns the agent
  const messages = state.data.messages ?? [];
  console.log(`begins at step ${state.stepIndex} of ${QUESTIONS.length}`);

  for (let n = state.stepIndex; n < QUESTIONS.length; n += 1) {
    const question = QUESTIONS[n];
    const answer = await agent.step(`ask-${n}`, (step) => ask(step, question), { retries: 3, functionName: "ask" });
    await agent.saveEvent(`answer-${n}`, { kind: "answer", text: answer.content });
    messages.push({ role: "user", content: question }, answer);
    await agent.checkpoint(n + 1, { messages });
    console.log(`step ${n + 1} is durable`);
  }

  for await (const event of agent.history({ type: "answer" })) console.log(event.eventId, event.data.text);
} finally {
  await agent.close(); // gives the agent up, so that the next run need not take it over
}
