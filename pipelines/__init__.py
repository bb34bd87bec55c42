"""The stages of the pipeline. `dvc.yaml` says in which order, `params.yaml` with which numbers."""

import gc
import os
import sys
from types import TracebackType

# A stage is a process of seconds that imports much and frees little: to look for garbage after
# every 700 new objects is a fifth of the time of its imports.
gc.set_threshold(100_000, 20, 100)

# OpenMP's threads, of torch and scikit-learn, would spin while they wait for one another: beside
# other work, on the core that the thread needs for which they wait. Read once, by their import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _unless_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C while a stage still imports is told by whoever started it, not by a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _unless_interrupted
