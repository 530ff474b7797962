"""A checkpoint as one HTML page that needs nothing else: its networks, how good they are, and what they get wrong."""

import base64
import html
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from PIL import Image
from torch import Tensor

from dvn_cli import report
from dvn_cli.data import Split
from dvn_cli.errors import InputError
from dvn_cli.evaluation import charts
from dvn_cli.evaluation.costs import Costs, NetworkCost
from dvn_cli.evaluation.measure import Evaluation, Loaded
from dvn_cli.export import Manifest, SliceSize
from dvn_cli.files import atomic, encoded
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_run
from dvn_cli.store.metadata import CheckpointMetadata, Task
from dvn_cli.store.slicing import count

WEAKEST = 3
"""Classes of a task that are shown."""

THUMBNAILS = 6
"""Wrongly told images of a class that are shown."""

MOST_TASKS = 12
"""Whose classes are shown: the page stays small."""

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; } .wide + .wide { margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: GrayText; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; } tbody th { font-weight: inherit; }
td:only-of-type { white-space: normal; overflow-wrap: anywhere; }
td.unit { color: #fff; text-align: center; min-width: 2rem; font-weight: bold; }
td.level { border-right: 3px solid CanvasText; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
img { width: 64px; height: 64px; object-fit: contain; image-rendering: pixelated; border: 1px solid var(--line); }
.wrong figure { display: inline-block; margin: .25rem; font-size: .8rem; width: 5.5rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .5rem; }
@media print {
  body { max-width: none; font-size: 11px; }
  h2, h3, .wrong p { break-after: avoid; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 9px; } th, td { padding: .1rem .3rem; }
  .charts { grid-template-columns: 1fr 1fr; } td.unit { print-color-adjust: exact; }
}
"""


def check(loaded: Sequence[Loaded], costs: Costs | None, manifests: Sequence[Manifest] = ()) -> None:
    """Raises InputError unless what was opened is one checkpoint, which all else is of, and matplotlib is there."""
    if len(loaded) != 1 or not isinstance(loaded[0].module, DeepVirtualNetwork) or loaded[0].file is None:
        raise InputError("--report is of one checkpoint: give one, and no slices")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--report needs matplotlib: pip install 'dvn[plot]'")
    header = loaded[0].header
    params = {
        (header.metadata.numbered_tasks[task].name, level): count(header, task, level).params  # type: ignore[arg-type]
        for task, level in header.metadata.networks
    }
    given: list[tuple[str, NetworkCost | SliceSize]] = [("--costs", each) for each in (costs.results if costs else ())]
    given += [("--slices", each) for manifest in manifests for each in manifest.slices]
    for option, each in given:
        if params.get((each.name, each.level)) != each.params:
            raise InputError(
                f"{option} is of another checkpoint: its task '{each.name}', level {each.level} is not here"
            )


def write(
    path: Path,
    loaded: Sequence[Loaded],
    rows: Sequence[Evaluation],
    costs: Costs | None,
    manifests: Sequence[Manifest] = (),
) -> None:
    """Writes the page.

    Args:
        path: where to.
        loaded: the checkpoint, see `check`.
        rows: what came of its networks.
        costs: what they cost, where that was measured.
        manifests: what their files weigh in some formats.

    Raises:
        InputError: matplotlib is missing, or as `atomic`.
        DvnError: as `atomic`.
    """
    (opened,) = loaded
    title = html.escape(Path(str(opened.file)).name)
    body = "\n".join(
        part
        for part in (
            _orders(opened),
            _networks(opened, rows, manifests),
            _costs(rows, costs),
            _training(opened),
            _wrong(opened, rows),
        )
    )
    metadata = opened.header.metadata
    what = f"{metadata.backbone.name} in {metadata.units} units; tasks: {len(metadata.numbered_tasks)}"
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>
<body><main><h1>{title}</h1><p>{html.escape(what)}</p>
{body}
</main></body></html>
"""
    with atomic(path) as file:
        file.write(encoded(page))


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    cells = (map(html.escape, row) for row in rows)
    body = "".join(f'<tr><th scope="row">{name}</th><td>{"</td><td>".join(row)}</td></tr>' for name, *row in cells)
    return (
        f'<div class="wide" tabindex="0"><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _orders(opened: Loaded) -> str:
    """The order of the units of each task, a colour for each unit (Figure 3 of the paper)."""
    rows = []
    for number, task in opened.header.metadata.numbered_tasks.items():
        cells = "".join(
            f'<td class="unit{" level" if place in task.levels else ""}" '
            f'style="background: hsl({(unit - 1) * 137.5 % 360:.0f} 55% 35%)">{unit}</td>'
            for place, unit in enumerate(task.order, 1)
        )
        rows.append(f'<tr><th scope="row">{number} {html.escape(task.name)}</th>{cells}</tr>')
    learned = [(number, task) for number, task in opened.header.metadata.numbered_tasks.items() if task.affinity]
    agreement = _table(
        "The orders were learned: the cosine between what two tasks want of the shared weights, by their gradients.",
        ("task", *(str(number) for number, _ in learned)),
        [(f"{number} {task.name}", *(f"{cosine:.2f}" for cosine in task.affinity)) for number, task in learned],
    )
    return (
        '<h2>The order of the units</h2><div class="wide" tabindex="0"><table><caption>Each task takes the units from '
        f"the left; a level ends at each bar.</caption><tbody>{''.join(rows)}</tbody></table></div>"
        f"{agreement if learned else ''}"
    )


def _networks(opened: Loaded, rows: Sequence[Evaluation], manifests: Sequence[Manifest]) -> str:
    module, header = opened.module, opened.header
    assert isinstance(module, DeepVirtualNetwork)
    sizes = {"safetensors": {(row.name, row.level): count(header, row.task, row.level).bytes for row in rows}}  # type: ignore[arg-type]
    sizes |= {
        str(manifest): {(each.name, each.level): each.bytes for each in manifest.slices} for manifest in manifests
    }
    cells = [
        (
            f"{row.task} {row.name}",
            str(row.level),
            f"{row.top1:.2f}",
            report.limits(row.interval),
            f"{row.params:,}",
            report.percent(row.density),
            report.short(module.macs(row.task, row.level)),
            *(f"{of[row.name, row.level] / 1e6:,.2f}" if (row.name, row.level) in of else "-" for of in sizes.values()),
            " ".join(map(str, row.units)),
            "-" if row.top5 is None else f"{row.top5:.2f}",
            f"{row.loss:.3f}",
            f"{row.images:,}",
        )
        for row in rows
    ]
    names = ("task", "level", "top-1, %", "95 % CI", "parameters", "density", "MACs")
    columns = (*names, *(f"{name}, MB" for name in sizes), "units", "top-5, %", "loss", "images")
    return "<h2>Networks</h2>" + _table("On test images; 95 % CI: Wilson's interval of top-1.", columns, cells)


def _figure(svg: str, caption: str) -> str:
    caption = html.escape(caption, quote=True)
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'


def _costs(rows: Sequence[Evaluation], costs: Costs | None) -> str:
    caption = "Accuracy with its 95 % interval over {}; a line joins the networks of a task that no cheaper one beats."
    params = {(row.name, row.level): float(row.params) for row in rows}
    figures, lines = [_figure(charts.over_costs(rows, params, "parameters"), caption.format("parameters"))], []
    if costs is not None:
        forms = dict.fromkeys(each.format for each in costs.results)  # what runs a network decides how fast it is
        for form in forms or [None]:
            latency = {(each.name, each.level): each.latency_ms["p50"] for each in costs.results if each.format == form}
            as_form = f" as {form}" if form else ""
            if latency.keys().isdisjoint(params):
                lines.append(f"<p>The costs hold no latency{html.escape(as_form)} of these networks.</p>")
                continue
            label = f"milliseconds{as_form}, batch of {costs.batch_size}, {costs.device_name}"
            figures.append(_figure(charts.over_costs(rows, latency, label), caption.format(f"latency{as_form}")))
    return f'<h2>What accuracy costs</h2><div class="charts">{"".join(figures)}</div>{"".join(lines)}'


def _training(opened: Loaded) -> str:
    """Curves from the record beside the checkpoint, and how it was trained from its own metadata."""
    metadata = opened.header.metadata
    if not isinstance(metadata, CheckpointMetadata) or metadata.training is None:
        return "<h2>Training</h2><p>The networks are not trained.</p>"
    training, figures = metadata.training, []
    try:
        epochs = read_run(opened.header)["epochs"]
        names = [task.name for task in metadata.tasks]
        for key, label in (("validation", "top-1 on validation images, %"), ("loss", "training loss")):
            svg = charts.over_epochs(epochs, names, key, label)
            figures += [] if svg is None else [_figure(svg, f"{label.capitalize()} over epochs.")]
    except (InputError, LookupError, TypeError, ValueError):  # it is missing, or not of this run
        figures = ["<p>There is no record of this run beside the checkpoint.</p>"]
    facts = {"epochs": training.epochs, "seed": training.recipe.get("seed"), "device": training.device}
    facts |= {"commit": training.commit, "threads": training.threads, **training.versions}
    caption = "How it was trained" + ("; the commit is the working directory's." if training.commit else ".")
    told = [(key, str(value)) for key, value in facts.items() if value is not None]
    recipe = html.escape(yaml.safe_dump(dict(training.recipe), sort_keys=False, allow_unicode=True))
    return (
        f'<h2>Training</h2><div class="charts">{"".join(figures)}</div>{_table(caption, ("", ""), told)}'
        f"<details><summary>The whole recipe</summary><pre>{recipe}</pre></details>"
    )


def _wrong(opened: Loaded, rows: Sequence[Evaluation]) -> str:
    """The classes that the top level of each task tells worst, and images of them."""
    tops = {row.task: row for row in rows}  # of each task the last one
    parts = []
    for row in sorted(tops.values(), key=lambda row: row.top1)[:MOST_TASKS]:
        task = opened.header.metadata.numbered_tasks[row.task]
        parts.append(f"<h3>{html.escape(row.name)}, level {row.level}</h3>")
        parts += _weakest(task, row, opened.splits[row.task])
    return f'<h2>What is told wrongly</h2><section class="wrong">{"".join(parts)}</section>'


def _weakest(task: Task, row: Evaluation, split: Split) -> Iterator[str]:
    predicted, labels = row.predicted, row.labels
    assert predicted is not None
    assert labels is not None
    right = {label: float((predicted[labels == label] == label).float().mean()) for label in labels.unique().tolist()}
    weakest = [label for label in sorted(right, key=lambda label: right[label]) if right[label] < 1][:WEAKEST]
    if not weakest:
        yield "<p>No image is.</p>"
    for label in weakest:
        wrong = ((labels == label) & (predicted != label)).nonzero().flatten()
        taken, times = predicted[wrong].unique(return_counts=True)
        most = sorted(zip(times.tolist(), taken.tolist(), strict=True), reverse=True)[:3]
        told = ", ".join(f"{_class(task, other)} ({number})" for number, other in most)
        of = int((labels == label).sum())
        yield (
            f"<p><strong>{html.escape(task.classes[label])}</strong>: {100 * right[label]:.1f} % of {of} images are "
            f"told right; wrongly told as {html.escape(told)}.</p>"
        )
        if len(labels) == len(split):  # no image was left out
            shown = wrong[:THUMBNAILS]
            for image, other in zip(split.subset(shown).images, predicted[shown].tolist(), strict=True):
                name = html.escape(_class(task, other), quote=True)
                alt = html.escape(f"{task.classes[label]} told as {_class(task, other)}", quote=True)
                yield f'<figure><img src="{_thumbnail(image)}" alt="{alt}"><figcaption>{name}</figcaption></figure>'


def _class(task: Task, label: int) -> str:
    return "nothing, the output is no number" if label < 0 else task.classes[label]


def _thumbnail(pixels: Tensor) -> str:
    """A picture of 64 pixels or fewer as a data URI; `pixels`: uint8 (C, H, W)."""
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    picture.thumbnail((64, 64))
    opened = io.BytesIO()
    picture.save(opened, "PNG" if max(picture.size) <= 32 else "JPEG")
    kind = "png" if max(picture.size) <= 32 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(opened.getvalue()).decode()}"
