"""`pe-rlhf serve-reward`: the rewards of a run or model over HTTP, for `ppo.reward: [{url: …}]` of other runs."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer


def serve_reward(
    model: Annotated[str, typer.Argument(help="A reward run (its directory), or a model with one label.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is a free one.")] = 8080,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses scored together, of several requests too.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; a run's model is in its recipe's.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Score prompts and responses that are posted to /score until it is stopped; /health says what is served."""
    from pe_rlhf.scoring.reward_judge import reward_scores
    from pe_rlhf.scoring.reward_server import RewardServer
    from pe_rlhf.system.failures import InputError
    from pe_rlhf.system.progress import say

    score = reward_scores(model, dtype, device)
    try:
        server = RewardServer((host, port), model, score, batch_size)
    except OSError as error:
        raise InputError(
            f"--port: {host}:{port} cannot be listened on: {error.strerror or error}", kind="in_use", key="--port"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    with server:
        say(f"serving the rewards of {model} at {server.url}")
        server.serve_forever()
