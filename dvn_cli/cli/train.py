"""`dvn train`: all networks of a recipe, trained."""

from pathlib import Path
from typing import Annotated

import typer

from dvn_cli.errors import InputError


def train_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe's file, - for stdin, or the name of one that comes with dvn: digits."
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train the networks of all tasks and levels, as a recipe says."""
    if keys:
        if recipe is not None:
            raise InputError("--keys shows the keys of all recipes: leave out the recipe")
        return show_keys(as_json)
    if recipe is None:
        raise InputError("Missing argument 'RECIPE': give a recipe's file, or the name of one that comes with dvn")
    if resume and force:
        raise InputError("--resume or --force, not both: the one goes on with what the other replaces")

    import json

    from dvn_cli import report

    err = report.console(stderr=True)
    with err.status("importing torch"):
        from dvn_cli.cli.watching import Terminal
        from dvn_cli.evaluation import rendering
        from dvn_cli.training.experiment import Trained, train

    def show(trained: Trained) -> None:
        if as_json:
            results = [result.to_dict() for result in trained.results]
            typer.echo(json.dumps({"checkpoint": str(output), "results": results}, indent=2))
        else:
            report.show(report.console(), rendering.accuracy_table(trained.results))

    with Terminal(err, show) as terminal:
        trained = train(
            recipe, output, overrides=overrides or [], device=device, resume=resume, force=force, observer=terminal
        )
    if terminal.session is not None:
        terminal.note(f"{output} is written; {trained.record} says how it went")
    elif as_json:  # nothing was left to do
        show(trained)


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
