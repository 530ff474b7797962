"""Channels that only go together: coupled groups."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx


class CoupledGroups:
    """Labels and which of them are coupled: a union-find over integers, whole arrays at a time.

    A group is known by the least label in it. That of label 0 is what all units need.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._produced: list[np.ndarray] = []
        self._summed: list[np.ndarray] = []
        self.at: fx.Node | None = None  # the node whose rule is at work
        self._pinned: list[tuple[np.ndarray, np.ndarray, fx.Node | None]] = []

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int) -> Tensor:
        """Returns `count` labels that are in use nowhere, shape (count,)."""
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        return torch.arange(start, start + count)

    def find(self, labels: Tensor) -> Tensor:
        """Returns the group of each label."""
        roots = labels.numpy()
        while True:
            above = np.asarray(self._parent[roots])
            if np.array_equal(above, roots):
                return torch.from_numpy(above)
            roots = above

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Couples the labels that stand at the same place, after broadcasting."""
        given = tuple(t.reshape(-1).numpy() for t in torch.broadcast_tensors(a, b))
        left, right = given
        while True:
            left, right = (self.find(torch.from_numpy(t)).numpy() for t in (left, right))
            differ = left != right
            if not differ.any():
                return
            left, right, given = left[differ], right[differ], (given[0][differ], given[1][differ])
            pinned = np.minimum(left, right) == 0
            if pinned.any():
                other = np.where(left == 0, *given)
                self._pinned.append((np.maximum(left, right)[pinned], other[pinned], self.at))
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))

    @cached_property
    def _causes(self) -> dict[int, tuple[int, fx.Node | None]]:
        """For each group that all units came to need: the label that it was united with, 0 for none, and where."""
        return {
            root: (other, node)
            for roots, others, node in self._pinned
            for root, other in zip(roots.tolist(), others.tolist(), strict=True)
        }

    @cached_property
    def _produced_and_pinned(self) -> set[int]:
        """Of the groups that all units came to need those with a channel that a parameter makes."""
        produced = np.unique(np.concatenate(self._produced)) if self._produced else np.zeros(0, np.int64)
        always = produced[self.find(torch.from_numpy(produced)).numpy() == 0]
        return {self._before_pinned(label) for label in always.tolist()}

    def _before_pinned(self, label: int) -> int:
        """The group that a label was in before all units came to need it."""
        while self._parent[label]:
            label = int(self._parent[label])
        return label

    def pinned_by(self, label: int) -> fx.Node | None:
        """Returns the operator for which all units have a channel; None for what no parameter makes, or is divided.

        It is the first that could not do without: what is coupled with the channel later on has no part in it.

        Args:
            label: of the channel. Labels are not united any more once this has been asked.
        """
        node, is_produced = None, False
        while label and not self.find(torch.tensor([label])).any():
            root = self._before_pinned(label)
            is_produced = is_produced or root in self._produced_and_pinned
            label, node = self._causes[root]
        return node if is_produced else None

    def mark_produced(self, labels: Tensor) -> None:
        """Notes that a contraction with a parameter makes these channels: only such can be divided among units."""
        self._produced.append(labels.reshape(-1).numpy())

    def mark_summed(self, vectors: Sequence[Tensor]) -> None:
        """Notes which channels, made by different layers, a sum is about to couple, as a residual connection does.

        Args:
            vectors: labels of the operands along one dimension, to be united next.
        """
        produced, first = self.produced(), self.find(vectors[0])
        for vector in vectors[1:]:
            a, b = (t.reshape(-1).numpy() for t in torch.broadcast_tensors(first, self.find(vector)))
            self._summed.append(a[(a != b) & (a > 0) & (b > 0) & produced[a] & produced[b]])

    def roots(self) -> np.ndarray:
        """Returns the group of every label, shape (number of labels,)."""
        return self.find(torch.arange(len(self))).numpy()

    def produced(self) -> np.ndarray:
        """Tells of each label whether a group of that name has a channel that a parameter makes."""
        return self._named_by(self._produced)

    def summed(self) -> np.ndarray:
        """Tells of each label whether a sum couples channels of a group of that name; see `mark_summed`."""
        return self._named_by(self._summed)

    def _named_by(self, marked: Sequence[np.ndarray]) -> np.ndarray:
        result = np.zeros(len(self), dtype=bool)
        if marked:
            result[self.find(torch.from_numpy(np.concatenate(marked))).numpy()] = True
        return result
