"""Which indices a network has: by runs, and by the labels of the graph that they come from."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.graph.narrow import indices_of
from dvn_cli.store.metadata import Rule
from dvn_cli.store.ownership import Assignment
from dvn_cli.units.assign import label_mask


@given(st.lists(st.integers(0, 4), max_size=12), st.sets(st.integers(1, 4)))
def test_runs_are_as_long_as_they_can_be(owner, units):
    axis = tuple(tuple((i, i + 1) for i, o in enumerate(owner) if o == unit) for unit in range(1, 5))
    assignment = Assignment(4, (axis,), {"x": (0,)}, ())
    (runs,) = assignment.runs("x", (len(owner),), units, 10)
    assert [i for start, stop in runs for i in range(start, stop)] == [
        i for i, o in enumerate(owner) if o == 0 or o in units
    ]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs))
    assert assignment.whole_shape("x", assignment.shape("x", (len(owner),), units, 10), units, 10) == (len(owner),)


NETWORKS = [
    ("wrn_10_1", 32, "importance"),
    ("timm/test_vit", 160, "even"),
    *(
        pytest.param(name, 64, assign, marks=pytest.mark.slow)
        for name, assign in (
            ("timm/resnet18", "importance"),
            ("timm/mobilenetv3_small_050", "even"),
            ("timm/test_convnext", "importance"),
            ("torchvision/shufflenet_v2_x0_5", "even"),
        )
    ),
]


@pytest.mark.parametrize(("name", "size", "assign"), NETWORKS)
def test_indices_are_those_of_the_labelled_graph(name: str, size: int, assign: str) -> None:
    """For a task with all classes of the classifier, and for one with fewer."""
    torch.manual_seed(0)
    spec = resolve(name, num_classes=5, input_size=(size, size))
    partition = partition_backbone(spec, 3, Rule(assign), spec.build())
    graph, compared = partition.graph(train=True), 0
    for units, classes in itertools.product(([1], [2, 3], [1, 2, 3]), (5, 3)):
        keep = label_mask(graph.labeller, graph.unit, units, classes)
        for traced in (partition.graph(train).traced for train in (True, False)):
            nodes = {str(node.target): node for node in traced.graph.find_nodes(op="placeholder")}
            for target, tensor in traced.names.items():
                expected = indices_of(graph.labeller, graph.labels[nodes[target]], keep)
                shape = partition.shapes[tensor]
                runs = partition.assignment.runs(tensor, shape, units, classes)
                for along, indices, size in zip(runs, expected, shape, strict=True):
                    known = list(range(size)) if indices is None else indices.tolist()
                    assert [i for start, stop in along for i in range(start, stop)] == known, (tensor, units)
                    compared += len(known) < size
    assert compared
