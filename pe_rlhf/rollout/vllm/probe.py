"""A fingerprint of weights that any server can be asked for: the log-probs of what it samples after fixed tokens.

Names, paths and configs say what somebody called the weights; these numbers follow from every one of them. They are not
taken from vLLM's `prompt_logprobs`: with an adapter loaded those end the engine when other requests run beside them.
"""

from __future__ import annotations

import asyncio
import os

import httpx
import torch

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.vllm.http import Server
from pe_rlhf.rollout.vllm.requests import NEUTRAL
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import permutation
from pe_rlhf.types import Sequences
from reward.errors import InputError

PROMPT_TOKENS, NEW_TOKENS = 24, 8
# Mean of the absolute differences, nats per token: what two implementations differ by, times a hundred in fp32.
TOLERANCE_FP32, TOLERANCE_NARROW = 1e-3, 0.1


class Probe:
    """A prompt of tokens from all over the vocabulary, the highest id among them."""

    def __init__(self, backbone: Backbone, longest_prompt: int, new_tokens: int, temperature: float) -> None:
        vocabulary: int = backbone.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        drawn = permutation(vocabulary, 0, "probe")[: min(PROMPT_TOKENS, longest_prompt)]
        self._prompt = [*drawn[:-1], vocabulary - 1]
        self._backbone, self._temperature = backbone, temperature
        # No id ends these responses, so that there is always the same number of tokens to compare.
        length = min(NEW_TOKENS, new_tokens)
        self._sampling = {**NEUTRAL, "temperature": temperature, "max_tokens": length, "ignore_eos": True}
        self._tolerance = TOLERANCE_FP32 if backbone.model.dtype == torch.float32 else TOLERANCE_NARROW

    def check(self, server: Server, model: str, role: str) -> None:
        """Raise `InputError` where a model that the server has is not the role as it is now; `ServerFault`."""
        try:
            ids, found = asyncio.run(self._complete(server, model))
        except TrainingError as refusal:
            raise InputError(f"{server.url} serves another model than {self._backbone.name}: {refusal}") from refusal
        distance = self._distance(ids, found, role, self._temperature)
        if distance <= self._tolerance:
            return
        if self._distance(ids, found, role, 1.0) <= self._tolerance:
            raise InputError(
                f"{server.url} gives log-probs that are not of temperature {self._temperature:g}: start it by"
                " launch/vllm_server.sh, or with --logprobs-mode processed_logprobs"
            )
        raise InputError(
            f"{server.url} serves other weights than the {role} of {self._backbone.name}: its log-probs differ"
            f" by {distance:.3g} on average (another model or dtype, or what an earlier run left there: start it anew)"
        )

    def holds(self, server: Server, role: str) -> bool:
        """Whether the server still samples from the role as it is now; raises `ServerFault`."""
        try:
            self.check(server, server.model, role)
        except InputError:
            return False
        return True

    async def _complete(self, server: Server, model: str) -> tuple[list[int], list[float]]:
        async with httpx.AsyncClient(timeout=server.timeout) as client:
            salt = f"probe-{os.urandom(8).hex()}"  # nothing of an earlier answer is in the prefix cache for it
            return await server.complete(client, self._prompt, 0, self._sampling, salt, model)

    @torch.no_grad()
    def _distance(self, ids: list[int], found: list[float], role: str, temperature: float) -> float:
        if max(ids) > max(self._prompt) or len(ids) != len(found):
            return float("inf")
        sequences = Sequences.pack([self._prompt], [ids], self._backbone.pad_token_id)
        with self._backbone.role(role):
            expected_N = self._backbone.response_logprobs(sequences, temperature)[0]
        return float((expected_N.float().cpu() - torch.tensor(found)).abs().mean())
