"""How much memory a process may still take."""

from collections.abc import Iterator
from pathlib import Path


def available() -> int | None:
    """Returns the bytes that this process may still take, None where the system does not say.

    That is the least of what the machine has left (`MemAvailable` and the free swap), of what the process's control
    group has (pages of files, which the kernel gives back, counted as free), and of its limit on address space.
    """
    left = [*_machine(), *_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), *_address_space()]
    return max(0, min(left)) if left else None


def in_words(count: int) -> str:
    """Returns a number of bytes in GiB or MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


def _machine() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
        yield 1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))
    except (OSError, ValueError, KeyError, IndexError):  # no Linux, or a kernel that says it otherwise
        return


def _control_groups(membership: Path, root: Path) -> Iterator[int]:
    """What is left in the process's control group and in those around it, of version 2 and of version 1."""
    try:
        entries = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in entries:
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in [group, *group.parents]:
            yield from _limit(folder, *names)
            if folder == base:
                break


def _limit(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        limit_bytes, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield limit_bytes - used + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):  # none is set ("max"), or this group is not to be seen from here
        return


def _address_space() -> Iterator[int]:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield limit - pages * resource.getpagesize()
    except (ImportError, OSError, ValueError):  # Windows has no such limits, macOS no /proc
        return
