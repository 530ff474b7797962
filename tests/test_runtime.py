"""Networks that come and go: they give what their slices give, and memory holds what the active ones need."""

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dvn_cli
from dvn_cli import DvnError, InputError, Runtime
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_header

UNITS = 3
ALL = [(task, level) for task in range(1, UNITS + 1) for level in range(1, UNITS + 1)]
KINDS = {
    "runs": ("wrn_10_1", {"in_chans": 1, "input_size": 8}),
    "scattered": ("wrn_10_1", {"in_chans": 1, "input_size": 8, "assign": "importance"}),
    "attention": ("test_vit", {"input_size": 32}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a checkpoint of a kind in which no two tensors are alike."""

    @functools.cache
    def make(kind: str) -> Path:
        backbone, words = KINDS[kind]
        network, generator = dvn_cli.divide(backbone, UNITS, num_classes=5, **words), torch.Generator().manual_seed(0)
        network.make_private()
        for name, tensor in network.file_tensors().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.data.copy_(noise + 0.5 if "var" in name else 0.2 * noise - 0.1)
        path = tmp_path_factory.mktemp(kind) / "dvn.safetensors"
        network.save(path)
        return path

    return make


@pytest.fixture
def file(made: Callable[[str], Path]) -> Path:
    return made("runs")


def images(file: Path) -> Tensor:
    spec = read_header(file).metadata.backbone
    return torch.randn(3, spec.in_chans, *spec.input_size, generator=torch.Generator().manual_seed(0))


def of_slice(file: Path, task: int, level: int) -> Tensor:
    """The logits of a network as a file of its own."""
    cut = dvn_cli.slice(file, task, level, file.parent)
    with torch.no_grad():
        return dvn_cli.load(cut.file)(images(file))


def slice_bytes(file: Path, task: int, level: int) -> int:
    """Bytes of what a network reads of its slice: counters of batches it does not."""
    tensors = read_header(dvn_cli.slice(file, task, level, file.parent).file).tensors
    return sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("num_batches_tracked"))


def private_bytes(file: Path, prefix: str) -> int:
    """Bytes of the file's tensors whose names begin so."""
    tensors = read_header(file).tensors
    return sum(t.nbytes for n, t in tensors.items() if n.startswith(prefix) and not n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_slices(kind: str, made: Callable[[str], Path]) -> None:
    """To the bit, whichever others are active: alone a network has its own tensors, else parts of larger ones."""
    file, runtime = made(kind), Runtime(made(kind))
    expected = {network: of_slice(file, *network) for network in ALL}
    assert len({tuple(logits.flatten().tolist()) for logits in expected.values()}) == len(ALL)

    def check() -> None:
        for network in runtime.active:
            assert torch.equal(runtime(images(file), *network), expected[network]), network

    for level in (1, 3, 2):
        runtime.set(1, level)
        assert runtime.active == [(1, level)]
        check()
    for words in ((3, 2), (2, 1, 3), (1,), (2,), (1, 1)):
        runtime.set(*words)
        check()
    for task in range(1, UNITS + 1):
        runtime.set(task, *range(1, UNITS + 1))
    assert runtime.active == ALL
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: str, made: Callable[[str], Path]) -> None:
    """One network takes what its slice takes; what is read is what is added, and all share one set of weights."""
    file, runtime = made(kind), Runtime(made(kind))
    assert runtime.bytes_read == runtime.resident_bytes == 0
    own = {level: private_bytes(file, f"task/1/level/{level}/") for level in range(1, UNITS + 1)}
    read = 0
    for level in range(1, UNITS + 1):
        before = runtime.resident_bytes - own.get(level - 1, 0)
        runtime.set(1, level)
        assert runtime.resident_bytes == slice_bytes(file, 1, level)
        assert runtime.bytes_read - read == runtime.resident_bytes - before
        read = runtime.bytes_read
    shared = runtime.resident_bytes - own[3]
    for level in (2, 1):
        runtime.set(1, level)
        assert runtime.resident_bytes == slice_bytes(file, 1, level)
    assert runtime.bytes_read == read + own[2] + own[1]
    for task in range(1, UNITS + 1):
        runtime.set(task, *range(1, UNITS + 1))
    stems = private_bytes(file, "task/1/") - sum(own.values())
    assert runtime.resident_bytes == shared - stems + private_bytes(file, "task/")
    for task in range(1, UNITS + 1):
        runtime.set(task)
    assert runtime.resident_bytes == 0


def test_tasks_share_what_they_have_in_common(file: Path) -> None:
    runtime = Runtime(file)
    runtime.set(1, 3)
    read, held = runtime.bytes_read, runtime.resident_bytes
    runtime.set(2, 2)
    assert runtime.bytes_read - read == runtime.resident_bytes - held < private_bytes(file, "task/2/")
    runtime.set(1)
    assert runtime.resident_bytes == slice_bytes(file, 2, 2), "what the other task alone needed is free"
    runtime.set(1, 1)
    both = slice_bytes(file, 1, 1) + slice_bytes(file, 2, 2)
    assert runtime.resident_bytes < both, "unit 1 is in both"


def test_switching_while_others_compute(file: Path) -> None:
    """Every output is that of one of the levels, and none is missing."""
    runtime, batch = Runtime(file), images(file)
    expected = [of_slice(file, 1, level) for level in range(1, UNITS + 1)]
    runtime.set(1, 1)
    done, wrong = threading.Event(), list[object]()

    def compute() -> None:
        try:
            while not done.is_set():
                logits = runtime(batch)
                if not any(torch.equal(logits, of_level) for of_level in expected):
                    wrong.append(logits)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for level in (3, 2, 3, 1, 2, 1):
        runtime.set(1, level)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_goes_on_with_what_it_started_with(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(file)
    runtime.set(1, 2)
    network = runtime._active[1, 2]

    def graph(*given: Tensor) -> Tensor:
        runtime.set(1, 3)
        runtime.set(1)
        return network.graph(*given)

    paused = dvn_cli.runtime.replace(network, graph=graph)
    monkeypatch.setitem(runtime._active, (1, 2), paused)
    assert torch.equal(runtime(images(file)), of_slice(file, 1, 2))
    assert runtime.resident_bytes == 0


def test_a_damaged_file_changes_nothing(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    last = read_header(file).tensors["task/1/level/3/fc.weight"]
    content[last.start] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    runtime = Runtime(damaged)
    runtime.set(1, 2)
    held = runtime.resident_bytes
    with pytest.raises(InputError, match=r"'task/1/level/3/fc\.weight' has other bytes than were written"):
        runtime.set(1, 3)
    assert (runtime.active, runtime.resident_bytes) == ([(1, 2)], held)
    assert torch.equal(runtime(images(file)), of_slice(file, 1, 2))


def test_what_is_not_there(file: Path, tmp_path: Path) -> None:
    runtime = Runtime(file)
    for words, message in (((4, 1), "no task '4'"), ((1, 4), "no level 4"), ((1, 2, 0), "no level 0")):
        with pytest.raises(InputError, match=message):
            runtime.set(*words)
    with pytest.raises(InputError, match="no tasks are active: say which is meant"):
        runtime(images(file))
    runtime.set("task2", 2)
    with pytest.raises(InputError, match=r"'task1': no level is active; call set\('task1', 1\) first"):
        runtime(images(file), 1)
    with pytest.raises(InputError, match="'task2': level 1 is not active"):
        runtime(images(file), "task2", 1)
    runtime.set("task1", 1)
    with pytest.raises(InputError, match="2 tasks are active: say which is meant"):
        runtime(images(file))
    with pytest.raises(InputError, match="is a slice already"):
        Runtime(dvn_cli.slice(file, 1, 1, tmp_path).file)


def test_images_of_another_size(made: Callable[[str], Path]) -> None:
    runtime = Runtime(made("attention"))
    runtime.set(1, 1)
    with pytest.raises(InputError, match="made for images of 32x32"):
        runtime(torch.zeros(1, 3, 48, 48))


def test_threads_that_meet_another_size_at_once(made: Callable[[str], Path]) -> None:
    """Each gets its logits, and modules that others build meanwhile, or later, are what they were."""
    runtime, batch = Runtime(made("runs")), torch.zeros(1, 1, 16, 16)
    runtime.set(1, 1)
    logits: list[Tensor] = []
    threads = [threading.Thread(target=lambda: logits.append(runtime(batch, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    built = []
    while any(thread.is_alive() for thread in threads):
        built.append(torch.nn.Linear(2, 2).weight.device.type)
    assert {*built, torch.nn.Linear(2, 2).weight.device.type} == {"cpu"}
    assert len(logits) == 4
    assert all(torch.equal(each, logits[0]) for each in logits)


def test_fitting_a_budget(file: Path) -> None:
    runtime, sizes = Runtime(file), [slice_bytes(file, 1, level) for level in range(1, UNITS + 1)]
    for level, size in enumerate(sizes, 1):
        assert runtime.fit(1, budget_bytes=size) == level
        assert (runtime.active, runtime.resident_bytes) == ([(1, level)], size)
    assert runtime.fit(budget_bytes=sizes[2] - 1) == 2
    with pytest.raises(DvnError, match="the nearest is level 1"):
        runtime.fit(budget_bytes=sizes[0] - 1, latency_ms=1e6)
    with pytest.raises(InputError, match="give budget_bytes or latency_ms"):
        runtime.fit()
    assert runtime.active == [(1, 2)]
    runtime.set(2, 3)
    runtime.set(1, 3)
    both = runtime.resident_bytes
    assert both < 2 * sizes[2]
    runtime.set(1)
    assert runtime.fit(1, budget_bytes=both) == 3, "most of it is there for the other task"
    assert runtime.active == [(1, 3), (2, 3)]


def test_weights_of_another_type(file: Path, tmp_path: Path) -> None:
    network = dvn_cli.load(file)
    assert isinstance(network, DeepVirtualNetwork)
    network.bfloat16().save(tmp_path / "half.safetensors")
    runtime, image = Runtime(tmp_path / "half.safetensors"), torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    assert runtime.fit(1, latency_ms=1e6) == UNITS
    cut = dvn_cli.load(dvn_cli.slice(tmp_path / "half.safetensors", 1, UNITS, tmp_path / "cut.safetensors").file)
    with torch.no_grad():
        torch.testing.assert_close(runtime(image), cut(image), rtol=0, atol=0)


def test_fitting_a_latency(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recorded; else as measured, from the lowest level on."""
    runtime, tried = Runtime(file), list[int]()
    keys = {"task": 1, "name": "task1"}
    rows = [
        {**keys, "level": level, "params": params, "latency_ms": {"p50": level}}
        for level in range(1, UNITS + 1)
        for params in [dvn_cli.slice(file, 1, level, tmp_path).params]
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"results": rows}))
    assert runtime.fit(1, latency_ms=3.5, results=[tmp_path / "bench.json"]) == 3

    def latency(network: tuple[int, int]) -> float:
        assert runtime.active == [network]
        tried.append(network[1])
        return 10.0 * network[1]

    assert runtime._latency(runtime.active[0]) > 0
    monkeypatch.setattr(runtime, "_latency", latency)
    assert runtime.fit(latency_ms=25) == 2
    assert tried == [1, 2, 3]
    (tmp_path / "bench.json").write_text(json.dumps({"batch_size": 64, "results": rows}))
    assert runtime.fit(latency_ms=25, results=[tmp_path / "bench.json"]) == 2, "none of one image is recorded"
    with pytest.raises(DvnError, match=r"at most 5\.00 ms: the nearest is level 1"):
        runtime.fit(latency_ms=5)
    assert runtime.active == [(1, 2)]
    assert runtime.fit(latency_ms=25, budget_bytes=slice_bytes(file, 1, 1)) == 1
