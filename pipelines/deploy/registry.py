"""The registry: versions in MLflow, and the log that says which of them is champion.

An alias in MLflow belongs to the last who wrote it. So the champion stands in a log in the
exchange, beside the data: `champions/<model>-<created>/<number>.json`, one entry after another. An
entry is written where nothing was, so of all who want to follow the newest entry exactly one does.
The alias `champion` follows the log. A registry that was made anew begins a new log.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import exchange, signing, stage, tracking
from pipelines.errors import UserError
from pipelines.exchange import Exchange
from pipelines.params import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
# The tag of a version that was rolled back, by a person or by a release: who, and why.
ROLLED_BACK = "rolled_back"
# Where MLflow keeps the files that register gave it beside its own copy of the model.
FILES = "extra_files"


class ConflictError(UserError):
    """The champion is another than was stated."""


@dataclass(frozen=True)
class Entry:
    """One line of the log: this version is champion from here on, in the place of `replaces`."""

    number: int
    version: int
    bundle: str
    replaces: int | None
    who: str
    why: str
    rolled_back: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Registry:
    """The versions of one model, and its log."""

    store: "MlflowClient"
    model: str
    exchange: Exchange

    def version(self, number: int) -> "ModelVersion":
        """Raises UserError where there is no such version."""
        from mlflow.exceptions import MlflowException

        try:
            return self.store.get_model_version(self.model, str(number))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(f"{self.model} has no version {number}") from None

    def holders(self, digest: str) -> "list[ModelVersion]":
        """The versions whose bundle has this hash, the oldest first."""
        found = self.store.search_model_versions(
            f"name = '{self.model}' and tags.bundle = '{digest}'"
        )
        return sorted(found, key=lambda version: int(version.version))

    def find(self, digest: str) -> "ModelVersion | None":
        """The oldest version whose bundle has this hash."""
        return next(iter(self.holders(digest)), None)

    def tag(self, number: int, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        for name, value in tags.items():
            try:
                self.store.set_model_version_tag(self.model, str(number), name, value)
            except MlflowException:  # of two that write a tag for the first time, one fails
                self.store.set_model_version_tag(self.model, str(number), name, value)

    def untag(self, number: int, name: str) -> None:
        if name in self.version(number).tags:
            self.store.delete_model_version_tag(self.model, str(number), name)

    def statement(self, number: int, digest: str) -> dict[str, object]:
        """What a signature says of a version: that its bundle is this one."""
        return {"model": self.model, "version": number, "bundle": digest}

    def bring(self, number: int, folder: Path) -> str:
        """Copy the bundle of a version into `folder`, which is empty. Returns its hash.

        Raises UserError where it is not the bundle that was signed as this version.
        """
        import mlflow

        tags = self.version(number).tags
        wanted = str(tags["bundle"])
        if "signature" not in tags:
            raise UserError(
                f"{self.model} version {number} is not signed; register signs what it makes"
            )
        signing.check(self.statement(number, wanted), tags["signature"])
        with tempfile.TemporaryDirectory() as scratch:
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{self.model}/{number}", dst_path=scratch
            )
            shutil.copytree(Path(scratch) / FILES, folder, dirs_exist_ok=True)
        found = stage.digest(folder)
        if found != wanted:
            raise UserError(
                f"{self.model} version {number} is damaged: its bundle is {found[:12]}, "
                f"expected {wanted[:12]}"
            )
        return wanted

    def aliases(self) -> dict[str, int]:
        """The version by alias, as MLflow has it now."""
        held = dict(self.store.get_registered_model(self.model).aliases)
        return {alias: int(number) for alias, number in held.items()}

    def aliases_of(self, number: int) -> list[str]:
        return sorted(alias for alias, holder in self.aliases().items() if holder == number)

    def log(self) -> list[Entry]:
        """Every entry, the oldest first. Empty where there is no such model yet."""
        folder = self.folder("champions")
        if folder is None:
            return []
        names = [name for name in self.exchange.names(folder) if re.search(r"/\d{6}\.json$", name)]
        found = [self.exchange.get(name) for name in names]
        return [Entry(**record) for record in found if record is not None]

    def champion(self) -> Entry | None:
        """The newest entry."""
        return next(reversed(self.log()), None)

    def append(self, entry: Entry) -> bool:
        """Write the entry; False, and nothing changed, where its number is taken."""
        return self.exchange.put_new(
            f"{self.folder('champions')}/{entry.number:06}.json", asdict(entry)
        )

    def folder(self, kind: str) -> str | None:
        """Where the exchange keeps what belongs to this model; None where there is none yet."""
        from mlflow.exceptions import MlflowException

        try:
            created = self.store.get_registered_model(self.model).creation_timestamp
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return f"{kind}/{self.model}-{created}"


def of(params: Params) -> Registry:
    """The registry of the params, with the log beside the data of the current checkout."""
    store, _ = tracking.client(params)
    return Registry(store, params.dataset.name, exchange.of(Path.cwd()))
