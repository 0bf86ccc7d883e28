"""An agent on asyncio: it calls several tools at once, remembers every answer, and goes on where it stopped.

Run it several times, or press Ctrl-C in the middle and run it again: python examples/async_agent.py
Nothing needs to be configured; log and database are below ./.skialith.
"""

from __future__ import annotations

import asyncio
from typing import Any

from skialith import AsyncSkialithAgent, SkialithAgent

QUESTIONS = ["What is a write-ahead log?", "What is a lease?", "What is an ack floor?"]
TOOLS = ["web", "wiki", "notes"]


async def call_tool(tool: str, question: str) -> str:
    """Stands for something slow."""
    await asyncio.sleep(0.05)
    return f"{tool} on {question!r}"


async def ask(agent: AsyncSkialithAgent, step: int, question: str) -> list[str]:
    """All tools at once; each answer is durable as soon as it is there."""

    async def one(tool: str) -> str:
        answer = await call_tool(tool, question)
        await agent.save_event(f"{step}-{tool}", {"kind": "observation", "tool": tool, "answer": answer})
        return answer

    return list(await asyncio.gather(*map(one, TOOLS)))


async def main() -> None:
    async with SkialithAgent(agent_id="researcher") as agent:
        state = await agent.resume()
        answers: dict[str, Any] = state.data.get("answers", {})
        print(f"begins at step {state.step_index} of {len(QUESTIONS)}")
        for step, question in enumerate(QUESTIONS[state.step_index :], start=state.step_index + 1):
            answers[question] = await asyncio.wait_for(ask(agent, step, question), 30)
            await agent.checkpoint(step=step, data={"answers": answers})
            print(f"step {step} is durable: {question}")
        async for event in agent.history():
            print(event.step_index, event.event_id, event.data["answer"])


if __name__ == "__main__":
    asyncio.run(main())
