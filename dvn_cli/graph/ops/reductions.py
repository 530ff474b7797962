"""Operators that look at all elements along some dimensions: of channels at those that are left."""

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import as_it_is
from dvn_cli.graph.ops.pointwise import pointwise
from dvn_cli.graph.registry import enter


def _reduced(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    labels, dims = call.labels("self"), call.dims()
    vectors = labeller.separate(labels, avoid=dims)
    remaining = [d for d in range(len(labels.shape)) if d not in dims]

    def output(shape: tuple[int, ...]) -> Labels:
        to = {d: (d if len(shape) == len(labels.shape) else remaining.index(d)) for d in remaining}
        return from_vectors(shape, {to[d]: v for d, v in vectors.items() if d in to})

    return call.outputs(output)


enter(
    *("mean", "sum", "amax", "amin", "all", "any", "linalg_vector_norm", "norm", "logsumexp"),
    *("var", "std", "var_mean", "std_mean"),
    label=_reduced,
    rewrite=as_it_is,
)


def _place(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """A place is that of the whole only where nothing along the dimensions is dropped."""
    dims = call.dims()
    for dim, vector in labeller.separate(call.labels("self"), avoid=dims).items():
        if dim in dims:
            labeller.pin(vector)
    return _reduced(labeller, call)


enter("argmax", label=_place, rewrite=as_it_is)


def _extreme(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """Of two tensors, or of the elements of one, with their places."""
    if "other" in call.args:
        return pointwise(labeller, call.tensors(), call.shape)
    places = call.has_several_outputs and any(user.args[1] == 1 for user in call.node.users)
    return (_place if places else _reduced)(labeller, call)


enter("max", "min", label=_extreme, rewrite=as_it_is)


def _along(labeller: Labeller, call: Call) -> Labels:
    """Where in a head, or which head, is not their choice."""
    labels = call.labels("self")
    return from_vectors(labels.shape, labeller.separate(labels, avoid=call.dims()))


enter("softmax", "_softmax", "log_softmax", label=_along, rewrite=as_it_is)


def _cumulative(labeller: Labeller, call: Call) -> Labels:
    """Each element is made of those before it: nothing along the dimension is dropped."""
    labels, (dim,) = call.labels("self"), call.dims()
    vectors = labeller.separate(labels, avoid=[dim])
    if dim in vectors:
        labeller.pin(vectors.pop(dim))
    return from_vectors(labels.shape, vectors)


enter("cumsum", label=_cumulative, rewrite=as_it_is)
