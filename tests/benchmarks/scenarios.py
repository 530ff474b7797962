"""The paper's scenarios by every method that its tables compare, within a time.

    python tests/benchmarks/scenarios.py --out RUNS --minutes 9 [--jobs 4] [KEY=VALUE ...]

Trains J1, H1, S1 and S2 at full size, but for 20 epochs in place of 200 with a cosine schedule, in bfloat16 and on all
training images, several runs side by side, then prints the tables of those that are done (`dvn bench --scenario`). When
the time is over, runs are stopped; called again with the same folder, it goes on with them, and leaves those alone that
are done. Data are those of the recipes, beside the checkout. Two steps of each, to see that it works, on a CPU:

    python tests/benchmarks/scenarios.py --out RUNS --jobs 1 epochs=1 \
        'tasks.*.data.train_images=256' 'tasks.*.data.test_images=100'
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

METHODS = {
    "j1": ("dvn", "nestednet", "packnet", "baseline"),
    "h1": ("dvn", "nestednet", "baseline"),
    "s1": ("dvn", "nestednet", "lwf", "feature_extraction", "da_cnn"),
    "s2": ("dvn", "nestednet", "lwf", "feature_extraction", "da_cnn"),
}
"""Of each scenario those in the paper's table: dvn first, so that it is there if the time is too short for all."""

SETTINGS = (
    "epochs=20",
    "schedule.name=cosine",
    "schedule.warmup=0.05",
    "precision=bf16",
    "threads=1",
    "sequential.warmup_epochs=1",
    "tasks.*.data.validation=0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--jobs", type=int, default=4, help="runs side by side")
    parser.add_argument("--scenarios", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every recipe")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    waiting, running = commands(options), dict[subprocess.Popen[bytes], str]()
    failed = []
    while time.monotonic() < end:
        for name, command in itertools.islice(waiting, options.jobs - len(running)):
            print("begins", name, flush=True)
            with open(options.out / f"{name}.log", "ab") as log:
                running[subprocess.Popen(command, stdout=log, stderr=log)] = name
        if not running:
            break
        time.sleep(0.2)
        for process in [each for each in running if each.poll() is not None]:
            name = running.pop(process)
            failed += [name] if process.returncode else []
            print("failed" if process.returncode else "done", name, flush=True)
    for process in running:  # a run saves its state, and goes on from it the next time
        process.send_signal(signal.SIGINT)
    for process in running:
        process.wait()
    for scenario in options.scenarios:
        records = [str(path) for path in sorted(options.out.glob(f"{scenario}-*.run.json"))]
        if records:
            dvn("bench", "--scenario", scenario, *records)
    left = [*running.values(), *(name for name, _ in waiting)]
    print(f"failed: {', '.join(failed) or 'none'}; left: {', '.join(left) or 'none'}")
    sys.exit(1 if failed else 0)


def commands(options: argparse.Namespace) -> Iterator[tuple[str, Sequence[str]]]:
    """Yields a name and the command of each run that is not done, seed by seed."""
    for seed in options.seeds:
        for scenario in options.scenarios:
            for method in METHODS[scenario]:
                name = f"{scenario}-{method}-{seed}"
                output = options.out / f"{name}.safetensors"
                if output.with_suffix(".run.json").exists() and not output.with_suffix(".state.safetensors").exists():
                    continue
                keys = [f"method={method}", f"seed={seed}", *SETTINGS, *options.overrides]
                yield name, [sys.executable, "-m", "dvn_cli", "train", scenario, *keys, "--resume", "-o", str(output)]


def dvn(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvn_cli", *arguments], env={**os.environ, "COLUMNS": "110"}, check=False)


if __name__ == "__main__":
    main()
