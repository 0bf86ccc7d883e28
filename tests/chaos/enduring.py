"""The child that lives through many epochs: in each it opens other agents and writes down elsewhere, in the same process."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from skialith import SkialithError

from . import awaited, stepping
from .evidence import Notebook
from .script import Options, Script, Worker, stop_on_bug

if TYPE_CHECKING:
    from skialith import SkialithAgent

Opener = Callable[[str, Options, threading.Event, Notebook], "SkialithAgent"]
LOOK_SECONDS = 0.02
EPOCH = "epoch"
"""The file that says which epoch it is, empty between two."""


def of_epoch(agent_id: str, epoch: int) -> str:
    """An agent as it is called in this epoch."""
    return f"{agent_id}.{epoch}"


def folder_of(place: Path, role: str, epoch: int) -> Path:
    """Where children of this role write down what they do in this epoch; steps are judged apart."""
    return place / f"{'steps' if role == 'steps' else 'epoch'}-{epoch}"


def say_epoch(place: Path, epoch: int | None) -> None:
    """From now on it is this epoch, or none."""
    new = place / f"{EPOCH}.new"
    new.write_text("" if epoch is None else str(epoch))
    new.rename(place / EPOCH)


def _epoch(place: Path) -> int | None:
    text = (place / EPOCH).read_text()
    return int(text) if text else None


def endure(options: Options, notebook: Notebook, stopping: threading.Event, open_agent: Opener) -> None:
    """Play the role in every epoch, until SIGTERM or the death of the test; the process's runtime lives on in between."""
    parent, place, last = os.getppid(), Path(options.folder), -1
    with open_agent(f"~{options.name}", options, stopping, notebook):
        notebook.line("note", what="ready")
        while not stopping.is_set() and os.getppid() == parent:
            epoch = _epoch(place)
            if epoch is None or epoch == last:
                stopping.wait(LOOK_SECONDS)
                continue
            last = epoch
            _live_through(epoch, options, stopping, open_agent)
            notebook.line("note", what="over", epoch=epoch)
    notebook.line("note", what="closed")


def _live_through(epoch: int, options: Options, stopping: threading.Event, open_agent: Opener) -> None:
    place, over = Path(options.folder), threading.Event()
    notebook = Notebook(folder_of(place, options.role, epoch), options.name)
    agents = [of_epoch(agent_id, epoch) for agent_id in options.agents]
    mine = replace(options, agents=agents, seed=options.seed + epoch)

    def play() -> None:
        with stop_on_bug(notebook):
            ROLES[options.role](mine, notebook, over, open_agent)

    thread = threading.Thread(target=play, name=f"epoch-{epoch}", daemon=True)
    thread.start()
    while thread.is_alive():
        if stopping.is_set() or _epoch(place) != epoch:
            over.set()
        thread.join(LOOK_SECONDS)
    notebook.close()


# ---- the roles


def _work(options: Options, notebook: Notebook, over: threading.Event, open_agent: Opener) -> None:
    """Agents at work, owned or not."""
    with contextlib.ExitStack() as stack:
        workers = []
        for agent_id in options.agents:
            agent = stack.enter_context(open_agent(agent_id, options, over, notebook))
            owned = options.fenced != "never"
            # Only an agent's thread 0 makes checkpoints.
            mine = [Worker(agent, notebook, options, n + (not owned), over) for n in range(options.threads)]
            if owned:
                mine[0].resume_until_answered()
            for worker in mine:
                worker.step = mine[0].step
            workers += mine
        for worker in workers:
            worker.thread.start()
        for worker in workers:
            worker.thread.join()


def _await(options: Options, notebook: Notebook, over: threading.Event, open_agent: Opener) -> None:
    awaited.work(options, notebook, over)


def _steps(options: Options, notebook: Notebook, over: threading.Event, open_agent: Opener) -> None:
    with open_agent(options.agents[0], options, over, notebook) as agent:
        stepping.run(options, notebook, agent)


def _browse(options: Options, notebook: Notebook, over: threading.Event, open_agent: Opener) -> None:
    """State and history of agents that others write, again and again."""
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(open_agent(each, options, over, notebook)) for each in options.agents]
        while not over.wait(options.pace):
            for agent in agents:
                script = Script(agent, notebook)
                with contextlib.suppress(SkialithError):  # written down
                    script.resume(exclusive=False)
                script.history()


ROLES: dict[str, Callable[[Options, Notebook, threading.Event, Opener], None]] = {
    "work": _work,
    "await": _await,
    "steps": _steps,
    "browse": _browse,
}
