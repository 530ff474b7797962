"""The entries of all operators, by kind; importing this package enters them."""

from dvn_cli.graph.ops import (  # noqa: F401
    attention,
    contractions,
    convolutions,
    factories,
    joins,
    moves,
    norms,
    pointwise,
    recurrent,
    reductions,
    spatial,
)
