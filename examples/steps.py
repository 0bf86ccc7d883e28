"""A small agent of recorded steps. Run it, press Ctrl-C or kill it at any moment, run it again: it goes on where it was.

    python examples/steps.py "write-ahead logs"

Needs no settings: a private nats-server and SQLite live below ./.skialith.
"""

from __future__ import annotations

import random
import sys
import time

from skialith import SkialithAgent, StepFailed, current_step


class SearchIsDown(Exception):
    """What a search service may raise."""


def plan(topic: str) -> list[str]:
    """Stands for a call of a language model that costs money and gives another answer each time."""
    work(1)
    questions = ["what is it", "who uses it", "what does it cost", "what can go wrong"]
    return [f"{question}: {topic}?" for question in random.sample(questions, 3)]


def search(question: str) -> dict[str, object]:
    """A service that fails now and then. It gets the step's key: asked again with it, it could give its first answer."""
    work(0.5)
    step = current_step()
    assert step is not None
    if random.random() < 0.3:
        print(f"    attempt {step.attempt} failed")
        raise SearchIsDown("503")
    return {"question": question, "hits": random.randint(1, 1000), "key": step.idempotency_key}


def write(findings: list[str]) -> str:
    """Stands for another call of a language model."""
    work(1)
    return "\n".join(f"- {finding}" for finding in findings)


def work(seconds: float) -> None:
    name = getattr(current_step(), "id", "")
    print(f"  working on {name} for {seconds} s", flush=True)
    time.sleep(seconds)


def main(topic: str) -> None:
    # One agent id is one piece of work: another topic is another agent.
    with SkialithAgent(agent_id=f"research {topic}") as agent:
        agent.resume()  # this run owns the agent; what earlier runs recorded is not called again

        questions = agent.step("plan", plan, topic)
        findings = []
        for question in questions:
            print(question)
            try:
                found = agent.step("search", search, question, retries=2, backoff=0.2, record_errors=(SearchIsDown,))
            except StepFailed as error:  # and in every later run, without a search
                findings.append(f"{question} nothing found ({error.error_message})")
            else:
                findings.append(f"{question} {found['hits']} hits")
        print(agent.step("write", write, findings))


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "write-ahead logs")
    except KeyboardInterrupt:
        print("interrupted: run it again and it goes on from here")
