"""The pool of connections: bounds, reuse, what is discarded, close."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from skialith.errors import StoreUnavailable
from skialith.stores.pool import Pool


class Connection:
    """A connection that remembers what was done to it."""

    def __init__(self) -> None:
        self.closed = 0
        self.alive = True


class Made:
    """A pool of two and everything it made."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.refuse = False
        self.pool: Pool[Connection] = Pool(self.connect, self.close, alive=lambda one: one.alive, limit=2, wait=0.05)

    def connect(self) -> Connection:
        if self.refuse:
            raise RuntimeError("refused")
        self.connections.append(Connection())
        return self.connections[-1]

    @staticmethod
    def close(connection: Connection) -> None:
        connection.closed += 1
        raise OSError("the other end is gone")  # which is nobody's business any more


@pytest.fixture
def made() -> Iterator[Made]:
    made = Made()
    yield made
    made.pool.close()
    assert [one.closed for one in made.connections] == [1] * len(made.connections)


def test_one_is_used_again(made: Made) -> None:
    for _ in range(3):
        with made.pool.connection() as connection:
            assert connection is made.connections[0]


def test_one_that_is_dead_is_replaced(made: Made) -> None:
    with made.pool.connection() as first:
        pass
    first.alive = False
    with made.pool.connection() as second:
        assert second is not first
    assert first.closed == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_one_that_failed_is_discarded(made: Made, error: type[BaseException]) -> None:
    with pytest.raises(error), made.pool.connection():
        raise error
    assert made.connections[0].closed == 1
    with made.pool.connection(), made.pool.connection():
        pass
    assert len(made.connections) == 3


def test_a_failed_connect_takes_no_place(made: Made) -> None:
    made.refuse = True
    for _ in range(5):
        with pytest.raises(RuntimeError), made.pool.connection():
            pass
    made.refuse = False
    with made.pool.connection(), made.pool.connection():
        pass


def test_a_third_waits_for_one_of_two(made: Made) -> None:
    with made.pool.connection() as first, made.pool.connection():
        with pytest.raises(StoreUnavailable, match="all 2 database connections"), made.pool.connection():
            pass
        assert len(made.connections) == 2
    with made.pool.connection() as again:
        assert again in made.connections
    assert first.closed == 0


def test_a_waiting_thread_gets_what_is_returned() -> None:
    pool: Pool[Connection] = Pool(Connection, lambda _: None, limit=1, wait=30)
    got: list[Connection] = []

    def wait() -> None:
        with pool.connection() as connection:
            got.append(connection)

    thread = threading.Thread(target=wait)
    with pool.connection() as connection:
        thread.start()
        thread.join(0.05)
        assert not got
    thread.join(30)
    assert got == [connection]


def test_closing_wakes_who_waits() -> None:
    pool: Pool[Connection] = Pool(Connection, lambda _: None, limit=1, wait=30)
    failed: list[Exception] = []

    def wait() -> None:
        try:
            with pool.connection():
                pass
        except StoreUnavailable as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    with pool.connection():
        thread.start()
        pool.close()
        thread.join(30)
    assert "closed" in str(failed[0])


def test_what_is_in_use_is_closed_when_it_comes_back(made: Made) -> None:
    with made.pool.connection() as connection:
        made.pool.close()
        assert connection.closed == 0
    assert connection.closed == 1


def test_nobody_starts_while_it_forks() -> None:
    pool: Pool[Connection] = Pool(Connection, lambda _: None, wait=0.05)
    with pool.connection() as first:
        pass
    pool.before_fork()
    with pytest.raises(StoreUnavailable), pool.connection():
        pass
    pool.after_fork_in_parent()
    with pool.connection() as second:
        assert second is not first
