"""uvicorn, with our protocol and our way of stopping: drain first, close last, leave with status 0."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from moe_runtime.server.app import build_app
from moe_runtime.server.service import Service
from moe_runtime.server.transport import Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM)
logger = logging.getLogger("moe_runtime.server")


class Server(uvicorn.Server):
    """Serves one app on sockets that are already bound."""

    def __init__(self, service: Service, on_ready: Callable[[], None] = lambda: None) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=functools.partial(Protocol, limits=config),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=config.keep_alive,  # type: ignore[arg-type]
                timeout_graceful_shutdown=1,  # for the connections; requests were waited for in ``shutdown``
            )
        )
        self.service = service
        self.on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again at the end: a drained server exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: leave at once; nothing needs saving, and a step may take seconds."""
        if self.should_exit:
            logger.warning("second signal: leaving at once")
            os._exit(128 + sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer new requests with 503 while the running ones finish; then close everything."""
        gate = self.service.gate
        gate.draining = True
        seconds = self.service.config.drain_seconds
        if gate.open_requests:
            logger.info("draining: %d requests get %g seconds to finish", gate.open_requests, seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        while gate.open_requests and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if gate.open_requests:
            logger.warning("cutting off %d requests", gate.open_requests)
            # Each gets an error event, which is written before the door closes.
            await asyncio.to_thread(self.service.engine.stop)
        await super().shutdown(sockets)
