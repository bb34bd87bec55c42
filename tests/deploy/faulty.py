"""The service's replica with the fault of its bundle around it; see faults.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from deploy import faults

from pipelines.deploy.serve import __main__ as replica
from pipelines.deploy.serve import routes


def main() -> None:
    door = routes.Door
    fault = faults.of(sys.argv[sys.argv.index("--digest") + 1])
    if fault:
        routes.Door = lambda app: faults.around(door(app), fault)  # type: ignore[assignment, misc]
    replica.main()


if __name__ == "__main__":
    main()
