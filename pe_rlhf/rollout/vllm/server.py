"""Rollouts from vLLM servers: the weights are put into each server, checked, and put there again when it has lost them.

A response has a seed of its own, so its tokens do not depend on the server that answers or on how often it was asked.
That makes failures simple: if a server fails, the whole batch is asked again from the servers that answer.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.interface import checked_rollout
from pe_rlhf.rollout.vllm.exchange import WeightExchange
from pe_rlhf.rollout.vllm.http import (
    SECONDS_BETWEEN_LOOKS,
    Response,
    Server,
    ServerFault,
    server_error,
    together,
)
from pe_rlhf.rollout.vllm.probe import ServerProbe
from pe_rlhf.rollout.vllm.requests import response_seeds, sampling_parameters, sync_mode, vllm_rank
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.failures import ElsewhereError
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import Advance, no_progress, say
from pe_rlhf.types import Rollout
from reward.errors import InputError

ATTEMPTS = 3  # how often a batch is asked for
SECONDS_BETWEEN_PROBES = 2.0


class ServerVLLM:
    """Samples from a role by one or more vLLM servers; waits for them here, and refuses one with another base.

    Args:
        folder: where weights are handed over unless the recipe names another folder; the servers have to see it.
        longest_prompt: in tokens.
        on_progress: gets the number of finished responses, less those of a batch that is asked for again.
    """

    def __init__(
        self,
        backbone: Backbone,
        role: str,
        config: SamplingConfig,
        *,
        folder: Path,
        longest_prompt: int,
        on_progress: Advance | None = None,
    ) -> None:
        self._backbone, self._role, self._config = backbone, role, config
        self._advance = on_progress or no_progress
        self._merges = sync_mode(config, backbone) == "merged"
        self._rank = 0 if self._merges or role == ANCHOR else vllm_rank(backbone)
        self._version, self._tag, self._path = 0, "", Path()
        self._servers = [Server(url, config.timeout) for url in config.urls]
        self._known: Response | None = None  # what a server with the role as it is now answers to the probe
        self._probe = ServerProbe(backbone, longest_prompt, config.max_new_tokens, config.temperature)
        for server in self._servers:
            server.wait(config.start_timeout)
            server.check_length(longest_prompt + config.max_new_tokens)
            if not self._merges:
                self._check_base(server)
        self._exchange = WeightExchange(Path(config.exchange_dir) if config.exchange_dir else folder)
        self._asked: Future[list[Response]] | None = None  # in the background

    # ---- weights ----------------------------------------------------------------------------------------------------

    def sync(self, version: int, role: str | None = None) -> None:
        """Put the role as it is now into every server, and check by the probe that it is there.

        Rank 0 does it for all: a server computes with one adapter at a time, and with one set of weights.
        """
        self._role, self._version, self._known = role or self._role, version, None
        before, (self._tag, self._path, answers) = self._tag, on_main(self._hand_over)
        for server in self._servers:
            if not is_main():
                server.adapter = None if self._merges or self._role == ANCHOR else self._tag
            if not (down := server.url not in answers):
                self._known = answers[server.url]
                _refuse(self._probe.refusal(server, self._known, self._role, on_all_ranks=True))
            server.down = down
        if before:
            self._exchange.drop(before)

    def _hand_over(self) -> tuple[str, Path, dict[str, Response]]:
        """Put the role into the servers. Returns its tag, where it is, and what each answers to the probe.

        A server that fails is left out, and has no answer.
        """
        # vLLM keeps the prefix cache of an adapter that is reloaded under its old name, so every state has a new one.
        self._tag = f"{self._role}-{self._version}-{os.urandom(4).hex()}"
        if self._merges:
            self._path = self._exchange.put_merged(self._backbone, self._role, self._tag)
        elif self._role != ANCHOR:
            self._path = self._exchange.put_adapter(self._backbone, self._role, self._tag, self._rank)
        answers: dict[str, Response] = {}
        for server in self._servers:
            try:
                self._put(server)
                answers[server.url] = self._probe.ask(server, server.model)
            except ServerFault as fault:
                say(f"{server.url}: {fault}; it is left out until it is back")
        return self._tag, self._path, answers

    def close(self) -> None:
        """Unload the adapter, or put the base back; a server that is gone is left as it is."""
        if self._asked is not None:
            self._asked.cancel()
        for server in self._servers:
            try:
                server.unload()
                if server.merged:
                    path = self._exchange.put_merged(self._backbone, ANCHOR, f"base-{os.urandom(4).hex()}")
                    server.load_merged(path)
                    server.merged = False
            except (ServerFault, InputError):
                say(f"{server.url}: could not be given its own weights back")
            server.close()
        self._exchange.close()

    def _check_base(self, server: Server) -> None:
        refusal: InputError | None = None
        # More than once: an earlier run's requests for an adapter spoil a batch that they share (vLLM 0.32).
        for attempt in range(1, ATTEMPTS + 1):
            answer = on_main(lambda: self._ask_base(server))
            refusal = self._probe.refusal(server, answer, ANCHOR, on_all_ranks=True)
            if refusal is None:
                return
            if attempt < ATTEMPTS:
                time.sleep(SECONDS_BETWEEN_PROBES)
        _refuse(refusal)

    def _ask_base(self, server: Server) -> Response:
        try:
            return self._probe.ask(server, server.base)
        except ServerFault as fault:
            raise server_error(f"{server.url}: {fault}") from fault

    def _put(self, server: Server) -> None:
        if self._merges:
            server.load_merged(self._path)
        elif self._role == ANCHOR:
            server.unload()
        else:
            server.load_adapter(self._tag, self._path)

    # ---- responses --------------------------------------------------------------------------------------------------

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        """One response per prompt. If a server fails, the whole batch is asked again, from the servers that answer.

        Raises `TrainingError` after three attempts, and where no server answers within `start_timeout`.
        """
        seeds = response_seeds(seed, prompts, rows)
        failed: set[str] = set()
        last = ""
        for _ in range(ATTEMPTS):
            try:
                responses = asyncio.run(self._sample(self._usable(failed), prompts, seeds))
                return checked_rollout(prompts, responses, self._version, self._backbone, self._config)
            except ServerFault as fault:
                last = str(fault)
                say(f"{last}; the batch is asked for again")
                failed |= {server.url for server in self._servers if server.down}
        raise server_error(f"a batch of {len(prompts)} responses failed {ATTEMPTS} times, the last time: {last}")

    def begin(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Callable[[], Rollout]:
        """As `generate`, in the background, with one attempt: a second one would need the policy as it was."""
        servers, seeds = self._usable(set()), response_seeds(seed, prompts, rows)
        self._asked = asyncio.run_coroutine_threadsafe(self._sample(servers, prompts, seeds), self._background)

        def wait() -> Rollout:
            assert self._asked is not None
            try:
                responses = self._asked.result()
            except ServerFault as fault:
                raise server_error(str(fault)) from fault
            return checked_rollout(prompts, responses, self._version, self._backbone, self._config)

        return wait

    @cached_property
    def _background(self) -> asyncio.AbstractEventLoop:
        """A loop in a thread that ends with this process."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def _usable(self, failed: set[str]) -> list[Server]:
        """The servers that have the role. Those that failed in this batch only if no other one answers.

        Raises `TrainingError` after `start_timeout` without any.
        """
        deadline = time.monotonic() + self._config.start_timeout
        while True:
            others = [server for server in self._servers if server.url not in failed and self._has_role(server)]
            if usable := others or [server for server in self._servers if self._has_role(server)]:
                return usable
            if time.monotonic() > deadline:
                raise server_error(f"no vLLM server answers of {', '.join(self._config.urls)}")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _has_role(self, server: Server) -> bool:
        """Whether a server has the role as it is now, which it is given where it lost it."""
        try:
            # A restarted server has its own weights under the same name, while it does not know an adapter's name.
            if not server.down and (not self._merges or self._probe.holds(server, self._role)):
                return True
            server.down = True
            if not server.is_ready():
                return False
            self._put(server)
            self._probe.check(server, server.model, self._role, self._known)
            server.down = False
        except ServerFault as fault:
            server.down = True
            say(f"{server.url}: {fault}")
            return False
        say(f"{server.url} has the weights again")
        return True

    async def _sample(self, servers: list[Server], prompts: list[list[int]], seeds: list[int]) -> list[Response]:
        """A part of the batch from each server, with as many requests at once as it may compute side by side."""
        finished = 0

        def advance(n: int, note: str = "") -> None:
            nonlocal finished
            finished += n
            self._advance(n)

        sampling = sampling_parameters(self._config, self._backbone.eos_token_ids)
        step = len(servers)

        async def part(k: int, server: Server) -> list[Response]:
            own_prompts, own_seeds = prompts[k::step], seeds[k::step]
            at_once = min(self._config.batch_size, max(1, len(own_prompts)))
            try:
                asked = server.sample(own_prompts, own_seeds, sampling, self._tag, at_once=at_once, advance=advance)
                # Checked here, where it is known which server has answered.
                checked_rollout(own_prompts, responses := await asked, self._version, self._backbone, self._config)
            except (ServerFault, ValueError) as fault:
                server.down = True
                raise ServerFault(f"{server.url}: {fault}") from fault
            return responses

        try:
            parts = await together(part(k, server) for k, server in enumerate(servers))
        except ServerFault:
            self._advance(-finished)
            raise
        return [parts[i % step][i // step] for i in range(len(prompts))]


def _refuse(refusal: InputError | None) -> None:
    """Raise what all ranks have found; rank 0 says it."""
    if refusal is not None:
        raise refusal if is_main() else ElsewhereError(str(refusal))
