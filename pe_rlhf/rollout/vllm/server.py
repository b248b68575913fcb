"""Rollouts from vLLM servers: which weights each of them holds is put there, checked, and put there again if need be.

One request is one response with a seed of its own, so it does not matter which server answers, or how often one was
asked. A server that fails in a batch is left alone until it answers again; then it gets the weights anew, since it may
be another process by now. What it had been asked goes to the others meanwhile. Nothing is returned before all is there.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.interface import check_response, checked_rollout
from pe_rlhf.rollout.vllm.exchange import WeightExchange
from pe_rlhf.rollout.vllm.http import Server, ServerFault
from pe_rlhf.rollout.vllm.probe import Probe
from pe_rlhf.rollout.vllm.requests import response_seeds, sampling_parameters, sync_mode, vllm_rank
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.progress import say
from pe_rlhf.types import Rollout
from reward.errors import InputError

ATTEMPTS = 3  # how often a response is asked for
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_PROBES = 2.0

Response = tuple[list[int], list[float]]


class ServerVLLM:
    """Samples from a role by one or more vLLM servers; waits for them here, and refuses one with another base.

    Args:
        folder: where weights are handed over unless the recipe names another place; the servers have to see it.
        longest_prompt: in tokens.
        on_progress: is told how many responses were finished.
    """

    def __init__(
        self,
        backbone: Backbone,
        role: str,
        config: SamplingConfig,
        *,
        folder: Path,
        longest_prompt: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._backbone, self._role, self._config = backbone, role, config
        self._on_progress = on_progress or (lambda _: None)
        self._merges = sync_mode(config, backbone) == "merged"
        self._rank = 0 if self._merges or role == ANCHOR else vllm_rank(backbone)
        self._version, self._tag, self._path = 0, "", Path()
        self._servers = [Server(url, config.timeout) for url in config.urls]
        self._probe = Probe(backbone, longest_prompt, config.max_new_tokens, config.temperature)
        for server in self._servers:
            self._wait_for(server)
            server.check_length(longest_prompt + config.max_new_tokens)
            if not self._merges:
                self._check_base(server)
        self._exchange = WeightExchange(Path(config.exchange_dir) if config.exchange_dir else folder)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def sync(self, version: int, role: str | None = None) -> None:
        """Put the role as it is now into every server, and check by the probe that it is there."""
        self._role, self._version = role or self._role, version
        before, self._tag = self._tag, f"{self._role}-{version}-{os.urandom(4).hex()}"
        if self._merges:
            self._path = self._exchange.put_merged(self._backbone, self._role, self._tag)
            on_main(self._push_merged)
        elif self._role != ANCHOR:
            self._path = self._exchange.put_adapter(self._backbone, self._role, self._tag, self._rank)
        for server in self._servers:
            self._or_leave_out(server, self._probe_role if self._merges else self._put)
        if before:
            self._exchange.drop(before)

    def close(self) -> None:
        """Unload the adapter, or put the base back; a server that is gone is left as it is."""
        for server in self._servers:
            try:
                server.unload()
                if server.merged:
                    path = self._exchange.put_merged(self._backbone, ANCHOR, f"base-{os.urandom(4).hex()}")
                    server.load_merged(path)
            except (ServerFault, InputError):
                say(f"{server.url}: could not be given its own weights back")
            server.close()
        self._exchange.close()

    def _check_base(self, server: Server) -> None:
        """More than once: an earlier run's requests for an adapter spoil a batch that they share (vLLM 0.32)."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._probe.check(server, server.base, ANCHOR)
                return
            except ServerFault as fault:
                raise TrainingError(f"{server.url}: {fault}") from fault
            except InputError:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(SECONDS_BETWEEN_PROBES)

    def _push_merged(self) -> None:
        """Rank 0 does it for all: a server has one set of weights, and nobody's requests may run while they change."""
        for server in self._servers:
            self._or_leave_out(server, lambda server: server.load_merged(self._path))

    def _or_leave_out(self, server: Server, step: Callable[[Server], None]) -> None:
        try:
            step(server)
        except ServerFault as fault:
            server.down = True
            say(f"{server.url}: {fault}; it is left out until it is back")

    def _put(self, server: Server) -> None:
        if self._merges:
            server.load_merged(self._path)
        elif self._role == ANCHOR:
            server.unload()
        else:
            server.load_adapter(self._tag, self._path)
        self._probe_role(server)

    def _probe_role(self, server: Server) -> None:
        """Check that the server has the role as it is now; then it can be asked."""
        self._probe.check(server, server.model, self._role)
        server.down = False

    def _wait_for(self, server: Server) -> None:
        """Until it answers. Raises `TrainingError` after `start_timeout`."""
        start, said = time.monotonic(), False
        while not server.is_ready():
            if time.monotonic() - start > self._config.start_timeout:
                raise TrainingError(f"the vLLM server {server.url} is not up after {self._config.start_timeout:g} s")
            if not said:
                say(f"waiting up to {self._config.start_timeout:g} s for the vLLM server {server.url}")
                said = True
            time.sleep(SECONDS_BETWEEN_LOOKS)

    # ---- responses --------------------------------------------------------------------------------------------------

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        for server in self._servers:
            if self._merges and not server.down:
                self._check_merged(server)
        batch = _Batch(prompts, response_seeds(seed, prompts, rows))
        asyncio.run(self._sample(batch))
        responses = [batch.responses[i] for i in range(len(prompts))]
        return checked_rollout(prompts, responses, self._version, self._backbone, self._config)

    def _check_merged(self, server: Server) -> None:
        """A server that was started again between two batches has its own weights, under the same name as before."""
        try:
            server.down = not self._probe.holds(server, self._role)
        except ServerFault:
            server.down = True
        if server.down:
            say(f"{server.url} does not hold the weights it was given (was it started again?); it gets them anew")

    async def _sample(self, batch: _Batch) -> None:
        """Ask all servers for responses at once, each for as many as it may compute side by side."""
        each = min(self._config.batch_size, -(-len(batch.prompts) // len(self._servers)))
        async with httpx.AsyncClient(timeout=self._config.timeout, limits=httpx.Limits(max_connections=None)) as client:
            work = [self._work(client, server, batch) for server in self._servers for _ in range(each)]
            tasks = [asyncio.create_task(part) for part in work]
            everything = asyncio.create_task(batch.done.wait())
            try:
                while not everything.done():
                    pending = {everything, *(task for task in tasks if not task.done())}
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in tasks:
                        if task.done():
                            task.result()  # raises what stopped it
                    if all(task.done() for task in tasks) and not batch.done.is_set():
                        raise TrainingError(f"no vLLM server is left of {', '.join(self._config.urls)}")
            finally:
                for task in (everything, *tasks):
                    task.cancel()
                await asyncio.gather(everything, *tasks, return_exceptions=True)

    async def _work(self, client: httpx.AsyncClient, server: Server, batch: _Batch) -> None:
        """Ask one server for one response after the other."""
        sampling = sampling_parameters(self._config, self._backbone.eos_token_ids)
        while True:
            if server.down and not await self._back(server, batch):
                return
            i = await batch.queue.get()
            if server.down:  # it went while this waited for something to ask
                batch.queue.put_nowait(i)
                continue
            try:
                ids, logprobs = await server.complete(client, batch.prompts[i], batch.seeds[i], sampling, self._tag)
                limits = {"eos_token_ids": self._backbone.eos_token_ids, "max_new_tokens": self._config.max_new_tokens}
                check_response(ids, logprobs, **limits)  # type: ignore[arg-type]
            except (ServerFault, ValueError) as fault:
                self._give_back(server, batch, i, fault)
            else:
                batch.responses[i] = ids, logprobs
                self._on_progress(1)
                if len(batch.responses) == len(batch.prompts):
                    batch.done.set()

    def _give_back(self, server: Server, batch: _Batch, i: int, fault: Exception) -> None:
        batch.attempts[i] += 1
        if batch.attempts[i] >= ATTEMPTS:
            raise TrainingError(f"a response could not be had in {ATTEMPTS} attempts; the last: {server.url}: {fault}")
        if not server.down:
            say(f"{server.url}: {fault}; what it was asked is asked again")
        server.down = True
        batch.queue.put_nowait(i)

    async def _back(self, server: Server, batch: _Batch) -> bool:
        """Wait until a server that failed answers, and give it the weights anew; False where it does not come back."""
        async with server.lock():
            # All that ask this server wait for the lock: what one of them has waited, the next need not wait again.
            batch.waits.setdefault(server.url, time.monotonic() + self._config.start_timeout)
            while server.down and time.monotonic() < batch.waits[server.url]:
                try:
                    # In a thread what it takes is short: a batch that the others finish does not wait for more.
                    if await asyncio.to_thread(server.is_ready):
                        await asyncio.to_thread(self._put, server)
                        say(f"{server.url} is back")
                        break
                except ServerFault as fault:
                    say(f"{server.url}: {fault}")
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            if not server.down:
                batch.waits.pop(server.url, None)
            return not server.down


class _Batch:
    """What is asked for, what is there, and what is still to be asked."""

    def __init__(self, prompts: list[list[int]], seeds: list[int]) -> None:
        self.prompts, self.seeds = prompts, seeds
        self.responses: dict[int, Response] = {}
        self.attempts = [0] * len(prompts)
        self.waits: dict[str, float] = {}  # until when a server that is down is waited for
        self.done = asyncio.Event()
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        for i in range(len(prompts)):
            self.queue.put_nowait(i)
