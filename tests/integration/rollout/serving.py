"""A real vLLM server on loopback, started by the project's own script."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.paths import ROOT


@contextmanager
def serve(model: str, folder: Path, *options: str, by_hand: bool = False) -> Iterator[str]:
    """The address of a server of a model, with the routes for both ways of sync.

    by_hand: without the project's script, and so with vLLM's defaults and the checkpoint's; with adapters only.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "server.log"
    environment = os.environ | {"MERGED": "1", "LORA_RANK": "8", "PYTHON": sys.executable, "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    always = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "32"]
    command = [str(ROOT / "launch" / "vllm_server.sh"), model, str(port), *always, *options]
    if by_hand:
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        served = ["--model", model, "--port", str(port), "--enable-lora"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *served, *always, *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 600
        with httpx.Client(timeout=2) as client:  # making one takes longer than asking
            while not _answers(client, url):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
