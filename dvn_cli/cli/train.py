"""`dvn train`: all networks of a recipe, trained."""

from pathlib import Path
from typing import Annotated

import typer

from dvn_cli.errors import InputError


def train_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe's file, - for stdin, or the name of one that comes with dvn (see --list)."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to override.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("dvn.safetensors"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run whose files are there: interrupted, or finished with fewer epochs. Where there is "
            "none, start; where nothing is left to do, end.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trained checkpoint or the state of an interrupted run.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    keys: Annotated[
        bool, typer.Option("--keys", help="Show every key of a recipe: type, default and meaning; train nothing.")
    ] = False,
    log: Annotated[
        list[Path] | None,
        typer.Option(
            help="Keep the figures of every epoch here too: a file that ends with .csv or .jsonl, or a folder for "
            "TensorBoard. Can be given again."
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the recipes that come with dvn; train nothing.")] = False,
    show_: Annotated[
        bool,
        typer.Option("--show", help="Print RECIPE with all its keys and what overrides them, as YAML; train nothing."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Take two steps and say what the run will take: time, memory; write nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train the networks of all tasks and levels, as a recipe says."""
    if sum((keys, list_, show_, dry_run)) > 1:
        raise InputError("give one of --keys, --list, --show and --dry-run")
    if keys:
        if recipe is not None:
            raise InputError("--keys shows the keys of all recipes: leave out the recipe")
        return show_keys(as_json)
    if list_:
        if recipe is not None:
            raise InputError("--list lists all recipes: leave out the recipe, or give --show")
        return list_recipes(as_json)
    if recipe is None:
        raise InputError("Missing argument 'RECIPE': give a recipe's file, or the name of one that comes with dvn")
    if show_:
        return show_recipe(recipe, overrides or [], as_json)
    if resume and force:
        raise InputError("--resume or --force, not both: the one goes on with what the other replaces")

    import json
    from dataclasses import asdict
    from datetime import timedelta

    from dvn_cli import report

    err = report.console(stderr=True)
    with err.status("importing torch"):
        from dvn_cli.cli.watching import Terminal
        from dvn_cli.evaluation import rendering
        from dvn_cli.training.experiment import Trained, train
        from dvn_cli.training.experiment import dry_run as rehearse
        from dvn_cli.training.logs import log as logger

    def show(trained: Trained) -> None:
        if as_json:
            results = [result.to_dict() for result in trained.results]
            typer.echo(json.dumps({"checkpoint": str(output), "results": results}, indent=2))
        else:
            report.show(report.console(), rendering.accuracy_table(trained.results))

    if dry_run:
        with Terminal(err, show) as terminal:
            told = rehearse(recipe, overrides=overrides or [], device=device, observer=terminal)
        if as_json:
            return typer.echo(json.dumps(asdict(told), indent=2))
        memory = "" if told.peak_memory_bytes is None else f", {told.peak_memory_bytes / 1e6:,.0f} MB of memory"
        return typer.echo(
            f"{told.steps:,} steps of {told.seconds_per_step:.3g} s ({told.images_per_s:,.0f} images/s): "
            f"{timedelta(seconds=round(told.seconds))} (h:mm:ss) without validation{memory}"
        )
    logs = [logger(path, force) for path in log or []]
    with Terminal(err, show) as terminal:
        observers = [*logs, terminal]  # the terminal shows the results, which may fail, last
        trained = train(
            recipe, output, overrides=overrides or [], device=device, resume=resume, force=force, observer=observers
        )
    if terminal.session is not None:
        terminal.note(f"{output} is written; {trained.record} says how it went")
    elif as_json:  # nothing was left to do
        show(trained)


def list_recipes(as_json: bool) -> None:
    """Prints the recipes that come with dvn."""
    import json
    from dataclasses import asdict

    from dvn_cli import report
    from dvn_cli.training.recipes import described

    found = described()
    if as_json:
        typer.echo(json.dumps({"recipes": [asdict(recipe) for recipe in found]}, indent=2))
        return
    shown = report.table("recipe", "scales", "what it trains", text=3)
    shown.columns[0].no_wrap = True
    for recipe in found:
        shown.add_row(recipe.name, ", ".join(recipe.scales), recipe.meaning)
    report.show(report.console(), shown)


def show_recipe(recipe: str, overrides: list[str], as_json: bool) -> None:
    """Prints a recipe as it is trained: what it does not say at its default, and what is overridden as it is then."""
    import json
    import shlex

    import yaml

    from dvn_cli.training import recipes

    content = recipes.read(recipes.find(recipe), overrides).model_dump(mode="json")
    content |= {"scale": "full", "setting": "paper"}  # all that they override is there already
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        typer.echo(f"# dvn train {shlex.join([recipe, *overrides])}")
        typer.echo(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), nl=False)


def show_keys(as_json: bool) -> None:
    """Prints every key of a recipe."""
    import json
    from dataclasses import asdict

    from dvn_cli import report
    from dvn_cli.training.keys import recipe_keys

    found = recipe_keys()
    if as_json:
        typer.echo(json.dumps({"keys": [asdict(key) for key in found]}, indent=2))
        return
    shown = report.table("key", "type and default", "meaning", text=3)
    shown.columns[0].no_wrap = True
    for key in found:
        text = key.default if isinstance(key.default, str) else json.dumps(key.default)
        default = "\nrequired" if key.required else "" if key.default is None else f"\ndefault: {text}"
        shown.add_row(key.key, key.type + default, key.meaning)
    report.show(report.console(), shown)
