"""One step is eq. 4 of the paper, and what is private to a network nobody else moves."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli.data import Split
from dvn_cli.errors import DvnError
from dvn_cli.training.loop import Run
from dvn_cli.training.losses import distillation


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One epoch of two steps of the task with all digits, that has 32 images, and of the other."""
    return small.session(tmp_path, "epochs=1").run


def first_steps(run: Run, steps: int = 1) -> None:
    with pytest.raises(small.Stopped):
        run.run(*small.stop_after(0, steps))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_are_those_of_eq_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    """Of copies that know nothing of each other, each with its own loss, scattered back by the file's description."""
    run = small.session(tmp_path, "tasks.0.data.augment=none", f"reduction={reduction}").run
    network = run.network
    copies = {place: network.virtual_network(*place).train() for place in network}
    batches: dict[tuple[int, int], Tensor] = {}

    def seen(_: Any, given: Any) -> None:
        batches[given[1:3]] = given[0]

    network.register_forward_pre_hook(seen)
    gradients: dict[str, Tensor | None] = {}
    steps = []

    def instead_of_a_step() -> None:
        steps.append(1)
        gradients.update({n: t.grad for n, t in network.file_tensors().items() if t.requires_grad})

    monkeypatch.setattr(run.optimizer, "step", instead_of_a_step)
    first_steps(run, 2)  # the second begins with none of the first's
    assert len(steps) == 2
    assert set(batches) == set(copies)

    for (task, level), alone in copies.items():
        images = batches[task, level]
        loss = F.cross_entropy(alone(images), small.labels_of(images, run.data[task]))
        (loss / (1 if reduction == "sum" else len(copies))).backward()
    expected = small.gathered(network, copies)
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_memory_format(tmp_path: Path) -> None:
    """How images lie in memory decides about speed, and about nothing else."""
    losses = {}
    for layout, expected in (("auto", torch.channels_last), ("contiguous", torch.contiguous_format)):
        words = ["backbone.in_chans=3", f"memory_format={layout}"]
        run = small.session(tmp_path, *words, force=True).run
        given: list[Tensor] = []
        run.network.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        first_steps(run)
        assert all(images.is_contiguous(memory_format=expected) for images in given)
        losses[layout] = run.step.totals
    torch.testing.assert_close(losses["auto"], losses["contiguous"], rtol=1e-5, atol=0)


def test_one_optimizer_step_per_step(run: Run) -> None:
    done: list[int] = []
    run.optimizer.register_step_post_hook(lambda *_: done.append(1))
    run.run(small.nothing, small.nothing)
    assert len(done) == run.steps == 2


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_is_that_of_the_optimizer(tmp_path: Path, name: str) -> None:
    """The settings of the recipe arrive at torch's optimizer, and the learning rate follows the schedule."""
    words = [f"optimizer={{name: {name}, lr: 0.01, momentum: 0.7, weight_decay: 0.2, decay_norms: false}}"]
    run = small.session(tmp_path, *words, "schedule={name: cosine}").run
    rates: list[float] = []
    run.run(small.nothing, lambda run, _: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.01, 0.01 * (1 + 0.5**0.5) / 2, 0.005, 0.01 * (1 - 0.5**0.5) / 2])
    decayed, spared = run.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0)
    assert {p.ndim for p in spared["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert len(decayed["params"]) + len(spared["params"]) == len(list(run.network.parameters()))
    if name == "sgd":
        assert (decayed["momentum"], decayed["nesterov"]) == (0.7, True)
    else:
        assert decayed["betas"][0] == 0.7


def test_private_is_private(run: Run) -> None:
    """A network's loss reaches what is its own, its task's and shared, and nothing else; so do its statistics."""
    network = run.network.train()
    images = torch.randn(8, 1, 8, 8)
    for task, level in network:
        before = {name: tensor.detach().clone() for name, tensor in network.file_tensors().items()}
        network.zero_grad(set_to_none=True)
        network(images, task, level).square().sum().backward()
        for name, tensor in network.file_tensors().items():
            own = name.startswith((f"task/{task}/level/{level}/", "shared/")) or (
                name.startswith(f"task/{task}/") and "/level/" not in name
            )
            if tensor.requires_grad:
                assert (tensor.grad is not None) == own, (task, level, name)
            else:
                assert torch.equal(tensor, before[name]) == (not own), (task, level, name)


@pytest.mark.parametrize(("method", "steps"), [("dvn", 1), ("baseline", 2)])
def test_other_tasks_images_do_not_matter_to_what_is_private(tmp_path: Path, method: str, steps: int) -> None:
    """After one step from the same weights; ever, where nothing is shared."""
    results = []
    for noise in (False, True):
        session = small.session(tmp_path, method=method)
        if noise:
            split = session.run.train[2]
            session.run.train[2] = Split(torch.randint_like(split.images, 256), split.labels)
        first_steps(session.run, steps)
        results.append(session.run.network.file_tensors())
    for name, tensor in results[0].items():
        if tensor.is_floating_point():  # norms count their batches too
            assert torch.equal(tensor, results[1][name]) == name.startswith("task/1/"), name


class Held:
    """What autograd keeps for backward, and for as long as it does."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        size = tensor.numel() * tensor.element_size()
        Held.now += size
        Held.most = max(Held.most, Held.now)
        weakref.finalize(self, Held.release, size)

    @staticmethod
    def release(size: int) -> None:
        Held.now -= size


@pytest.fixture
def held() -> Iterator[type[Held]]:
    Held.now = Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield Held


def test_peak_memory_is_one_networks(run: Run, held: type[Held]) -> None:
    images = {number: next(data.train_batches(16, torch.Generator()))[0] for number, data in run.data.items()}
    alone = []
    for task, level in run.network.train():
        held.most = 0
        F.cross_entropy(run.network(images[task], task, level), torch.zeros(16, dtype=torch.long)).backward()
        alone.append(held.most)
        assert held.now == 0
    held.most = 0
    run.run(small.nothing, small.nothing)
    assert held.most == max(alone) > max(alone[0], alone[2]) > 0


def test_tasks_of_different_sizes(tmp_path: Path) -> None:
    """They meet behind the stem: with its stride doubled, images of twice the size."""
    run = small.session(tmp_path, "tasks.0.data.size=16").run
    network = run.network
    run.run(small.nothing, small.nothing)
    sizes = {}
    network.eval()
    for task, size in ((1, 16), (2, 8)):
        assert network.tasks[task - 1].input_size == (size, size)
        graph = network.narrowed(task, 2, training=False).module.graph
        convolution = next(node for node in graph.nodes if "conv2d" in str(node.target))
        sizes[task] = size // convolution.args[3][0] if len(convolution.args) > 3 else size
        assert network(torch.randn(2, 1, size, size), task, 1).isfinite().all()
    assert sizes == {1: 8, 2: 8}
    assert torch.tensor(run.history[-1]["loss"]).isfinite().all()


def test_smaller_tasks_are_seen_more_often(tmp_path: Path) -> None:
    run = small.session(tmp_path, "tasks.0.data.train_images=20", "epochs=1").run
    seen: list[tuple[int, int]] = []
    run.network.register_forward_pre_hook(lambda _, given: seen.append((given[1], len(given[0]))))
    first_steps(run)
    assert (len(run.train[1]), len(run.train[2]), run.steps) == (16, 32, 2)
    assert seen == [(1, 16), (1, 16), (2, 16), (2, 16)]


# One task after the other

SEQUENTIAL = "learning=sequential"


def test_stages(tmp_path: Path) -> None:
    """The schedule starts again in each; a warm-up has an even rate; what was not trained has no loss."""
    words = [SEQUENTIAL, "sequential={warmup_epochs: 1, lr_factor: 0.5}", "schedule={name: cosine}"]
    run = small.session(tmp_path, *words).run
    rates: list[float] = []
    run.run(small.nothing, lambda run, _: rates.append(run.optimizer.param_groups[0]["lr"]))
    cosine = [0.05 * (1 + c) / 2 for c in (1, 0.5**0.5, 0, -(0.5**0.5))]
    assert rates == pytest.approx([*cosine, 0.05, 0.05, *(rate / 2 for rate in cosine)])
    assert [entry["epoch"] for entry in run.history] == [1, 2, 3, 4, 5]
    assert [entry["stage"] for entry in run.history] == [1, 1, 2, 3, 3]
    measured = [
        [[[value is not None for value in levels] for levels in entry[what]] for what in ("loss", "validation")]
        for entry in run.history
    ]
    one, two, both = [[True, True], [False, False]], [[False, False], [True, True]], [[True, True], [True, True]]
    assert measured == [[one, one], [one, one], [two, two], [both, two], [both, two]]


def test_old_images_are_gone(tmp_path: Path) -> None:
    """What the first task's images are does not matter once another one has come."""
    results = []
    for noise in (False, True):
        run = small.session(tmp_path, SEQUENTIAL).run

        def swapped(run: Run, noise: bool = noise) -> None:
            if noise and run.epochs_done == run.stages[0].epochs:
                run.train[1] = Split(torch.randint_like(run.train[1].images, 256), run.train[1].labels)

        run.run(swapped, small.nothing)
        results.append(run.network.file_tensors())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def modified_cross_entropy(logits: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Eq. 2 and 3 of learning without forgetting."""
    new, recorded = (F.softmax(z, 1) ** (1 / temperature) for z in (logits, old))
    recorded = recorded / recorded.sum(1, keepdim=True)
    return -(recorded * (new / new.sum(1, keepdim=True)).log()).sum(1).mean()


def plain_lwf(run: Run, distance: Callable[..., Tensor]) -> list[nn.Module]:
    """Two of timm's modules whose convolutions are the same tensors, and the loop that everybody would write."""
    data, keys, sgd = run.data, run.recipe.sequential, run.recipe.optimizer
    torch.manual_seed(run.recipe.seed)
    first = timm.create_model(run.network.partition.spec.name, num_classes=10, in_chans=1)
    second = copy.deepcopy(first)
    for name in ("layer1", "layer2", "layer3"):
        for convolution in ("conv1", "conv2"):
            setattr(second.get_submodule(f"{name}.0"), convolution, first.get_submodule(f"{name}.0.{convolution}"))
    first.fc.weight, first.fc.bias = nn.Parameter(first.fc.weight[:5].clone()), nn.Parameter(first.fc.bias[:5].clone())

    def learn(number: int, step: Callable[[Tensor, Tensor], None], *modules: nn.Module) -> None:
        parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        optimizer = torch.optim.SGD(
            parameters, lr=sgd.lr, momentum=sgd.momentum, nesterov=sgd.nesterov, weight_decay=sgd.weight_decay
        )
        generator = torch.Generator().manual_seed(number - 1)
        highest = sgd.lr * (keys.lr_factor if number > 1 else 1)
        for epoch in range(run.recipe.epochs):
            optimizer.param_groups[0]["lr"] = highest * (0.2 if epoch / run.recipe.epochs >= 0.5 else 1)
            for images, labels in data[number].train_batches(run.recipe.batch_size, generator):
                optimizer.zero_grad()
                step(images, labels)
                optimizer.step()

    first.train()
    learn(1, lambda images, labels: F.cross_entropy(first(images), labels).backward(), first)
    own = {name: t for name, t in first.state_dict().items() if not name.startswith("fc.")}
    second.load_state_dict(own, strict=False)
    old = copy.deepcopy(first).eval()
    first.eval(), second.train()

    def step(images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(second(images), labels).backward()
        with torch.no_grad():
            recorded = old(images)
        (keys.weight * distance(first(images), recorded, keys.temperature)).backward()

    learn(2, step, second, first)
    return [first, second]


ONE_UNIT = ["units=1", "tasks.*.data.mean=[0.3]", "tasks.*.data.std=[0.4]", "sequential={weight: 0.7, lr_factor: 0.5}"]


@pytest.mark.parametrize(("distance", "difference"), [(distillation, 0), (modified_cross_entropy, 1e-6)])
def test_with_one_unit_it_is_lwf(tmp_path: Path, distance: Callable[..., Tensor], difference: float) -> None:
    """Eq. 8: every weight and statistic, to the bit; with the loss too written anew, to what its rounding leaves."""
    run = small.trained(tmp_path, *ONE_UNIT, SEQUENTIAL).run
    for number, module in enumerate(plain_lwf(run, distance), 1):
        mine = run.network.tensors(number, 1)
        assert mine.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=difference, msg=name)


def test_with_one_unit_dvn_is_the_method_lwf(tmp_path: Path) -> None:
    dvn, lwf = (
        small.trained(tmp_path, *ONE_UNIT, "sequential.warmup_epochs=1", *words).run
        for words in ([SEQUENTIAL], ["method=lwf"])
    )
    assert small.history(dvn) == small.history(lwf)
    of_lwf = lwf.network.file_tensors()
    assert all(torch.equal(tensor, of_lwf[name]) for name, tensor in dvn.network.file_tensors().items())


def test_baselines_are_alone(tmp_path: Path) -> None:
    """Each is, to the bit, what it is when trained without the others, although the paper's table has them together."""
    high = small.data(classes="5-9", augment="crop", pad=1)
    words = ["method=baseline", f"tasks.1={{name: high, data: {high}}}"]
    together = small.trained(tmp_path, *words).run
    for level in (1, 2):
        alone = small.trained(tmp_path, *words, f"levels=[{level}]", f"tasks={small.content()['tasks'][:1]}").run
        mine = together.network.tensors(1, level)
        assert all(torch.equal(tensor, mine[name]) for name, tensor in alone.network.tensors(1, 1).items())
        assert [entry["loss"][0][0] for entry in alone.history] == [
            entry["loss"][0][level - 1] for entry in together.history
        ]


# What is kept


@pytest.mark.parametrize(("select", "kept"), [("best", 1), ("last", 3)])
def test_select(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, kept: int) -> None:
    """Of equal epochs the first is best."""
    run = small.session(tmp_path, "epochs=4", f"select={select}").run
    scores = [10.0, 60.0, 60.0, 20.0]
    monkeypatch.setattr(run, "_validate", lambda: [[scores[run.epochs_done - 1]] * 2, [50.0, 50.0]])
    after: list[dict[str, Tensor]] = []
    run.run(lambda run: after.append(small.copied(run.network)), small.nothing)
    for name, tensor in run.network.file_tensors().items():
        assert torch.equal(tensor, after[kept][name]), name


def test_each_stage_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second task begins with the best of the first, however much better than the second's that was."""
    run = small.session(tmp_path, SEQUENTIAL, "epochs=3", "select=best").run
    scores = [60.0, 10.0, 20.0, 30.0, 40.0, 10.0]
    monkeypatch.setattr(run, "_validate", lambda: [[scores[run.epochs_done - 1]] * 2, [None, None]])
    after: list[dict[str, Tensor]] = []
    run.run(lambda run: after.append(small.copied(run.network)), small.nothing)
    for ended, best in ((2, 0), (5, 4)):
        for name, tensor in after[ended].items():
            assert torch.equal(tensor, after[best][name]), name
    assert any(not torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())
    kept = {name for name, tensor in after[0].items() if torch.equal(tensor, after[5][name])}
    assert {name for name in kept if "running" in name} >= {n for n in after[0] if "running" in n and "task/1/" in n}


def test_validation_is_measured_on_validation_images(run: Run) -> None:
    """Counted here, image by image."""
    run.run(small.nothing, small.nothing)
    network = run.network.eval()
    for task, data in run.data.items():
        assert data.validation is not None
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        for level in (1, 2):
            with torch.no_grad():
                logits = network((data.validation.images / 255 - mean) / std, task, level)
            right = (logits.argmax(1) == data.validation.labels).double().mean() * 100
            assert run.history[0]["validation"][task - 1][level - 1] == pytest.approx(float(right))


def test_without_validation(tmp_path: Path) -> None:
    run = small.session(tmp_path, "tasks.0.data.validation=0", "tasks.1.data.validation=0", "epochs=1").run
    run.run(small.nothing, small.nothing)
    assert run.history[0]["validation"] is None


def test_one_task_without_validation(tmp_path: Path) -> None:
    run = small.session(tmp_path, "tasks.0.data.validation=0", "epochs=1").run
    run.run(small.nothing, small.nothing)
    first, second = run.history[0]["validation"]
    assert first == [None, None]
    assert None not in second


def noise(name: str, split: Split) -> dict[str, Any]:
    return {name: Split(torch.randint_like(split.images, 256), split.labels.flip(0))}


@pytest.mark.parametrize(("split", "select"), [("test", "best"), ("test", "last"), ("validation", "last")])
def test_what_chooses_nothing(tmp_path: Path, split: str, select: str) -> None:
    """The networks are the same whatever those images show."""
    results = []
    for garbage in (False, True):
        session = small.session(tmp_path, f"select={select}")
        data = session.run.data
        if garbage:
            torch.manual_seed(1)
            data = {n: dataclasses.replace(one, **noise(split, getattr(one, split))) for n, one in data.items()}
        run = Run(session.recipe, session.run.network, data, small.CPU)
        run.run(small.nothing, small.nothing)
        results.append(run.network.file_tensors())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


# What is not a number


@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("level", [1, 2])
def test_loss_that_is_not_a_number(run: Run, task: int, level: int) -> None:
    """The network that it began with is named."""

    def break_it(run: Run, _: int) -> None:
        with torch.no_grad():
            run.network.file_tensors()[f"task/{task}/level/{level}/fc.bias"][0] = torch.nan

    name = ("low", "all")[task - 1]
    with pytest.raises(DvnError, match=f"the loss of task '{name}', level {level}, .* epoch 1, step 2: ") as error:
        run.run(small.nothing, break_it)
    assert error.value.exit_code == 1


def test_weights_that_the_last_step_broke(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it() -> None:
        with torch.no_grad():
            run.network.file_tensors()["shared/layer1.0.conv1.weight"][0] = torch.inf

    monkeypatch.setattr(Run, "steps", 1)
    monkeypatch.setattr(run.optimizer, "step", break_it)
    with pytest.raises(DvnError, match=r"shared/layer1.0.conv1.weight is not finite after epoch 1, step 1: a lower"):
        run.run(small.nothing, small.nothing)


BOUNDED = """
import torch
from torch import nn


class Bounded(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 4, 3)
        self.register_buffer("bound", torch.tensor(torch.inf))
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(torch.minimum(self.conv(x), self.bound).mean((2, 3)))
"""


def test_a_bound_that_is_open_from_the_start_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bounded_net.py").write_text(BOUNDED)
    monkeypatch.syspath_prepend(tmp_path)
    backbone = {"name": "bounded_net:Bounded", "in_chans": 1}
    run = small.session(tmp_path, "epochs=1", backbone=backbone, units=2).run
    run.run(small.nothing, small.nothing)
    assert run.network.file_tensors()["shared/bound"] == torch.inf
