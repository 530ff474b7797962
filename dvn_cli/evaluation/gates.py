"""Whether networks are good enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dvn_cli.evaluation.measure import Evaluation


@dataclass(frozen=True)
class Gate:
    """Whether every network reaches an accuracy, in per cent, and the one that is furthest below or lowest above it."""

    min_accuracy: float
    passed: bool
    worst: Evaluation


def gate(rows: Sequence[Evaluation], min_accuracy: float) -> Gate:
    """Judges rows; a loss that is not finite does not pass."""
    worst = min(rows, key=lambda row: (math.isfinite(row.loss), row.top1))
    return Gate(min_accuracy, math.isfinite(worst.loss) and worst.top1 >= min_accuracy, worst)


def failure(rows: Sequence[Evaluation], judged: Gate | None) -> str | None:
    """What is wrong with the worst row, in one line; None where nothing is."""
    broken = [row for row in rows if not math.isfinite(row.loss)]
    if broken:
        return f"{broken[0]}: the loss is not a number ({len(broken)} of {len(rows)} networks)"
    if judged is None or judged.passed:
        return None
    below = sum(row.top1 < judged.min_accuracy for row in rows)
    reached = math.floor(judged.worst.top1 * 100) / 100  # 94.996 is no 95
    asked = f"{judged.min_accuracy:g} %"
    return f"{judged.worst} reaches {reached:.2f} %, not {asked} ({below} of {len(rows)} networks are below)"
