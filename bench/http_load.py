"""Streams of completions against an OpenAI endpoint, timed at the socket: what serve.py and peers.py share.

A client on the server's own machine takes the processor from it, so this one is asyncio on plain sockets.
"""

import asyncio
import json
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """Seconds on one clock: when the request was sent and when each piece of text arrived."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0


def free_port() -> int:
    """A port nobody has right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def random_prompt(rng: random.Random, tokens: int, vocab_size: int) -> list[int]:
    """Token ids without the first two, which end an answer."""
    return [rng.randrange(2, vocab_size) for _ in range(tokens)]


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event of a chunked or length-delimited answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    chunked = b"transfer-encoding: chunked" in head.lower()
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        raise RuntimeError(f"the server answers {head!r} {await reader.read(2000)!r}")
    buffer = b""
    while True:
        if chunked:
            size = int((await reader.readline()).partition(b";")[0], 16)
            data = (await reader.readexactly(size + 2))[:-2]
        else:
            data = await reader.read(65536)
        if not data:
            return
        *events, buffer = (buffer + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                yield event[5:].strip()


async def complete(port: int, body: dict[str, Any]) -> Stream:
    """One streamed /v1/completions. Raises RuntimeError on any answer but 200 and on one without usage."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    stream = Stream(time.perf_counter())
    writer.write(head.encode() + payload)
    await writer.drain()
    async for data in _events(reader):
        now = time.perf_counter()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(f"the stream holds an error: {event['error']}")
        if event.get("choices") and event["choices"][0].get("text"):
            stream.pieces.append(now)
        if event.get("usage"):
            stream.tokens = event["usage"]["completion_tokens"]
            stream.pieces = stream.pieces or [now]  # a token may have no text of its own
    writer.close()
    if not stream.tokens:
        raise RuntimeError("the stream ended without its usage")
    return stream


async def _all(port: int, bodies: list[dict[str, Any]]) -> list[Stream]:
    return await asyncio.gather(*(complete(port, body) for body in bodies))


def run(port: int, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """All bodies at once: tokens/s together, time to first token and gaps between pieces in seconds."""
    streams = asyncio.run(_all(port, bodies))
    start = min(stream.sent for stream in streams)
    end = max(stream.pieces[-1] for stream in streams)
    first = [stream.pieces[0] - stream.sent for stream in streams]
    gaps = [
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.pieces, stream.pieces[1:], strict=False)
    ] or [0.0]
    return {
        "tokens_per_s": sum(stream.tokens for stream in streams) / (end - start),
        "ttft_p50": statistics.median(first),
        "ttft_max": max(first),
        "itl_p50": statistics.median(gaps),
        "itl_p99": sorted(gaps)[min(len(gaps) - 1, int(len(gaps) * 0.99))],
    }


def wait_until_ready(port: int, alive: Any, path: str = "/health", seconds: float = 600) -> None:
    """Return at the first 200 on ``path``. Raises RuntimeError when ``alive()`` turns false or time is up."""
    deadline = time.perf_counter() + seconds
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    while time.perf_counter() < deadline:
        if not alive():
            raise RuntimeError("the server has ended before it was ready")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(request)
                if b" 200 " in connection.recv(64):
                    return
        except OSError:
            pass  # not listening yet
        time.sleep(0.01)
    raise RuntimeError(f"no answer on {path} within {seconds:.0f} s")
