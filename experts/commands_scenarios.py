"""``moe-experts scenarios``: which scenarios a running server serves, and one more or one less."""

import argparse
import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from moe_runtime.errors import ConfigError, PlanError

METHODS = {"list": "GET", "add": "POST", "drop": "DELETE"}
TIMEOUT_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask a server that was started with --admin-token-file. Adding reads the scenario from the server's "
        "folder of scenarios; dropping answers when its last request has ended."
    )
    parser.add_argument("action", choices=list(METHODS))
    parser.add_argument("name", nargs="?", help="the scenario to add or to drop")
    parser.add_argument(
        "--server", default="http://127.0.0.1:8000", help="its address (default: http://127.0.0.1:8000)"
    )
    parser.add_argument("--admin-token-file", type=Path, required=True, help="the server's own, or a copy")


def run(arguments: argparse.Namespace) -> int:
    """0 when the server did as told."""
    if (arguments.name is None) != (arguments.action == "list"):
        raise ConfigError("add and drop need the name of one scenario, list needs none")
    try:
        token = arguments.admin_token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--admin-token-file {arguments.admin_token_file}: {error.strerror}") from error
    path = "/admin/scenarios" + (f"/{quote(arguments.name, safe='')}" if arguments.name else "")
    answer = _ask(arguments.server, METHODS[arguments.action], path, token)
    if arguments.json:
        print(json.dumps(answer))
    else:
        for item in answer.get("scenarios", [answer]):
            running = f", {item['running']} running" if "running" in item else ""
            print(f"{item['name']}: {item['state']}{running}")
    return 0


def _ask(server: str, method: str, path: str, token: str) -> dict[str, Any]:
    """The server's JSON. Raises ConfigError for an address without a server, PlanError for a refusal."""
    address = urlsplit(server)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(f"--server {server}: write for example http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname, address.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError(f"--server {server}: no answer ({error})") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        reason = answer["error"]["message"]
        if response.status == http.client.NOT_FOUND and answer["error"]["code"] == "unknown_url":
            reason = "the server takes no orders; start it with --admin-token-file"
        raise PlanError(reason)
    if not isinstance(answer, dict):
        raise ConfigError(f"--server {server}: not a server of ours")
    return answer
