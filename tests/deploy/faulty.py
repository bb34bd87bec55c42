"""The service's replica with the fault of its bundle around it; see faults.py."""

import sys
from pathlib import Path

from fastapi import FastAPI

sys.path.insert(0, str(Path(__file__).parent.parent))

from deploy import faults

from pipelines.deploy.serve import __main__ as replica
from pipelines.deploy.serve import routes
from pipelines.deploy.serve.service import Service


def main() -> None:
    build = routes.build
    fault = faults.of(sys.argv[sys.argv.index("--digest") + 1])

    def built(service: Service) -> FastAPI:
        return faults.around(build(service), fault)  # type: ignore[return-value, arg-type]

    if fault:
        routes.build = built
    replica.main()


if __name__ == "__main__":
    main()
