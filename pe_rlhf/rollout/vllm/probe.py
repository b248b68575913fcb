"""A fingerprint of weights that any server can be asked for: the log-probs of what it samples after fixed tokens.

Names, paths and configs are labels; these numbers depend on every weight. They are not vLLM's `prompt_logprobs`: with
an adapter loaded, those end the engine when other requests run at the same time.
"""

from __future__ import annotations

import asyncio
import os
from itertools import takewhile
from typing import Any

import torch

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.vllm.http import Response, Server, server_refused
from pe_rlhf.rollout.vllm.requests import NEUTRAL
from pe_rlhf.system.distributed import from_main, is_sharded
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import permutation
from pe_rlhf.types import Sequences
from reward.errors import InputError

PROMPT_TOKENS, NEW_TOKENS = 24, 8
# Mean absolute difference, nats per token. Two implementations differ by about 1e-5 in fp32 and 1e-2 in bf16.
TOLERANCE_FP32, TOLERANCE_NARROW = 1e-3, 0.1


def asked(server: Server, prompt: list[int], sampling: dict[str, Any], model: str, name: str) -> Response:
    """What the server's `model` samples after a prompt of ids.

    Raises `ServerFault`, and `InputError` where it refuses them: its vocabulary is not that of the model called `name`.
    """
    salt = f"probe-{os.urandom(8).hex()}"  # the prefix cache has nothing of an earlier answer under a new salt
    try:
        (answer,) = asyncio.run(server.sample([prompt], [0], sampling, salt, model=model))
    except TrainingError as refusal:  # a token id that its vocabulary does not have
        raise other_model(server, f"another model than {name}: {refusal}") from refusal
    return answer


def other_model(server: Server, what: str) -> InputError:
    """The refusal of a server that computes something else."""
    return server_refused("mismatch", f"{server.url} serves {what}", "restart it")


class ServerProbe:
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

    def ask(self, server: Server, model: str) -> Response:
        """What the server samples after the prompt. Raises `ServerFault`, and `InputError` for another vocabulary."""
        return asked(server, self._prompt, self._sampling, model, self._backbone.name)

    def refusal(self, server: Server, answer: Response, role: str, *, on_all_ranks: bool = False) -> InputError | None:
        """Why an answer is not of the role as it is now; None where it is.

        on_all_ranks: all ranks call this together, which ZeRO-3's passes need, and rank 0's numbers decide for all.
        """
        decided = from_main if on_all_ranks else float
        distance = decided(self._distance(*answer, role, self._temperature))
        if distance <= self._tolerance:
            return None
        # Log-probs before the temperature are the most common mistake of a server that was started by hand.
        if decided(self._distance(*answer, role, 1.0)) <= self._tolerance:
            message = f"{server.url} gives log-probs that are not of temperature {self._temperature:g}"
            fix = "start it by launch/vllm_server.sh, or with --logprobs-mode processed_logprobs"
            return server_refused("mismatch", message, fix)
        return other_model(
            server,
            f"other weights than the {role} of {self._backbone.name}: its log-probs differ by {distance:.3g} on average"
            " (another model or dtype, or weights that an earlier run left there)",
        )

    def check(self, server: Server, model: str, role: str, known: Response | None = None) -> None:
        """Raise `InputError` if the server's model is not the role as it is now, and `ServerFault`.

        known: what a server that has the role has answered. Where ZeRO-3 has split the base no rank can compute it by
        itself, so this is what the answer is compared with there, as far as the tokens are the same.
        """
        answer = self.ask(server, model)
        if not is_sharded(self._backbone.model):
            refusal = self.refusal(server, answer, role)
        else:
            refusal = None if known is None or self._alike(answer, known) else other_model(server, "other weights")
        if refusal is not None:
            raise refusal

    def holds(self, server: Server, role: str) -> bool:
        """Whether the server still samples from the role as it is now. Raises `ServerFault`."""
        return self.refusal(server, self.ask(server, server.model), role) is None

    def _alike(self, answer: Response, known: Response) -> bool:
        pairs = zip(*answer, *known, strict=False)
        shared = list(
            takewhile(lambda pair: pair[0] == pair[2], pairs)
        )  # what follows another token is of another text
        return bool(shared) and sum(abs(p[1] - p[3]) for p in shared) / len(shared) <= self._tolerance

    @torch.no_grad()
    def _distance(self, ids: list[int], found: list[float], role: str, temperature: float) -> float:
        if max(ids) > max(self._prompt) or len(ids) != len(found):
            return float("inf")
        sequences = Sequences.pack([self._prompt], [ids], self._backbone.pad_token_id)
        with self._backbone.role(role):
            expected_N = self._backbone.response_logprobs(sequences, temperature)[0]
        return float((expected_N.float().cpu() - torch.tensor(found)).abs().mean())
