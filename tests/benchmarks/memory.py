"""Runs a command and prints the most memory that all its processes took: `python tests/benchmarks/memory.py dvn ...`.

It is the sum of their proportional set sizes, in which pages that processes share count once; Linux alone.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

INTERVAL = 1.5  # seconds: the kernel walks all pages for each look


def processes(number: int) -> Iterator[int]:
    """A process and all that it began."""
    yield number
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{number}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from processes(int(child))


def size(number: int) -> int:
    """Bytes of a process, 0 of one that has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


def main() -> None:
    process = subprocess.Popen(sys.argv[1:])
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(size, processes(process.pid))))
        time.sleep(INTERVAL)
    print(f"at most {most / 2**20:,.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
