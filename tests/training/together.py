"""Runs what `test_processes.py` asks for in two processes that train together: `python together.py FOLDER`.

They are forked from a process that has imported all and computed nothing: torchrun's start anew, which takes longer.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small
import torch
import torch.multiprocessing

from dvn_cli import cli, processes
from dvn_cli.errors import InputError
from dvn_cli.graph.synchronised import batch_norm
from dvn_cli.training.loop import Run

COUNT = 2
RECIPE: dict[str, Any] = {
    "backbone": {"name": "test_vit", "in_chans": 1, "input_size": 16},
    "optimizer": {"lr": 0.02, "clip_grad": 1.0},
    "batch_size": 4,
    "accumulate": 2,
    "orders": "learned",
    "tasks": [
        {"name": "low", "data": small.data(classes="0-4", size=16, augment="crop", pad=1), "class_weights": "balanced"},
        {"name": "all", "data": small.data(size=16, test_images=21, mixup=0.4, reprob=0.3)},
    ],
}


def interrupted(folder: Path) -> Any:
    """A run of which one process was asked to stop, and what `dvn eval` makes of its networks."""
    session = small.session(folder, **RECIPE)

    def after_step(run: Run, step: int) -> None:
        if (run.epochs_done, step) == (1, 1) and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        session.train(small.nothing, after_step)
    except SystemExit as error:
        told = {"code": error.code, "epochs": session.run.epochs_done, "steps": session.run.steps_done}
    file, results = (folder / f"{processes.rank()}.{kind}" for kind in ("safetensors", "csv"))
    session.run.network.save(file)
    cli.app(["eval", str(file), "--results-file", str(results)], standalone_mode=False)
    told["affinity"] = [list(task.affinity) for task in session.run.network.tasks]
    return {**told, "history": small.history(session.run)}


def norms(_: Path) -> Any:
    """How far a batch norm of both processes' parts is from one of the whole batch: outputs, gradients, statistics."""
    torch.manual_seed(0)
    whole, weight, bias = torch.randn(8, 3, 5, 5) * 2 + 1, torch.rand(3), torch.rand(3)
    target = torch.randn(8, 3, 5, 5)
    found = []
    for images, wanted, norm in (
        (whole, target, torch.nn.functional.batch_norm),
        (processes.share(whole), processes.share(target), None),
    ):
        images, own = images.clone().requires_grad_(), [t.clone().requires_grad_() for t in (weight, bias)]
        kept = [torch.zeros(3), torch.ones(3)]
        if norm is None:
            output = batch_norm(images, *own, *kept, True, 0.1, 1e-5)
        else:
            output = norm(images, *kept, *own, True, 0.1, 1e-5)
        (output * wanted).square().mean().backward()
        gradients = [tensor.grad for tensor in (images, *own) if tensor.grad is not None]
        found.append([output.detach(), *gradients, *kept])
    (outputs, of_whole, *rest), (output, of_part, *others) = found
    processes.average(others[:2])
    pairs = [
        (processes.share(outputs), output),
        (COUNT * processes.share(of_whole), of_part),
        *zip(rest, others, strict=True),
    ]
    return [float((a - b).abs().max()) for a, b in pairs]


def failed(_: Path) -> Any:
    """What the others of a process that ends are told."""
    if processes.rank() == 1:
        raise InputError("no such image")
    processes.average([torch.ones(2)])


def one_of_several(number: int, what: Callable[[Path], Any], folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with processes.joined():
            told = what(folder)
    except BaseException as error:
        told = [type(error).__name__, str(error)]
    (folder / f"{number}.json").write_text(json.dumps(told))


def main() -> None:
    for what in (interrupted, norms, failed):
        folder = Path(sys.argv[1]) / what.__name__
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(one_of_several, (what, folder, port), COUNT, start_method="fork")


if __name__ == "__main__":
    main()
