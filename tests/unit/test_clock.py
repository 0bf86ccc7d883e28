"""The clock that tests set forward and back in another process."""

from __future__ import annotations

import subprocess
import sys
import time

from ..fixtures.clock import Clock

PROGRAM = "import time\nwhile input():\n print(time.time(), time.monotonic(), flush=True)"


def test_the_wall_clock_of_a_process_is_set_and_no_other_clock() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def apart() -> tuple[int, int]:
            """Seconds that its clocks are ahead of this process's."""
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("now\n")
            process.stdin.flush()
            wall, monotonic = map(float, process.stdout.readline().split())
            return round((wall - time.time()) / 60), round((monotonic - time.monotonic()) / 60)

        assert apart() == (0, 0)
        clock = Clock(process.pid)
        for minutes in (-600, 90, 0):
            clock.set(minutes * 60)
            assert apart() == (minutes, 0)
        process.kill()
