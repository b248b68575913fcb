"""`pe-rlhf serve-reward`: the rewards of a run or model over HTTP, for `ppo.reward: [{url: …}]` of other runs."""

from __future__ import annotations

import ipaddress
import os
import signal
import threading
from datetime import datetime
from typing import Annotated

import typer

from reward.errors import InputError


def serve_reward(
    model: Annotated[str, typer.Argument(help="A reward run (its directory), or a model with one label.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = (
        "127.0.0.1"
    ),
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the key that clients have to send; needed beyond this machine."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is a free one.")] = 8080,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses scored together, of several requests too.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; a run's model is in its recipe's.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    date: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="The day that a chat template prints as today's; a run has its own."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Score prompts and responses that are posted to /score until it is stopped; /health says what is served.

    Whoever reaches /score gets answers, so an address beyond this machine needs a key.
    """
    key = _key(host, api_key_env)

    from pe_rlhf.data.codec import dated
    from pe_rlhf.scoring.reward_judge import reward_scores
    from pe_rlhf.scoring.reward_server import RewardServer
    from pe_rlhf.system.progress import say

    with dated(None if date is None else date.date().isoformat()):
        score = reward_scores(model, dtype, device)
    try:
        server = RewardServer((host, port), model, score, batch_size, key)
    except OSError as error:
        raise InputError(
            f"--port: {host}:{port} cannot be listened on: {error.strerror or error}", kind="in_use", key="--port"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    with server:
        say(f"serving the rewards of {model} at {server.url}")
        server.serve_forever()


def _key(host: str, variable: str | None) -> str | None:
    """The key that clients send. Raises `InputError` where there is none and the address is not this machine's own."""
    if variable is None:
        if not _is_local(host):
            raise InputError(
                f"--host {host}: other machines reach it, and it asks for no key",
                kind="missing",
                key="--api-key-env",
                fix="name the environment variable of a key with --api-key-env; clients name it in server.api_key_env",
            )
        return None
    if not (key := os.environ.get(variable, "").strip()):
        message = f"--api-key-env: the environment variable {variable} holds no key"
        raise InputError(message, kind="missing", key="--api-key-env")
    return key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
