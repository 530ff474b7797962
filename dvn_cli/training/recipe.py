"""A recipe: one typed definition that is the file's schema, its validation and its documentation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dvn_cli.data import DataSpec
from dvn_cli.errors import InputError, did_you_mean

FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
"""Where the recipes that come with dvn are: in an installed package, or in a checkout."""

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0, strict=True)]  # strict: `true` is not 1


class Keys(BaseModel):
    """A part of a recipe: a key that nothing reads is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneKeys(Keys):
    name: str = Field(description="a timm or torchvision model, or one of the paper's: wrn_32_4, resnet_42")
    input_size: Count | tuple[Count, Count] | None = Field(
        default=None, description="pixels at which the stem has the backbone's own stride; the smallest task's images"
    )
    in_chans: Literal[1, 3] | None = Field(default=None, description="channels of the images; the backbone's own")
    weights: str | None = Field(default=None, description="a file of weights to start from, relative to the recipe")
    pretrained: bool = Field(default=False, description="start from the weights that timm or torchvision publishes")

    @model_validator(mode="after")
    def _consistent(self) -> "BackboneKeys":
        if self.weights is not None and self.pretrained:
            raise ValueError("give weights or pretrained, not both")
        return self


class TaskKeys(Keys):
    name: str = Field(min_length=1, description="by which commands may call the task")
    data: DataSpec = Field(description="where its images come from, and which of them")
    order: list[Count] | None = Field(
        default=None, description="the units in the order that the task takes them; by the paper's rule (section 3.2)"
    )
    levels: list[Count] | None = Field(
        default=None, description="for each level how many units it has, ascending; the recipe's levels"
    )


class OptimizerKeys(Keys):
    name: Literal["sgd", "adamw"] = Field(default="sgd", description="of torch.optim")
    lr: float = Field(default=0.1, gt=0, le=1e30, description="the highest learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd: momentum; adamw: beta 1")
    nesterov: bool = Field(default=True, description="sgd: Nesterov's momentum (section 4.2)")
    weight_decay: float = Field(default=5e-4, ge=0, le=1e30, description="WRN's published setting")
    decay_norms: bool = Field(default=True, description="decay norms and biases too (vectors), as WRN does")


class ScheduleKeys(Keys):
    name: Literal["step", "cosine", "constant"] = Field(default="step", description="of the learning rate")
    milestones: list[Share] = Field(
        default=[0.3, 0.6, 0.8], description="step: shares of the run after which it drops (WRN: 60, 120, 160 of 200)"
    )
    gamma: float = Field(default=0.2, gt=0, le=1, description="step: the factor it drops by (WRN's)")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the run during which it rises from 0")


class Recipe(Keys):
    """What is trained, on what, and how. Keys of a file; any can be overridden as `key=value`, `tasks.0.name=x`."""

    backbone: BackboneKeys | None = Field(default=None, description="the network that is divided into units")
    partition: str | None = Field(
        default=None, description="in place of backbone and units: a checkpoint of `dvn partition` to start from"
    )
    units: Count | None = Field(default=None, description="into how many units the backbone is divided")
    tasks: list[TaskKeys] = Field(min_length=1, description="task 1 first")
    levels: list[Count] | None = Field(
        default=None, description="for each level how many units it has, ascending; one unit more at each level"
    )
    epochs: Count = Field(default=200, description="passes over the task with the most images")
    batch_size: Count = Field(default=128, description="images of each task in a step (section 4.2: CIFAR)")
    optimizer: OptimizerKeys = Field(default=OptimizerKeys(), description="how the weights are moved")
    schedule: ScheduleKeys = Field(default=ScheduleKeys(), description="of the learning rate over the run")
    reduction: Literal["sum", "mean"] = Field(
        default="sum", description="of the losses of all networks in a step: their sum (eq. 4) or their mean"
    )
    select: Literal["last", "best"] = Field(
        default="last", description="keep the last epoch, or the best on the validation images (mean of all networks)"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast where it is safe")
    threads: Annotated[Count, Field(le=1024)] | None = Field(
        default=None, description="of the CPU; torch's own choice. Networks of a few thousand weights want 1"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, strict=True, description="of initialisation, order and augmentation")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.backbone is None) == (self.partition is None):
            raise ValueError("give either backbone (with units) or partition")
        if self.backbone is not None and self.units is None:
            raise ValueError("units is missing: into how many is the backbone divided?")
        if self.partition is not None and self.units is not None:
            raise ValueError("units is given by the partition")
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two tasks have the name '{twice}'")
        if self.select == "best" and any(task.data.validation == 0 for task in self.tasks):
            raise ValueError("select best needs validation images in every task: test images choose nothing")
        return self


def shipped() -> dict[str, Path]:
    """The recipes that come with dvn, by name."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file of a recipe, given by path or by the name of one that comes with dvn."""
    if Path(recipe).is_file():
        return Path(recipe)
    known = shipped()
    if recipe in known:
        return known[recipe]
    hint = did_you_mean(recipe, known) or f": give a file, or the name of one that comes with dvn, {', '.join(known)}"
    raise InputError(f"there is no recipe '{recipe}'{hint}")


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` with dotted keys, `optimizer.lr=0.05`, `tasks.0.data.train_images=100`; values in YAML.

    Raises:
        InputError: not YAML, an unknown key, a value of the wrong type or out of range: the first of them.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no text, or a date that there is not
        raise InputError(f"cannot read the recipe '{path}': {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is no recipe: a recipe is a mapping of keys")
    for override in overrides:
        override_key(content, override)
    return parse(content, str(path))


def parse(content: Mapping[str, Any], origin: str) -> Recipe:
    """Checks a recipe that has been read already; `origin` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_problem(error, Recipe)}") from None


def override_key(content: dict[str, Any], override: str) -> None:
    """Sets the key that `key=value` names, the value in YAML, in what a file had."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"'{override}' is no override: give key=value, such as optimizer.lr=0.05")
    try:
        value = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        raise InputError(f"the value of {key} is not YAML: {text}") from None
    *parents, last = key.split(".")
    place: Any = content
    for index, part in enumerate(parents):
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = _inside(place, part, ".".join(parents[: index + 1]))
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"{key}: {'.'.join(parents)} has no keys")


def _inside(place: Any, part: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, path)]
    if isinstance(place, dict):
        return place[part]
    raise InputError(f"{path}: there is nothing of that name")


def _index(place: list[Any], part: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        allowed = f"give a number from 0 to {len(place) - 1}" if place else "the list is empty"
        raise InputError(f"{path}: {allowed}")
    return int(part)


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's errors in one line, with the nearest key where one is unknown."""
    problem = error.errors(include_url=False)[0]
    path = [part for part in problem["loc"] if not _is_choice(part)]
    where = ".".join(map(str, path))
    if problem["type"] == "extra_forbidden":
        keys = _keys_at(model, path[:-1])
        return f"unknown key '{where}'{did_you_mean(path[-1], keys) or '; known here: ' + ', '.join(keys)}"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = problem["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{where}: {message}{shown}" if where else message


def _is_choice(part: int | str) -> bool:
    """Whether a part of an error's place is not a key, but which of several types did not fit."""
    return isinstance(part, str) and (part.endswith("]") or part in ("int", "str", "constrained-int"))


def _keys_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation), *(a for t in get_args(annotation) for a in get_args(t))]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
