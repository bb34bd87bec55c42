"""serve: one replica of the service.

in:   a bundle and its hash, or a slot file that names a signed version; params.yaml → serve
out:  /predict, the Open Inference Protocol under /v2, /metrics, /openapi.json on one port;
      captured requests under serve.capture.folder; logs on standard error
run:  python -m pipelines.deploy.serve --bundle models/bundle --digest HASH --port 8001

SIGTERM drains: `ready` answers 503 at once, what comes is still answered for serve.drain_seconds,
what runs ends, exit 0. SIGHUP takes what the slot file (and the file of keys) says now; requests
that run end with the bundle they began with, and what is refused changes nothing.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
import uvloop
from starlette.types import ASGIApp

from pipelines import params as parameters
from pipelines import stage
from pipelines.deploy.serve import connection, logs, routes
from pipelines.deploy.serve.keys import Keys
from pipelines.deploy.serve.model import Holder, Named, of_slot
from pipelines.deploy.serve.service import Service
from pipelines.errors import UserError
from pipelines.params import Serve

log = logging.getLogger("headrace")
Around = Callable[[ASGIApp], ASGIApp]
# Longer than Envoy keeps an idle connection (infra/envoy/cluster.yaml): it must not close as a
# request comes.
IDLE_SECONDS = 600


class _Server(uvicorn.Server):
    """uvicorn ends by the signal it got; a replica that was told to end has done its work: 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Replica:
    """The process around a service: its signals and what runs beside."""

    def __init__(self, service: Service, host: str, port: int, around: Around) -> None:
        self.service = service
        params = service.params
        connection.Connection.largest = connection.allow(params.max_connections)
        self.server = _Server(
            uvicorn.Config(
                around(routes.Door(routes.build(service))),
                host=host,
                port=port,
                http=connection.Connection,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=4096,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=params.read_seconds,
            )
        )
        self.reloading = asyncio.Lock()

    async def run(self, with_parent: bool) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        capturing = asyncio.create_task(self.service.capture.run())
        tasks = [
            asyncio.create_task(
                # A body has its own time; this is for what even then does not end.
                connection.sweep(
                    self.server.server_state.connections, 2 * self.service.params.read_seconds
                )
            )
        ]
        loop.add_signal_handler(
            signal.SIGHUP, lambda: tasks.append(asyncio.create_task(self.reload()))
        )
        if with_parent:
            loop.add_reader(sys.stdin.fileno(), self._watch_parent)
        # What is loaded stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        await self.server.serve()
        for task in tasks:
            task.cancel()
        self.service.capture.end()
        await asyncio.gather(capturing, *tasks, return_exceptions=True)

    def drain(self) -> None:
        """Be ready no more; end once whoever sends requests had the time to notice."""
        if not self.service.draining:
            self.service.draining = True
            log.info("draining")
            loop = asyncio.get_running_loop()
            loop.call_later(
                self.service.params.drain_seconds, setattr, self.server, "should_exit", True
            )

    async def reload(self) -> None:
        """Take the bundle and the keys that are named now."""
        async with self.reloading:
            taken = await asyncio.to_thread(self.service.holder.reload)
            self.service.metrics.reloads["taken" if taken else "refused"] += 1
            try:
                self.service.keys = keys_of(self.service.params)
            except UserError as error:
                log.error("keys refused", extra={"fields": {"reason": str(error)}})

    def _watch_parent(self) -> None:
        if not os.read(sys.stdin.fileno(), 1):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.drain()


def keys_of(params: Serve) -> Keys | None:
    """The API keys of serve.keys, None where everybody may ask."""
    return None if params.keys is None else Keys(Path(params.keys), params.rate_limit)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, help="the folder of a bundle")
    parser.add_argument("--digest", help="the hash that it must have")
    parser.add_argument("--version", type=int, default=0, help="what the registry calls it")
    parser.add_argument("--slot", type=Path, help="in their place: the file of a signed version")
    parser.add_argument(
        "--at-least", type=int, default=0, help="the smallest version to take from the slot"
    )
    parser.add_argument("--fallback", type=Path, help="the bundle that answers where it faults")
    parser.add_argument("--fallback-digest", help="the hash that it must have")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens: %(default)s")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--open", action="store_true", help="ask for no key, whatever serve.keys")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input ends")
    given = parser.parse_args(arguments)
    if (given.slot is None) == (given.bundle is None):
        parser.error("expected either --bundle or --slot")
    if (given.bundle is None, given.fallback is None) != (
        given.digest is None,
        given.fallback_digest is None,
    ):
        parser.error("expected a hash with every bundle: --digest, --fallback-digest")
    return given


def serve(given: argparse.Namespace, around: Around) -> None:
    params = parameters.load().serve
    if given.open:
        params = params.model_copy(update={"keys": None})

    def find() -> Named:
        if given.slot is not None:
            return of_slot(given.slot, given.at_least)
        return Named(given.bundle, given.digest, given.version)

    fallback = given.fallback and Named(given.fallback, given.fallback_digest)

    async def run() -> None:
        holder = Holder(find, fallback, params)
        service = Service(params, holder, keys_of(params))
        log.info("serving", extra={"fields": {"bundle": holder.current.digest}})
        await Replica(service, given.host, given.port, around).run(given.with_parent)

    uvloop.run(run())


def main(arguments: Sequence[str] | None = None, around: Around = lambda app: app) -> int:
    """Serve until told to end; `around` may speak another protocol before the application."""
    given = read_arguments(arguments)
    # Who asks before there is a service to change means what it will load anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with logs.written():
            serve(given, around)
    except UserError as error:
        print(f"serve: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"serve: fault: {stage.one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
