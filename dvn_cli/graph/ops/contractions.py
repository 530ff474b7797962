"""Sums of products: a sum over channels is taken over those that are left."""

from collections.abc import Sequence

from torch import Tensor

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import as_it_is
from dvn_cli.graph.registry import enter
from dvn_cli.graph.trace import refusal


def contract(
    labeller: Labeller,
    operands: Sequence[tuple[Labels, Sequence[str]]],
    output: Sequence[str],
    shape: tuple[int, ...],
    prefer: str = "",
) -> Labels:
    """A sum of products, written as in einsum: each operand with a letter for each of its dimensions.

    A letter is one dimension wherever it stands. Where labels vary along several dimensions, `prefer` is the one that
    stays.
    """
    by_letter: dict[str, list[Tensor]] = {}
    for labels, letters in operands:
        vectors = labeller.separate(labels, prefer=[dim for dim, letter in enumerate(letters) if letter == prefer])
        for dim, letter in enumerate(letters):
            if labels.shape[dim] > 1:
                by_letter.setdefault(letter, []).append(vectors.get(dim, labels.zeros(dim)))
    for same in by_letter.values():
        labeller.unite_all(same)
    ends = {dim: by_letter[letter][0] for dim, letter in enumerate(output) if letter in by_letter}
    return from_vectors(shape, {dim: labeller.coupled.find(vector) for dim, vector in ends.items()})


def unite_bias(labeller: Labeller, call: Call, outputs: Tensor) -> None:
    """Unites the output channels of a layer with its bias, where it has one."""
    bias = call.optional("bias")
    if bias is not None:
        labeller.coupled.unite(outputs, labeller.separate(bias).get(0, bias.zeros(0)))


def _linear(labeller: Labeller, call: Call) -> Labels:
    x, weight = call.labels("input"), call.labels("weight")
    batch = [f"b{d}" for d in range(len(x.shape) - 1)]
    out = labeller.separate(weight).get(0)
    if out is not None:
        labeller.coupled.mark_produced(out)
        unite_bias(labeller, call, out)
    return contract(labeller, [(x, [*batch, "k"]), (weight, ["j", "k"])], [*batch, "j"], call.shape, prefer="k")


enter("linear", label=_linear, rewrite=as_it_is, reads=lambda arguments: (-1, 1))


def _matmul(labeller: Labeller, call: Call) -> Labels:
    a, b = call.tensors()
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise refusal(call.node, "with a vector")
    rank = len(call.shape)
    letters = [f"b{d}" for d in range(rank - 2)]
    left = [*letters[rank - len(a.shape) :], "i", "k"]
    right = [*letters[rank - len(b.shape) :], "k", "j"]
    return contract(labeller, [(a, left), (b, right)], [*letters, "i", "j"], call.shape)


enter("matmul", "bmm", "mm", label=_matmul, rewrite=as_it_is)


def _einsum(labeller: Labeller, call: Call) -> Labels:
    equation = call.plain("equation").replace(" ", "")
    if "." in equation or "->" not in equation:
        raise refusal(call.node, f"as '{equation}'")
    left, output = equation.split("->")
    return contract(labeller, list(zip(call.several("tensors"), left.split(","), strict=True)), output, call.shape)


enter("einsum", label=_einsum, rewrite=as_it_is)
