"""`params.yaml`, typed and strict: a key that is unknown, missing or ill-typed is one line."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from zoneinfo import available_timezones

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    field_validator,
    model_validator,
)

from pipelines.errors import UserError

FILE = Path("params.yaml")


def _moment(value: object) -> datetime:
    """An ISO 8601 text as an aware time; without an offset it is UTC."""
    if not isinstance(value, str):
        raise ValueError('expected a quoted ISO 8601 time such as "2013-12-01"')
    moment = datetime.fromisoformat(value)
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("in UTC this is no year of the calendar") from None


class _Block(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


Moment = Annotated[datetime, BeforeValidator(_moment)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Names = Annotated[list[str], Field(min_length=1)]
Checked = TypeVar("Checked", bound=BaseModel)


class Table(_Block):
    """One table of the source: its columns and their types, its key, the time that cuts it by
    month.
    """

    batch: str | None
    key: Names
    columns: dict[str, Literal["int", "long", "float", "string", "timestamp"]]

    @model_validator(mode="after")
    def _known_columns(self) -> "Table":
        for name in self.key:
            if name not in self.columns:
                raise ValueError(f"key names {name}, which is none of columns")
        if self.batch is not None and self.columns.get(self.batch) != "timestamp":
            raise ValueError(f"batch names {self.batch}, which is no timestamp of columns")
        return self


class Group(_Block):
    """Features that belong together."""

    categories: list[str]
    numbers: list[str]


class Features(RootModel[dict[str, Group]]):
    """The groups by name, and the features of all of them in the order of the bundle's columns."""

    model_config = ConfigDict(strict=True, frozen=True)

    @property
    def categories(self) -> list[str]:
        return [name for group in self.root.values() for name in group.categories]

    @property
    def numbers(self) -> list[str]:
        return [name for group in self.root.values() for name in group.numbers]

    @property
    def names(self) -> list[str]:
        """Categories first, then numbers."""
        return self.categories + self.numbers


class Target(_Block):
    """What is foretold: a column of the dataset's features.sql, and what kind of label it is."""

    column: str
    task: Literal["binary", "regression", "multiclass"]
    classes: list[str]

    @model_validator(mode="after")
    def _known_classes(self) -> "Target":
        if self.task != "multiclass" and self.classes:
            raise ValueError(f"classes has {len(self.classes)} names; expected [] for {self.task}")
        if self.task == "multiclass" and not len(self.classes) == len(set(self.classes)) >= 2:
            raise ValueError(f"classes is {self.classes}; expected two or more distinct names")
        return self


class Behaviour(_Block):
    """What must hold of the mean risk: adding `raises` never lowers it, losing `missing` hardly
    moves it.
    """

    raises: dict[str, dict[str, float]]
    missing: dict[str, list[str]]


# What stands beside the features in tables of what is known, was asked and was answered.
TAKEN = {
    "label", "split", "prediction_time", "known_at", "prediction", "probabilities",
    "request_id", "row", "at", "bundle", "version", "fallback",
}  # fmt: skip


class Dataset(_Block):
    """Everything the pipeline knows about the data, beside the two SQL files and the suite."""

    name: str
    package: str
    timezone: str
    # At most a year.
    horizon_minutes: Annotated[int, Field(gt=0, le=366 * 24 * 60)]
    lookback_days: Annotated[int, Field(gt=0, le=3660)]
    settle_days: Annotated[int, Field(gt=0, le=366)]
    key: Names
    time: str
    tables: Annotated[dict[str, Table], Field(min_length=1)]
    target: Target
    features: Features
    canary: Names
    slices: list[str]
    behaviour: Behaviour

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, zone: str) -> str:
        if zone not in available_timezones():
            raise ValueError("expected an IANA time zone such as America/New_York")
        return zone

    @model_validator(mode="after")
    def _known_names(self) -> "Dataset":
        for name, times in Counter(self.features.names).items():
            if times > 1:
                raise ValueError(f"features name {name} twice; expected once")
            if name in TAKEN:
                raise ValueError(f"features name {name}, which stands beside them; rename it")
        if self.target.column in self.features.names:
            raise ValueError(f"features name {self.target.column}, which target foretells")
        checked = self.behaviour
        named = [name for added in checked.raises.values() for name in added]
        named += [name for columns in checked.missing.values() for name in columns]
        for name in named:
            if name not in self.features.numbers:
                raise ValueError(f"behaviour names {name}, which is no number of features")
        for group in self.canary:
            if group not in self.features.root:
                raise ValueError(f"canary names {group}, which is no group of features")
        return self


class Fetch(_Block):
    source: str
    # At most a century.
    retention_days: Annotated[int, Field(gt=0, le=36600)] | None


class Pii(_Block):
    """What becomes of a personal column, by its class in the dataset's contract."""

    indirect: Literal["hash", "drop"]
    direct: Literal["hash", "drop"]


class Load(_Block):
    pii: Pii


class Validate(_Block):
    max_quarantine: Share


class Featurize(_Block):
    test_days: Positive
    val_days: Positive


class Trainer(_Block):
    """The hardware of training, in Lightning's words."""

    accelerator: Literal["cpu", "gpu", "auto"]
    devices: Positive  # of each node
    nodes: Positive
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    compile: bool
    threads: Annotated[int, Field(gt=0, le=1024)]

    @model_validator(mode="after")
    def _half_on_gpu(self) -> "Trainer":
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            raise ValueError("precision 16-mixed needs a GPU; on a CPU expected bf16-mixed")
        return self


class Checkpoint(_Block):
    """How often a fit is saved: after so many seconds, and every so many steps."""

    seconds: Positive
    steps: Positive | None


class Boosting(_Block):
    """How trees are grown. features: the share of them among which each node chooses. rows: of more
    train or validation rows, so many are seen of each, evenly spaced.
    """

    rounds: Positive
    patience: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    leaves: Annotated[int, Field(ge=2)]
    leaf_rows: Positive
    l2: Annotated[float, Field(ge=0)]
    features: Annotated[float, Field(gt=0, le=1)]
    rows: Positive


class Fit(_Block):
    model: str
    # What NumPy takes.
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    batch_size: Positive
    max_epochs: Positive
    patience: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    hidden: Annotated[list[Positive], Field(min_length=1)]
    members: Positive
    boosting: Boosting
    checkpoint: Checkpoint
    trainer: Trainer

    def flat(self) -> dict[str, Any]:
        """Every value by its key; those of boosting are boosting.<key>."""
        values = self.model_dump()
        inner = values.pop("boosting")
        return values | {f"boosting.{key}": value for key, value in inner.items()}

    def changed(self, values: Mapping[str, Any]) -> "Fit":
        """With other values for some keys, named as in `flat`."""
        every = self.flat() | dict(values)
        inner = {key: every.pop(f"boosting.{key}") for key in Boosting.model_fields}
        return Fit.model_validate(every | {"boosting": inner})


class Range(_Block):
    """Every number from low to high, both included; with log, as many below their geometric mean
    as above it.
    """

    low: int | float
    high: int | float
    log: bool

    @model_validator(mode="after")
    def _rising(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}, high is {self.high}; expected low below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; expected above 0 where log is true")
        return self


class Space(_Block):
    """The values of `fit` among which the best are sought, by key."""

    ranges: dict[str, Range]
    choices: dict[str, Annotated[list[Any], Field(min_length=2)]]

    @property
    def keys(self) -> list[str]:
        return [*self.ranges, *self.choices]

    @model_validator(mode="after")
    def _known_keys(self) -> "Space":
        if not self.keys:
            raise ValueError("neither ranges nor choices names a key; expected one of fit")
        for key, times in Counter(self.keys).items():
            if times > 1:
                raise ValueError(f"{key} stands in ranges and in choices; expected once")
            if key not in TUNABLE:
                allowed = ", ".join(TUNABLE)
                raise ValueError(f"{key} is no key that can be tuned; expected one of {allowed}")
        return self

    def within(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` that lie in the space."""
        inside = {
            key: values[key]
            for key, one in self.ranges.items()
            if key in values and one.low <= values[key] <= one.high
        }
        inside |= {
            key: values[key]
            for key, choices in self.choices.items()
            if key in values and values[key] in choices
        }
        return inside


# Of `fit`: not the seed, since the best of many is luck; not the hardware; and a model has a study
# of its own.
TUNABLE = (
    "batch_size", "max_epochs", "patience", "learning_rate", "weight_decay", "dropout", "hidden",
    "members", "boosting.learning_rate", "boosting.leaves", "boosting.leaf_rows", "boosting.l2",
    "boosting.features",
)  # fmt: skip


class Tune(_Block):
    """How the values of `fit` are sought. No stage reads it."""

    trials: Positive
    workers: Positive
    storage: Annotated[str, Field(pattern=r"^[a-z0-9_+]+://\S+$")]
    space: Space


class Evaluate(_Block):
    resamples: Positive
    min_auc: Share
    max_calibration_error: Share
    max_missing_shift: Share
    leak_auc: Share
    canary_epochs: Positive
    baseline_iterations: Positive


class Pruned(_Block):
    """How much of each hidden layer goes, and how long the rest is trained on."""

    share: Annotated[float, Field(gt=0, lt=1)]
    epochs: Positive


class Distilled(_Block):
    """The network that is taught, and for how long."""

    hidden: Annotated[list[Positive], Field(min_length=1)]
    epochs: Positive


class Package(_Block):
    """What a bundle holds, and which forms of the network it is chosen from."""

    parity: Annotated[float, Field(gt=0)]
    reference_rows: Positive
    threshold: Share
    forms: list[Literal["int8", "pruned", "distilled"]]
    max_loss_rise: Annotated[float, Field(ge=0)]
    pruned: Pruned
    distilled: Distilled

    @field_validator("forms")
    @classmethod
    def _each_once(cls, forms: list[str]) -> list[str]:
        for form, times in Counter(forms).items():
            if times > 1:
                raise ValueError(f"{form} stands {times} times; expected once")
        return forms


class Score(_Block):
    window_days: Positive


class Drift(_Block):
    max_auc_fall: Share
    max_loss_rise: Annotated[float, Field(ge=0)]
    max_prediction_drift: Annotated[float, Field(ge=0)]
    max_label_shift: Share


class Gate(_Block):
    """What a challenger may cost against the champion: see pipelines/deploy/comparison.py."""

    resamples: Positive
    max_log_loss_rise: Annotated[float, Field(ge=0)]
    max_ap_fall: Share
    max_slice_log_loss_rise: Annotated[float, Field(ge=0)]
    min_slice_rows: Positive
    max_row_ms: Annotated[float, Field(gt=0)]
    max_thousand_rows_ms: Annotated[float, Field(gt=0)]
    max_bundle_mb: Annotated[float, Field(gt=0)]


class Ejection(_Block):
    """When a replica gets no requests for a while, and how many may be out at once."""

    failures: Positive
    seconds: Positive
    percent: Annotated[int, Field(gt=0, le=100)]


Port = Annotated[int, Field(gt=0, lt=2**16)]


class Traffic(_Block):
    """Envoy and the replicas behind it."""

    address: str
    port: Port
    admin_port: Port
    replicas: Positive
    timeout_seconds: Positive
    retries: Annotated[int, Field(ge=0)]
    max_requests: Positive
    ejection: Ejection


class Capture(_Block):
    """Which requests are kept, and when they are written."""

    share: Share
    folder: str
    rows: Positive
    seconds: Positive
    retention_days: Positive


class Serve(_Block):
    """One replica of the service."""

    keys: str | None
    rate_limit: Annotated[float, Field(gt=0)] | None
    threads: Positive
    max_rows: Positive
    max_body_bytes: Positive
    max_connections: Positive
    read_seconds: Positive
    drain_seconds: Annotated[float, Field(ge=0)]
    log_share: Share
    capture: Capture


class Tolerance(_Block):
    """By how much a challenger may be worse than the champion."""

    errors: Share
    latency: Share
    predictions: Share
    disagreement: Annotated[float, Field(gt=0, lt=1)]
    log_loss: Annotated[float, Field(ge=0)]


class Release(_Block):
    """The steps of a release, and how each is judged."""

    target: str
    approval: bool
    shadow_seconds: Annotated[int, Field(ge=0)]
    steps: Annotated[list[Annotated[int, Field(gt=0, le=100)]], Field(min_length=1)]
    step_seconds: Positive
    step_requests: Positive
    limit_seconds: Positive
    tolerance: Tolerance
    labels: str
    alpha: Annotated[float, Field(gt=0, lt=1)]
    memory_mb: Positive
    restarts: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _rising(self) -> "Release":
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError(f"steps are {self.steps}; expected to rise, and to end with 100")
        if self.limit_seconds < max(self.step_seconds, self.shadow_seconds):
            raise ValueError("limit_seconds is shorter than a step; expected at least as long")
        return self


class Kubernetes(_Block):
    """Replicas are the fewest and the most of a slot."""

    namespace: str
    image: str
    gateway: str
    replicas: Annotated[list[Positive], Field(min_length=2, max_length=2)]


class Sagemaker(_Block):
    image: str
    role: str
    instance: str
    replicas: Positive


class Lambda(_Block):
    layer: str
    role: str
    memory_mb: Annotated[int, Field(ge=128, le=10240)]


class Edge(_Block):
    folder: str


class Targets(_Block):
    """Where a bundle is served, one block for each target but the local one."""

    store: Annotated[str, Field(pattern=r"^s3://[^/]+(/.*)?$")]
    kubernetes: Kubernetes
    sagemaker: Sagemaker
    lambda_: Annotated[Lambda, Field(alias="lambda")]
    edge: Edge


class Tracking(_Block):
    uri: str
    artifacts: str


class Lineage(_Block):
    """Where each stage tells of its run, beside the journal of this machine."""

    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+\S*$")] | None


class Task(_Block):
    """What an Airflow task gets. The last three bind a pod; a process takes what the worker has."""

    owner: str
    retries: Annotated[int, Field(ge=0)]
    retry_delay_seconds: Positive
    timeout_minutes: Positive
    pool: str
    cpu: Annotated[float, Field(gt=0)]
    memory_gib: Annotated[float, Field(gt=0)]
    gpu: Annotated[int, Field(ge=0)]


class Orchestrate(_Block):
    """How Airflow runs the graph. No stage reads it: it changes no byte of an output."""

    keep: Positive
    execute: Literal["process", "pod"]
    image: str
    record: Literal["branch", "object"]
    pools: dict[str, Positive]
    default: Task
    tasks: dict[str, Task]

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """A task states what differs from `default`."""
        if not isinstance(values, dict) or not isinstance(values.get("default"), dict):
            return values
        tasks = values.get("tasks")
        if not isinstance(tasks, dict) or not all(isinstance(one, dict) for one in tasks.values()):
            return values
        return values | {"tasks": {name: values["default"] | one for name, one in tasks.items()}}

    @model_validator(mode="after")
    def _kept_lock(self) -> "Orchestrate":
        if self.execute == "pod" and self.record == "branch":
            raise ValueError("execute: pod loses record: branch with the pod; set record: object")
        return self

    @model_validator(mode="after")
    def _known_pools(self) -> "Orchestrate":
        for name, task in {"default": self.default, **self.tasks}.items():
            if task.pool != "default_pool" and task.pool not in self.pools:
                raise ValueError(f"{name} names the pool {task.pool}, which is not in pools")
        return self


class Column(_Block):
    """What a column means. A unit of null is none: a name, a code, a number that only counts."""

    description: Annotated[str, Field(min_length=1)]
    unit: str | None
    pii: Literal["none", "indirect", "direct"]


class Contract(_Block):
    """The dataset's contract.yaml: who answers for its tables, what a model of them is for, and
    their columns.
    """

    owner: Annotated[str, Field(min_length=1)]
    # The question that each column answers which dataset.target may name.
    purpose: dict[str, Annotated[str, Field(min_length=1)]]
    uses: Names
    limits: Names
    events: dict[str, Column]


class Expectation(BaseModel):
    """One of Great Expectations, which allows more keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    type: str
    arguments: Annotated[dict[str, Any], Field(alias="kwargs")] = {}


class Suite(BaseModel):
    """A file below expectations/."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    name: str
    expectations: Annotated[list[Expectation], Field(min_length=1)]


class Bounds(_Block):
    """What an expectation of predictions says, of a column or of the table."""

    column: str | None = None
    min_value: float = -math.inf
    max_value: float = math.inf


class Bounded(_Block):
    type: str
    kwargs: Bounds


class PredictionSuite(_Block):
    """A file below expectations/predictions/."""

    name: str
    meta: dict[str, Any]
    expectations: Annotated[list[Bounded], Field(min_length=1)]


class Params(_Block):
    as_of: Moment
    engine: Annotated[str, Field(pattern=r"^(embedded|local\[[1-9]\d{0,3}\]|spark://.+|sc://.+)$")]
    fetch: Fetch
    load_: Annotated[Load, Field(alias="load")]
    validate_: Annotated[Validate, Field(alias="validate")]
    featurize: Featurize
    dataset: Dataset
    fit: Fit
    tune: Tune
    evaluate: Evaluate
    package: Package
    score: Score
    drift: Drift
    gate: Gate
    serve: Serve
    traffic: Traffic
    release: Release
    targets: Targets
    tracking: Tracking
    lineage: Lineage
    orchestrate: Orchestrate

    @model_validator(mode="after")
    def _within_the_calendar(self) -> "Params":
        try:
            _ = self.window_from, self.val_from
        except OverflowError:
            raise ValueError(
                "score.window_days or featurize.test_days and val_days reach from as_of to before "
                "the calendar"
            ) from None
        return self

    @model_validator(mode="after")
    def _forms_of_task(self) -> "Params":
        if "distilled" in self.package.forms and self.dataset.target.task == "multiclass":
            raise ValueError(
                "package.forms: distilled learns one number, but dataset.target.task is "
                "multiclass; expected int8 and pruned alone"
            )
        return self

    @model_validator(mode="after")
    def _space_of_fit(self) -> "Params":
        space = self.tune.space
        tried = [(key, end) for key, one in space.ranges.items() for end in (one.low, one.high)]
        tried += [(key, choice) for key, choices in space.choices.items() for choice in choices]
        for key, value in tried:
            try:
                self.fit.changed({key: value})
            except ValidationError as error:
                said = error.errors(include_url=False)[0]["msg"]
                raise ValueError(f"tune.space: {key} {value!r} is none for fit: {said}") from None
        return self

    @property
    def window_from(self) -> datetime:
        """The first moment of the newest window."""
        return self.as_of - timedelta(days=self.score.window_days)

    @property
    def test_from(self) -> datetime:
        """The first moment of the test rows."""
        return self.as_of - timedelta(days=self.featurize.test_days)

    @property
    def val_from(self) -> datetime:
        """The first moment of the validation rows."""
        return self.test_from - timedelta(days=self.featurize.val_days)


def load(path: Path = FILE) -> Params:
    """Read and check the params. Raises UserError with one line."""
    return checked(path, Params)


def checked(path: Path, kind: type[Checked]) -> Checked:
    """Read a file of YAML, or of JSON by its name, as what it should be. Raises UserError with one
    line.
    """
    name = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if name == "JSON" else yaml.load(text, _Once)
    except FileNotFoundError:
        raise UserError(f"{path} is missing in {Path.cwd()}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not {name}: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is no mapping; expected the keys {', '.join(_keys(kind))}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error, kind)}") from None


class _Once(yaml.SafeLoader):
    """YAML in which a key that stands twice is a mistake; by default the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value} stands twice", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first mistake as `key: what is wrong; what is allowed`."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed here: {', '.join(_keys_beside(first['loc'], kind))}"
    if first["type"] == "missing":
        return f"{key}: missing key; it is required"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f"; got {first['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{got}".removeprefix(": ")


def _keys_beside(loc: tuple[int | str, ...], kind: type[BaseModel]) -> list[str]:
    """The keys allowed in the block that holds `loc`."""
    block: Any = kind
    for part in loc[:-1]:
        block = _inside(block, str(part))
    return _keys(block)


def _inside(block: Any, key: str) -> Any:
    """What stands at `key` of a block, or of a mapping of blocks."""
    if isinstance(block, type) and issubclass(block, RootModel):
        block = block.model_fields["root"].annotation
    if isinstance(block, type) and issubclass(block, BaseModel):
        fields = {field.alias or name: field for name, field in block.model_fields.items()}
        return fields[key].annotation
    return get_args(block)[-1]


def _keys(block: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in block.model_fields.items()]
