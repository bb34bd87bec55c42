"""cold: how long Lambda's handler takes from a fresh process to its first answer, on this machine.

Needs models/bundle (make run). The package is unpacked as Lambda does it; the import of numpy and
ONNX Runtime, the model and one record are timed apart. Run: python benchmarks/cold.py
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipelines import bundle, stage
from pipelines.deploy.targets import Release, lambda_

ROOT = Path(__file__).parent.parent
ROUNDS = 10
CODE = """
import json, time
begun = time.perf_counter()
import numpy, onnxruntime
loaded = time.perf_counter()
import handler
opened = time.perf_counter()
assert handler.handler({}, None)["statusCode"] == 200
first = time.perf_counter()
for _ in range(100):
    handler.handler({}, None)
warm = (time.perf_counter() - first) / 100
print(json.dumps([loaded - begun, opened - loaded, first - opened, warm]))
"""


def main() -> None:
    os.chdir(ROOT)
    release = Release("flights", 1, stage.digest(bundle.FOLDER), bundle.FOLDER)
    package = lambda_.package(release)
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(package)).extractall(folder)
        rounds = [measured(folder) for _ in range(ROUNDS)]
    print(f"package {len(package) / 1e6:.2f} MB, without the layer; median of {ROUNDS} processes")
    names = ("import numpy, onnxruntime", "open the model", "first answer", "a warm answer")
    for name, values in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"  {name:<26}{statistics.median(values) * 1000:>8.2f} ms")
    print(
        f"  {'cold, altogether':<26}{statistics.median(sum(r[:3]) for r in rounds) * 1000:>8.1f} ms"
    )


def measured(folder: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {folder!r})\n{CODE}"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main()
