"""A fingerprint of weights that any server can be asked for: the log-probs of what it samples after fixed tokens.

Names, paths and configs are labels; these numbers depend on every weight. They are not vLLM's `prompt_logprobs`: with
an adapter loaded, those end the engine when other requests run at the same time.
"""

from __future__ import annotations

import asyncio
import os

import torch

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.vllm.http import Server, server_refused
from pe_rlhf.rollout.vllm.requests import NEUTRAL
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import permutation
from pe_rlhf.types import Sequences
from reward.errors import InputError

PROMPT_TOKENS, NEW_TOKENS = 24, 8
# Mean absolute difference, nats per token. Two implementations differ by about 1e-5 in fp32 and 1e-2 in bf16.
TOLERANCE_FP32, TOLERANCE_NARROW = 1e-3, 0.1


class Probe:
    """A prompt of random tokens and the highest id of the vocabulary, which a smaller model does not have."""

    def __init__(self, backbone: Backbone, longest_prompt: int, new_tokens: int, temperature: float) -> None:
        vocabulary: int = backbone.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        drawn = permutation(vocabulary, 0, "probe")[: min(PROMPT_TOKENS, longest_prompt)]
        self._prompt = [*drawn[:-1], vocabulary - 1]
        self._backbone, self._temperature = backbone, temperature
        # Without an end-of-sequence every response has the same number of tokens to compare.
        length = min(NEW_TOKENS, new_tokens)
        self._sampling = {**NEUTRAL, "temperature": temperature, "max_tokens": length, "ignore_eos": True}
        self._tolerance = TOLERANCE_FP32 if backbone.model.dtype == torch.float32 else TOLERANCE_NARROW

    def check(self, server: Server, model: str, role: str) -> None:
        """Raise `InputError` if the server's model is not the role as it is now, and `ServerFault`."""
        salt = f"probe-{os.urandom(8).hex()}"  # the prefix cache has nothing of an earlier answer under a new salt
        try:
            ((ids, found),) = asyncio.run(server.sample([self._prompt], [0], self._sampling, salt, model=model))
        except TrainingError as refusal:  # a token id that its vocabulary does not have
            raise self._other(server, f"another model than {self._backbone.name}: {refusal}") from refusal
        distance = self._distance(ids, found, role, self._temperature)
        if distance <= self._tolerance:
            return
        # Log-probs before the temperature are the most common mistake of a server that was started by hand.
        if self._distance(ids, found, role, 1.0) <= self._tolerance:
            message = f"{server.url} gives log-probs that are not of temperature {self._temperature:g}"
            fix = "start it by launch/vllm_server.sh, or with --logprobs-mode processed_logprobs"
            raise server_refused("mismatch", message, fix)
        raise self._other(
            server,
            f"other weights than the {role} of {self._backbone.name}: its log-probs differ by {distance:.3g} on average"
            " (another model or dtype, or weights that an earlier run left there)",
        )

    def holds(self, server: Server, role: str) -> bool:
        """Whether the server still samples from the role as it is now. Raises `ServerFault`."""
        try:
            self.check(server, server.model, role)
        except InputError:
            return False
        return True

    def _other(self, server: Server, what: str) -> InputError:
        return server_refused("mismatch", f"{server.url} serves {what}", "restart it")

    @torch.no_grad()
    def _distance(self, ids: list[int], found: list[float], role: str, temperature: float) -> float:
        if max(ids) > max(self._prompt) or len(ids) != len(found):
            return float("inf")
        sequences = Sequences.pack([self._prompt], [ids], self._backbone.pad_token_id)
        with self._backbone.role(role):
            expected_N = self._backbone.response_logprobs(sequences, temperature)[0]
        return float((expected_N.float().cpu() - torch.tensor(found)).abs().mean())
