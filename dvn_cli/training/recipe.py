"""A recipe: one typed definition that is the file's schema, its validation and its documentation."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dvn_cli.data import DataSpec
from dvn_cli.data.spec import MAY_DIFFER
from dvn_cli.errors import did_you_mean
from dvn_cli.training.methods import METHODS, together

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0, strict=True)]  # strict: `true` is not 1


class Keys(BaseModel):
    """A part of a recipe: a key that nothing reads is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneKeys(Keys):
    name: str = Field(
        description="Name of the network: a timm or torchvision model, one of the paper's (wrn_32_4, resnet_42), or"
        " package.module:factory."
    )
    input_size: Count | tuple[Count, Count] | None = Field(
        default=None,
        description="Height and width in pixels at which the stem keeps the backbone's own stride. By default those"
        " of the smallest task's images.",
    )
    in_chans: Literal[1, 3] | None = Field(
        default=None, description="Number of channels of the images. By default the backbone's own."
    )
    weights: str | None = Field(
        default=None,
        description="File of weights to start from (safetensors or a torch state dict), relative to the recipe.",
    )
    pretrained: bool = Field(
        default=False, description="Start from the weights that timm or torchvision publishes for this model."
    )
    zero_init_last: bool = Field(
        default=False,
        description="Initialise the last norm of every residual branch to zero, in models whose blocks support it. It "
        "makes no difference to a backbone that starts from weights.",
    )

    @property
    def has_weights(self) -> bool:
        """Whether it starts from weights; otherwise they are random."""
        return self.weights is not None or self.pretrained

    @model_validator(mode="after")
    def _consistent(self) -> "BackboneKeys":
        if self.weights is not None and self.pretrained:
            raise ValueError("give weights or pretrained, not both")
        return self


class TaskKeys(Keys):
    name: str = Field(min_length=1, description="Name by which commands refer to the task.")
    data: DataSpec = Field(description="Where the task's images come from, and which of them it uses.")
    order: list[Count] | None = Field(
        default=None,
        description="Order in which the task adds units, each of 1 to `units` once. By default as `orders` says.",
    )
    levels: list[Count] | None = Field(
        default=None,
        description="Number of units in each level of this task, ascending. By default the recipe's `levels`.",
    )
    batch_size: Annotated[Count, Field(le=10**6)] | None = Field(
        default=None, description="Images of this task in every step. By default the recipe's `batch_size`."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1e30,
        description="Factor on this task's losses by labels or `teacher`, not on those that hold it later.",
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="balanced: the loss of an image counts by how rare its class is among the training images, so that "
        "all classes count alike; images are drawn as they are. It acts on networks that learn from labels: with "
        "`teacher: top` or `next` on top levels alone, and with `teacher: FILE` on none, and is refused.",
    )


class OptimizerKeys(Keys):
    name: str = Field(
        default="sgd",
        description="sgd or adamw, which are torch's, or another of timm's by its name: lamb, lion, muon, ... (all"
        " that `timm.optim.list_optimizers()` lists but adahessian, kron, and those of bitsandbytes and APEX).",
    )
    lr: float = Field(default=0.1, gt=0, le=1e30, description="Peak learning rate; the schedule scales it.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD; beta 1 of AdamW.")
    nesterov: bool = Field(default=True, description="Use Nesterov momentum with SGD (section 4.2 of the paper).")
    weight_decay: float = Field(
        default=5e-4,
        ge=0,
        le=1e30,
        description="Weight decay. The default is the published one of wide residual networks.",
    )
    decay_norms: bool = Field(
        default=True,
        description="Apply weight decay to norms and biases (all vectors) too, as wide residual networks do. Without it"
        " they have none, nor has what timm's `no_weight_decay` names, such as position embeddings.",
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Factor on the learning rate from one layer to the one below, the classifier having the whole; "
        "layers are timm's. By default all layers have the same.",
    )
    norm_lr_factor: float = Field(
        default=1.0, gt=0, le=1e30, description="Factor on the learning rate of the weights and biases of norms."
    )
    clip_grad: float | None = Field(
        default=None, gt=0, le=1e30, description="Largest norm of all gradients together; larger ones are scaled down."
    )

    @model_validator(mode="after")
    def _known(self) -> "OptimizerKeys":
        if self.name not in ("sgd", "adamw"):
            import timm.optim

            # The others want second derivatives or libraries of their own, or keep what no file of tensors can hold.
            known = set(map(str, timm.optim.list_optimizers(exclude_filters=["adahessian", "bnb*", "fused*", "kron*"])))
            if self.name not in known:
                raise ValueError(f"no optimizer '{self.name}'{did_you_mean(self.name, known)}")
        return self


class ScheduleKeys(Keys):
    name: Literal["step", "cosine", "constant", "poly", "tanh"] = Field(
        default="step",
        description="Learning rate schedule over the run, evaluated at every step: poly and tanh as timm's.",
    )
    milestones: list[Share] = Field(
        default=[0.3, 0.6, 0.8],
        description="step: fractions of the run after which the learning rate drops (the default is epochs 60, 120 "
        "and 160 of 200).",
    )
    gamma: float = Field(
        default=0.2, gt=0, le=1, description="step: factor by which the learning rate is multiplied at each milestone."
    )
    power: float = Field(
        default=1.0, gt=0, le=1e30, description="poly: exponent; with 1 the learning rate falls linearly."
    )
    min_factor: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="cosine, poly, tanh: share of the peak learning rate that is left at the end.",
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="Fraction of the run during which the learning rate rises linearly from 0."
    )


class SaveKeys(Keys):
    steps: Count | None = Field(
        default=None, description="Write the state that a run is resumed from after so many steps of an epoch too."
    )
    minutes: float | None = Field(
        default=None, gt=0, le=1e30, description="Write it after the first step that ends so long after the last time."
    )


class SequentialKeys(Keys):
    old: Literal["frozen", "distilled"] | None = Field(
        default=None,
        description="What becomes of earlier tasks' networks when another task comes. frozen: they stay what they are, "
        "to the bit; the task trains a unit that none of them has, which is its level 1, what connects it with theirs, "
        "and what it has of its own. distilled: all is trained, and they learn to give the outputs that they gave "
        "(section 3.3). By default frozen while a unit is free, else distilled. Of the methods, dvn alone leaves the "
        "choice.",
    )
    grow: bool = Field(
        default=False,
        description="Each task adds one unit and the last task the last one; otherwise all units exist from the "
        "start. It makes no difference to methods with one level a task.",
    )
    replay: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0,
        description="Number of training images of each earlier task of the recipe that are kept, for distilled: its "
        "networks learn to give their old outputs on these and on the new task's images. By default none, as in the "
        "paper.",
    )
    temperature: float = Field(
        default=2.0,
        gt=0,
        le=1e30,
        description="Temperature of the distillation that keeps old tasks' outputs as they were (learning without "
        "forgetting).",
    )
    weight: float = Field(
        default=1.0, ge=0, le=1e30, description="Weight of that distillation loss relative to the new task's losses."
    )
    squared_temperature: bool = Field(
        default=False,
        description="Multiply that distillation loss by the square of its temperature (Hinton et al. 2015).",
    )
    warmup_epochs: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0,
        description="Epochs in which only a later task's new parameters are trained, at the peak learning rate, "
        "before all are.",
    )
    lr_factor: float = Field(
        default=0.1,
        gt=0,
        le=1e30,
        description="Factor on the learning rate while old tasks' weights are trained: their norms use fixed "
        "running statistics, which tolerate a smaller rate than batch statistics do.",
    )


class Recipe(Keys):
    """What is trained, on what, and how. Keys of a file; any can be overridden as `key=value`, `tasks.0.name=x`."""

    scenario: str | None = Field(
        default=None, description="Scenario of the paper in whose table `dvn bench --scenario` shows the run."
    )
    scale: str = Field(
        default="full", description="Name of a set of overrides in the recipe's `scales`; full overrides nothing."
    )
    setting: str = Field(
        default="paper",
        description="paper, or modern: also what has become usual since the paper (in-place distillation, cosine "
        "schedule, no weight decay on norms, zero-initialised residual branches).",
    )
    method: str = Field(default="dvn", description=f"Method to train: {', '.join(METHODS)}.")
    learning: Literal["joint", "sequential"] = Field(
        default="joint",
        description="joint: all tasks together (section 3.2). sequential: one task after the other, without the "
        "images of earlier ones (section 3.3). packnet, feature_extraction, da_cnn and lwf are always "
        "sequential, baseline always joint.",
    )
    sequential: SequentialKeys = Field(default=SequentialKeys(), description="Settings of sequential learning.")
    continues: str | None = Field(
        default=None,
        description="Trained checkpoint to which the tasks are added, instead of backbone and units.",
    )
    add_units: Annotated[int, Field(ge=0, lt=1024, strict=True)] = Field(
        default=0,
        description="Number of units that are added to the checkpoint that the recipe continues, in a backbone that is "
        "wider in proportion: one of the paper's. The networks that there are stay what they are.",
    )
    backbone: BackboneKeys | None = Field(default=None, description="Network that is divided into units.")
    partition: str | None = Field(
        default=None, description="Checkpoint of `dvn partition` to start from, instead of backbone and units."
    )
    units: Count | None = Field(default=None, description="Number of units that the backbone is divided into.")
    divide: Literal["all", "inner"] = Field(
        default="all",
        description="Coupled groups of channels that are divided: all, or inner, those that one layer makes and no sum "
        "couples with others (hidden units, heads, channels inside a block). The residual stream is then shared by "
        "all units.",
    )
    assign: Literal["even", "importance", "sorted"] = Field(
        default="even",
        description="even: each unit gets a run of consecutive channels. importance: channels are assigned so that "
        "all units are equally strong. sorted: the best channels go to unit 1, the next best to unit 2, and so on. A "
        "channel counts by its variance on training images times the norm of the weights that read it, or, without "
        "weights to start from, by the norm of its own.",
    )
    widths: Literal["even", "macs", "params"] = Field(
        default="even",
        description="Channels that a unit gets of each coupled group. even: as many as the others. macs: more of the "
        "groups whose channels matter most to the logits of training images for the multiply-accumulates that go with "
        "them in the whole network, of which units take equal parts. params: likewise for parameters. Both ask for "
        "assign sorted and for weights to start from.",
    )
    orders: Literal["paper", "shared", "learned"] = Field(
        default="paper",
        description="Order in which tasks without an `order` of their own add units. paper: another for each task "
        "(section 3.2). shared: one for all, 1 2 3 and so on. learned: tasks whose gradients agree, in a few steps "
        "before the run, share their lower levels, and those in conflict have other units there.",
    )
    compensate: bool = Field(
        default=True,
        description="Before training from weights, make up for the channels that levels lack: estimate the running "
        "statistics of every level below the top on training images of its task, and add the mean of what is lacking "
        "to biases where no such norm follows, which are then private to each level.",
    )
    fit_classifiers: bool = Field(
        default=True,
        description="Before training from weights, fit the classifier of a task whose classes are not those of the "
        "weights to the features that they give of its training images, of at most 2,048. false: it starts at zero.",
    )
    round_to: Count = Field(
        default=1, description="Make the width of each unit a multiple of this many channels, where there are enough."
    )
    tasks: list[TaskKeys] = Field(min_length=1, description="Tasks, the first one being task 1.")
    levels: list[Count] | None = Field(
        default=None, description="Number of units in each level, ascending. By default each level adds one unit."
    )
    epochs: Count = Field(
        default=200,
        description="Passes over the training images of the task that has the most batches; with sequential learning, "
        "over each task's own.",
    )
    batch_size: Count = Field(
        default=128, le=10**6, description="Images of each task in every batch, of all processes."
    )
    accumulate: Count = Field(
        default=1,
        le=10**6,
        description="Batches of each task in every step of the optimizer, which takes the mean of their gradients; "
        "norms see each one alone.",
    )
    optimizer: OptimizerKeys = Field(default=OptimizerKeys(), description="Settings of the optimizer.")
    schedule: ScheduleKeys = Field(default=ScheduleKeys(), description="Settings of the learning rate schedule.")
    reduction: Literal["sum", "mean"] = Field(
        default="sum",
        description="How the losses of all networks in a step are combined: their sum (eq. 4 of the paper) or their"
        " mean.",
    )
    inplace_distillation: bool = Field(
        default=False,
        description="Another way to write `teacher: top`; a `teacher` that is given goes before it.",
    )
    teacher: str | None = Field(
        default=None,
        min_length=1,
        description="What networks learn from instead of the labels, at temperature 1. top: the output of their task's "
        "top level in the same step; next: that of the next larger level; the top level itself has the labels. FILE: a "
        "slice or checkpoint, whose network of the most units with the task's classes, by name, teaches all levels "
        "and stays as it is. By default all have the labels.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each label that goes to all classes alike. It acts on networks that learn from labels: "
        "with `teacher: top` or `next` on top levels alone, and with `teacher: FILE` on none, and is refused.",
    )
    levels_per_step: Literal["all", "sandwich"] = Field(
        default="all",
        description="all: every step trains all levels of a task. sandwich: the top one, the lowest one and one drawn "
        "from those between.",
    )
    unlock: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the run after which all levels are trained: the top one from the start, the next ones at "
        "even intervals, the lowest one last. Epochs before that are not kept as the best, nor does `patience` count "
        "them. By default all are from the start.",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay by step of an exponential moving average of all weights and statistics, which is what is "
        "validated and kept. It starts lower, as timm's does: 1 - (1 + step)^(-2/3), where that is less.",
    )
    select: Literal["last", "best"] = Field(
        default="last",
        description="Weights to keep: those of the last epoch, or of the best one by mean accuracy on the "
        "validation images.",
    )
    patience: Count | None = Field(
        default=None,
        description="Stop after so many epochs without a better mean accuracy on the validation images, and keep the "
        "weights of the best one. By default all epochs are run.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="fp32, or bf16: automatic mixed precision (torch.autocast)."
    )
    memory_format: Literal["auto", "channels_last", "contiguous"] = Field(
        default="auto",
        description="How images lie in memory, and with them all that convolutions make of them. auto: channels_last, "
        "the faster one on CPU and CUDA; contiguous on MPS. Images of one channel are both.",
    )
    sync_bn: bool = Field(
        default=False,
        description="Batch norms take mean and variance over the batch of all processes, as one process would, which "
        "costs two messages a norm each way; not with compile. By default over each process's part of it.",
    )
    compile: bool = Field(
        default=False,
        description="Compile each network for training (torch.compile) when it first runs, which takes a minute or "
        "more; results are the same within rounding. On a CPU a C++ compiler is needed.",
    )
    save_every: Annotated[SaveKeys, MAY_DIFFER] = Field(
        default=SaveKeys(),
        description="When the state that a run is resumed from is written, besides after every epoch and when SIGINT "
        "or SIGTERM stops it.",
    )
    threads: Annotated[Annotated[Count, Field(le=1024)] | None, MAY_DIFFER] = Field(
        default=None, description="Number of CPU threads. By default torch's choice; small networks are fastest with 1."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, strict=True, description="Seed of initialisation, order of images and augmentation."
    )

    @property
    def taught_by(self) -> str | None:
        """`teacher`, however it is written."""
        return self.teacher or ("top" if self.inplace_distillation else None)

    @property
    def keeps_best(self) -> bool:
        """Whether it keeps the weights of the best epoch."""
        return self.select == "best" or self.patience is not None

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if sum(start is not None for start in (self.backbone, self.partition, self.continues)) != 1:
            raise ValueError("give one of backbone (with units), partition and continues")
        if self.backbone is not None and self.units is None:
            raise ValueError("units is missing: into how many is the backbone divided?")
        for key, unset in (("units", None), ("divide", "all"), ("assign", "even"), ("widths", "even"), ("round_to", 1)):
            if self.backbone is None and getattr(self, key) != unset:
                raise ValueError(f"{key} is given by the {'partition' if self.partition else 'checkpoint'}")
        if self.add_units and self.continues is None:
            raise ValueError("add_units adds to a checkpoint: give continues")
        if self.method not in METHODS:
            hint = did_you_mean(self.method, METHODS) or f"; known are {', '.join(METHODS)}"
            raise ValueError(f"no method '{self.method}'{hint}")
        method, is_joint = METHODS[self.method], together(METHODS[self.method], self.learning == "sequential")
        if self.continues is not None and is_joint:
            raise ValueError("a checkpoint's tasks are only added to with learning sequential")
        if self.orders == "learned" and not (is_joint and method.order == "paper" and method.private != "all"):
            raise ValueError(
                "orders learned compares tasks on weights that they share, with orders of their own, before all are "
                "learnt together: give method dvn and learning joint, or orders paper"
            )
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two tasks have the name '{twice}'")
        if self.keeps_best and any(task.data.validation == 0 for task in self.tasks):
            key = "select best" if self.patience is None else "patience"
            raise ValueError(f"{key} needs validation images in every task: test images choose nothing")
        if self.taught_by not in (None, "top", "next"):
            is_balanced = any(task.class_weights != "none" for task in self.tasks)
            if key := "label_smoothing" if self.label_smoothing > 0 else "class_weights" if is_balanced else "":
                raise ValueError(
                    f"{key} acts on labels: with teacher '{self.teacher}' all learn from that file instead"
                )
        if self.sync_bn and self.compile:
            raise ValueError("sync_bn and compile do not go together: what processes tell each other is not compiled")
        if self.patience is not None and not is_joint:
            raise ValueError("patience is for tasks that are learnt together: the epochs of each stage are planned")
        return self
