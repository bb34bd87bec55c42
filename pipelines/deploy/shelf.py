"""A shelf: Parquet files under names, each whole or absent, in a folder or in a bucket.

Who serves puts captures on it, and who judges reads them: where the two share no disk, as on
Kubernetes, it is s3://bucket/prefix. Credentials come from the usual AWS chain.
"""

import io
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import s3, stage, tables


class Shelf:
    """The shelf at a folder, or at s3://bucket/prefix."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        in_bucket = place.startswith("s3:")
        self.bucket, self.prefix = s3.parsed(place, "the shelf") if in_bucket else ("", "")
        self.folder = Path(place)

    def put(self, name: str, table: pa.Table) -> None:
        if not self.bucket:
            with stage.whole(self.folder / name) as partial:
                tables.write(table, partial)
            return
        with tempfile.TemporaryDirectory() as folder:
            tables.write(table, made := Path(folder) / name)
            key = self.prefix + name
            with s3.saying(f"s3://{self.bucket}/{key} cannot be written"):
                self._client.put_object(Bucket=self.bucket, Key=key, Body=made.read_bytes())

    def names(self, after: str = "") -> list[str]:
        """The names in order, of those that come after one."""
        if not self.bucket:
            found = [file.name for file in self.folder.glob("*.parquet")]
            # What is still being written begins with a dot.
            return sorted(name for name in found if name > after and not name.startswith("."))
        start = self.prefix + after
        listed = s3.listed(self._client, self.bucket, self.prefix, StartAfter=start)
        keys = [one["Key"] for one in listed]
        return [key.removeprefix(self.prefix) for key in keys if key.endswith(".parquet")]

    def remove(self, name: str) -> None:
        """Nothing where somebody else did."""
        if not self.bucket:
            (self.folder / name).unlink(missing_ok=True)
            return
        key = self.prefix + name
        with s3.saying(f"s3://{self.bucket}/{key} cannot be removed"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def rows(self, name: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values of these columns, row by row."""
        source: Any = self.folder / name
        if self.bucket:
            key = self.prefix + name
            with s3.saying(f"s3://{self.bucket}/{key} cannot be read"):
                found = self._client.get_object(Bucket=self.bucket, Key=key)
                source = io.BytesIO(found["Body"].read())
        table = pq.read_table(source, columns=list(columns))
        return zip(*(table[one].to_pylist() for one in columns), strict=True)

    @cached_property
    def _client(self) -> Any:
        # A replica drops what it cannot write, and who judges looks again: both must know soon.
        return s3.client(attempts=2, connect=5, read=10)
