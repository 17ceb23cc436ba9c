"""``moe-serve``: flags -> engine -> app -> uvicorn. Heavy imports wait until the flags are right."""

import argparse
import asyncio
import gc
import importlib
import logging
import socket
import sys
import threading
from pathlib import Path

import moe_runtime
from moe_runtime.cli import add_arguments, from_args
from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.server.settings import ServerConfig

DEMO_NAME = "moe-demo"
USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """Every flag of the server and of the engine, from the two dataclasses that define them."""
    parser = argparse.ArgumentParser(
        prog="moe-serve",
        description="Serve a Mixture-of-Experts checkpoint behind the OpenAI HTTP API.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-serve {moe_runtime.__version__}")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a Hugging Face model folder (default: the bundled demo model)",
    )
    add_arguments(parser, ServerConfig)
    add_arguments(parser, EngineConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command's exit status: 0 after a drain, 2 for a wrong flag, folder or port."""
    arguments = parser().parse_args(argv)
    try:
        server_config = from_args(arguments, ServerConfig)
        engine_config = from_args(arguments, EngineConfig)
        _check_together(server_config, engine_config)
        model_dir, name = _model(arguments.model, server_config.served_model_name)
        with _listen(server_config.host, server_config.port) as listener:
            return _serve(model_dir, name, server_config, engine_config, listener)
    except MoeRuntimeError as error:
        print(f"moe-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:  # a file of the model cannot be read, the folder vanished
        print(f"moe-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    except MemoryError as error:
        reason = str(error) or "out of memory"
        print(
            f"moe-serve: not enough memory ({reason}); lower --cache-bytes or --max-running", file=sys.stderr
        )
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130


def _check_together(config: ServerConfig, engine_config: EngineConfig) -> None:
    """Raise ConfigError for a flag of the server that nothing would read."""
    on_cpu = engine_config.device == "cpu" and engine_config.backend != "triton"
    if config.expert_statistics is not None and on_cpu:
        raise ConfigError(
            "--expert-statistics with --device cpu: there is no GPU to divide; use --device cuda"
        )


def _model(folder: Path | None, served_name: str) -> tuple[Path, str]:
    """The folder to serve and its public name. Raises ConfigError when there is no model in it."""
    if folder is None:
        from moe_runtime.experts.demo import MODEL

        folder, served_name = MODEL, served_name or DEMO_NAME
    if not folder.is_dir():
        raise ConfigError(f"--model {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder}: the folder holds no config.json")
    return folder, served_name or folder.resolve().name


def _listen(host: str, port: int) -> socket.socket:
    """The one socket of this server, bound before the model is loaded: a taken port is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Claimed from now on: two servers may not both load a model for one port. Early clients wait.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from None
    return listener


def _serve(
    model_dir: Path, name: str, config: ServerConfig, engine_config: EngineConfig, listener: socket.socket
) -> int:
    gc.disable()  # a sixth of the time to import torch, whose objects all live on
    from moe_runtime.engine import Engine

    # The web side is imported while the weights are read: that is mostly waiting for memory.
    threading.Thread(target=importlib.import_module, args=("moe_runtime.server.serve",), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # the app logs each request itself, in one line
    from moe_runtime.experts.file_digests import DigestMemo
    from moe_runtime.experts.registry import placement_of
    from moe_runtime.server.expert_statistics import read_hotness
    from moe_runtime.server.scenarios import open_scenarios

    memo = None
    if engine_config.packed_file or engine_config.packed_dir is not None:
        memo = DigestMemo(model_dir, engine_config.packed_dir, verify=config.verify_weights)
    scenarios = open_scenarios(model_dir, config, memo)
    if config.admin_token_file is not None:  # what is wrong with it is told before the weights are read
        from moe_runtime.server.service import read_admin_token

        read_admin_token(config.admin_token_file)
    engine = Engine.load(
        model_dir,
        engine_config,
        placement=None if scenarios.full else placement_of(scenarios),
        hotness=read_hotness(model_dir, config, scenarios, memo),
        live=scenarios.come_and_go and config.admin_token_file is not None,
        ghosts=None if scenarios.exported is None else scenarios.exported.ghosts,
    )
    for scenario in scenarios:
        engine.masks.add(scenario.name, scenario.mask, scenario.policy, scenario.recovery)
    engine.prepare()
    from moe_runtime.async_engine import AsyncEngine
    from moe_runtime.server.serve import Server
    from moe_runtime.server.service import build_service

    gc.freeze()  # what exists now stays: later collections need not look at it
    gc.enable()
    service = build_service(AsyncEngine(engine), model_dir, name, config, scenarios)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    ready = f"moe-serve: {name} is ready at {url} (context {engine.max_context} tokens)"
    server = Server(service, on_ready=lambda: print(ready, flush=True))
    asyncio.run(server.serve(sockets=[listener]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
