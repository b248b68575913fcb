"""`pe-rlhf` in a process of its own that starts at once: forked from a server that has imported everything before."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pe_rlhf.cli.main import main

gc.freeze()  # as in conftest.py, for the server

SECONDS = 300
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("pe_rlhf.stages.pipeline", "pe_rlhf.optim.zero", "deepspeed"),
        *("transformers.models.llama.modeling_llama", "matplotlib.figure", "tests.forked"),
    ]
)


class Forked:
    """A command that runs: `Forked(["run", "recipe.yaml"], folder, cache)`.

    more: its environment besides this process's. before: what it calls first.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        cache: Path,
        more: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._said = folder / f".said-{time.monotonic_ns()}"
        environment = {**os.environ, **(more or {})}
        self._process = _SERVER.Process(
            target=_command, args=(arguments, folder, cache, self._said, environment, before)
        )
        self._process.start()

    def wait_until(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment in its life; that it ends or hangs before is an error."""
        deadline = time.monotonic() + SECONDS
        while not moment():
            assert self._process.is_alive(), self.said
            assert time.monotonic() < deadline, "it hangs"
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int | None:
        """SIGKILL; the exit code, which is another if it had ended before."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    def finish(self, code: int = 0) -> str:
        """Wait for its end and return what it said; a command that hangs is a failure."""
        self._process.join(SECONDS)
        if self._process.is_alive():
            self.kill()
        assert self._process.exitcode == code, self.said
        return self.said


def _command(
    arguments: list[str],
    folder: Path,
    cache: Path,
    said: Path,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    with said.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment | {"PE_RLHF_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["pe-rlhf", *arguments]
    if before is not None:
        before()
    main()
