"""Every limit of the HTTP edge, stated once; ``moe-serve`` derives its flags from here."""

from dataclasses import dataclass, fields
from pathlib import Path

from moe_runtime.config import option
from moe_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the server listens and what it refuses. Raises ConfigError on a value that cannot work."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; the default is for this machine only. There is neither TLS nor an API key "
        "yet, so put a proxy in front before opening it",
    )
    port: int = option(8000, "TCP port; 0 takes a free one")
    served_model_name: str = option(
        "", "name that clients send as 'model' (default: the model folder's name)"
    )
    scenario_dir: Path | None = option(
        None,
        "folder of scenarios, each a folder with plan.json and certificate.json (default: scenarios in "
        "the model folder, if there is one)",
    )
    scenarios: str = option(
        "",
        "load only the experts that these scenarios use, for example credit,wealth, and serve no others: "
        "the full model is not offered then (default: all experts, and every scenario of the folder)",
    )
    allow_uncertified: bool = option(
        False, "serve scenarios without a valid certificate, too; lists and log say why it is not valid"
    )
    verify_weights: bool = option(
        False,
        "with scenarios, hash all weight files at start, also those of which an earlier start remembers the "
        "digest and whose size, times and inode are as they were",
    )
    expert_statistics: Path | None = option(
        None,
        "file of `moe-experts profile`: where a GPU cannot hold all experts, those that its texts chose most "
        "stay there (the texts of --scenarios alone, if that is given)",
    )
    drift_log: Path | None = option(
        None, "file to append each scenario request's lost mass to, for `moe-experts drift`; no text is in it"
    )
    admin_token_file: Path | None = option(
        None,
        "file with a secret of 16 characters or more, readable by its owner alone, that opens "
        "/admin/scenarios/NAME: POST adds a scenario of the folder, DELETE takes one away (default: closed)",
    )
    max_body_bytes: int = option(4 << 20, "largest request body; more gets 413 unread", unit="bytes")
    max_buffered_bytes: int = option(
        256 << 20, "request bodies held at one time, all clients together; more gets 503", unit="bytes"
    )
    max_header_bytes: int = option(32 << 10, "largest request head; more gets 431", unit="bytes")
    max_headers: int = option(100, "most header lines in a request; more gets 431")
    max_connections: int = option(512, "open connections; more get 503")
    max_choices: int = option(64, "most choices of one request: its prompts times its 'n'")
    header_timeout: float = option(10.0, "seconds in which a request's head must arrive, however it trickles")
    body_timeout: float = option(60.0, "seconds in which a request's body must arrive; later gets 408")
    write_timeout: float = option(60.0, "seconds a client may leave its answer unread before it is cut off")
    keep_alive: float = option(75.0, "seconds an idle connection stays open between requests")
    drain_seconds: float = option(30.0, "seconds that running requests get to finish after SIGTERM")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: a port is between 0 and 65535")
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and field.name not in ("port", "drain_seconds")
                and not value > 0
            ):
                raise ConfigError(f"--{field.name.replace('_', '-')} {value}: must be above 0")
        if self.drain_seconds < 0:
            raise ConfigError(f"--drain-seconds {self.drain_seconds}: must be 0 or more")
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ConfigError("--max-buffered-bytes must be at least --max-body-bytes")
