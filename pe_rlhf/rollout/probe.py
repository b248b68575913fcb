"""A fingerprint of weights that any server can be asked for: the log-probs of a few fixed tokens.

Names, paths and configs say what somebody called the weights; these numbers follow from every one of them.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import torch

from pe_rlhf.backbone import ANCHOR, Backbone
from pe_rlhf.rollout.vllm_http import Refusal, Server, ServerFault
from pe_rlhf.seeding import permutation
from pe_rlhf.types import Sequences
from reward.errors import InputError

TOKENS = 24
# Mean of the absolute differences, nats per token: what two implementations differ by, times a hundred in fp32.
TOLERANCE_FP32, TOLERANCE_NARROW = 1e-3, 0.1


class Probe:
    """Fixed tokens from all over the vocabulary, the highest id among them, and their log-probs under a role."""

    def __init__(self, backbone: Backbone, longest_prompt: int) -> None:
        vocabulary: int = backbone.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        drawn = permutation(vocabulary, 0, "probe")[: max(2, min(TOKENS, longest_prompt))]
        self._ids = [*drawn[:-1], vocabulary - 1]
        self._backbone = backbone
        self._tolerance = TOLERANCE_FP32 if backbone.model.dtype == torch.float32 else TOLERANCE_NARROW
        self._expected: dict[str, list[float]] = {}
        self.expect(ANCHOR)

    def expect(self, role: str) -> None:
        """Compute the trainer's log-probs of a role as it is now."""
        sequences = Sequences.pack([self._ids[:1]], [self._ids[1:]], self._backbone.pad_token_id)
        with torch.no_grad(), self._backbone.role(role):
            self._expected[role] = self._backbone.response_logprobs(sequences)[0].tolist()

    def check(self, server: Server, model: str, role: str) -> list[float]:
        """What the server answers for a model. Raises `InputError` where that is not the role, as last expected."""
        try:
            found = server.prompt_logprobs(model, self._ids)
        except Refusal as fault:
            raise InputError(f"{server.url} serves another model than {self._backbone.name}: {fault}") from fault
        distance = _distance(found, self._expected[role])
        if not distance <= self._tolerance:
            raise InputError(
                f"{server.url} serves other weights than the {role} of {self._backbone.name}: log-probs of some tokens"
                f" differ by {distance:.3g} on average (another model or dtype, or what an earlier run left there:"
                " start it anew)"
            )
        return found

    def check_temperature(self, server: Server, role: str, sampling: dict[str, Any]) -> None:
        """Raise `InputError` where the log-probs of sampled tokens are not those of the tempered distribution."""

        async def complete() -> tuple[list[int], list[float]]:
            async with httpx.AsyncClient(timeout=None) as client:
                return await server.complete(client, self._ids[:2], 0, sampling, "probe")

        ids, found = asyncio.run(complete())
        sequences = Sequences.pack([self._ids[:2]], [ids], self._backbone.pad_token_id)
        with torch.no_grad(), self._backbone.role(role):
            expected = self._backbone.response_logprobs(sequences, sampling["temperature"])[0].tolist()
        if not _distance(found, expected) <= self._tolerance:
            raise InputError(
                f"{server.url} gives log-probs that are not of temperature {sampling['temperature']:g}: start it by"
                " launch/vllm_server.sh, or with --logprobs-mode processed_logprobs"
            )

    def same(self, server: Server) -> bool:
        """Whether the server still answers as it did when it was last checked."""
        try:
            return _distance(server.prompt_logprobs(server.model, self._ids), server.probe_answer) <= self._tolerance
        except ServerFault:
            return False


def _distance(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(b)
