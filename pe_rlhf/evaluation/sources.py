"""Where responses come from: a run of ours, an adapter, a model, a server, or a file of finished outputs."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel

from pe_rlhf.config import SamplingConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.saved_roles import (
    RoleFolder,
    codec_of,
    find_role,
    is_endpoint,
    load_role_backbone,
)
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError
from reward.records import Prompt, parse_prompt
from reward.verdicts import read_rows

PROMPT_COLUMNS, RESPONSE_COLUMNS = ("prompt", "instruction"), ("response", "output")


class Policy(Protocol):
    """Answers prompts."""

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        """Responses to prompts[start:], one after the other. The same start gives the same responses."""
        ...


class LocalPolicy:
    """A role of a backbone, or a model that is its own anchor."""

    def __init__(self, backbone: Backbone, role: str, codec: TextCodec, sampling: SamplingConfig, seed: int) -> None:
        self._backbone, self._role, self._codec = backbone, role, codec
        self._sampling, self._seed = sampling, seed

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        """In batches; what is drawn for a response depends on the seed and its number alone."""
        rollout = HFRollout(self._backbone, self._role, self._sampling)
        for first in range(start, len(prompts), self._sampling.batch_size):
            batch = prompts[first : first + self._sampling.batch_size]
            ids = [self._ids(prompt, first + i) for i, prompt in enumerate(batch)]
            rows = range(first, first + len(batch))
            sampled = rollout.generate(ids, derive_seed(self._seed, "evaluate", self._role), rows)
            yield from (self._codec.decode(response) for response in sampled.responses)

    def _ids(self, prompt: Prompt, number: int) -> list[int]:
        ids = self._codec.encode_prompt(prompt)
        limit = (self._backbone.max_positions or 10**9) - self._sampling.max_new_tokens
        if not 0 < len(ids) <= limit:
            raise InputError(f"prompt {number} has {len(ids)} tokens; the model takes 1 to {limit} and its response")
        return ids


class EndpointPolicy:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, url: str, sampling: SamplingConfig, seed: int, server: dict[str, Any]) -> None:
        from reward.judges.endpoint import Endpoint
        from reward.judges.judge_registry import JudgeSettings

        base_url, _, model = url.partition("#")
        if not model:
            raise InputError(f"{url}: name the server's model after a #: {url}#MODEL")
        settings = JudgeSettings("llm", model, base_url=base_url, **server)
        self._endpoint, self._sampling, self._seed = Endpoint(model, settings), sampling, seed

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        def ask(number: int) -> str:
            prompt = prompts[number]
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            options = (self._sampling.max_new_tokens, self._sampling.temperature, derive_seed(self._seed, number))
            (said,) = self._endpoint.generate([chat], options[0], options[1], options[2] % 2**31)
            if said.error:
                raise InputError(f"prompt {number}: {said.error}")
            return said.text

        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            waiting: deque[Future[str]] = deque()
            try:
                for number in range(start, len(prompts)):
                    waiting.append(pool.submit(ask, number))
                    # Not far ahead of the answer that is next: what is not yielded would be lost with this process.
                    if len(waiting) > 2 * self._endpoint.concurrency:
                        yield waiting.popleft().result()
                yield from (answer.result() for answer in waiting)
            except BaseException:
                self._endpoint.stop()
                pool.shutdown(cancel_futures=True)
                raise


def load_anchor(found: RoleFolder, sampling: SamplingConfig, seed: int, *, dtype: str, device: str) -> Policy:
    """What a run's policy started from, asked as the policy is."""
    backbone, codec = found.load_base(dtype=dtype, device=device)
    return LocalPolicy(backbone, ANCHOR, codec, sampling, seed)


def load_policy(
    name: str, sampling: SamplingConfig, seed: int, *, dtype: str, device: str, server: dict[str, Any]
) -> Policy:
    """What answers under that name: `http(s)://…#MODEL`, a run, an adapter, or a model.

    `server` are the fields of `JudgeSettings` about a server, for the first of these.

    Raises `InputError` where there is nothing of that name.
    """
    if is_endpoint(name):
        return EndpointPolicy(name, sampling, seed, server)
    if (found := find_policy(name)) is not None:
        backbone, codec = load_role_backbone(found, "policy", dtype=dtype, device=device)
        return LocalPolicy(backbone, "policy", codec, sampling, seed)
    if (base := base_of_adapter(name)) is not None:
        backbone = load_merged(name, base, dtype=dtype, device=device)
    else:
        backbone = load_backbone(name, dtype=dtype, device=device)
    return LocalPolicy(backbone, ANCHOR, codec_of(backbone, "auto"), sampling, seed)


def load_merged(adapter: str, base: str, *, dtype: str, device: str) -> Backbone:
    """A model with a PEFT adapter of any make merged into it."""
    backbone = load_backbone(base, dtype=dtype, device=device)
    merged = PeftModel.from_pretrained(backbone.model, adapter).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    result = Backbone(merged, backbone.tokenizer, adapter)
    result.eos_token_ids = backbone.eos_token_ids  # it has emptied the generation config, which may name more of them
    return result


def find_policy(name: str) -> RoleFolder | None:
    """The policy of a run of ours; None for a server, a file of outputs, an adapter of others, or a model."""
    return None if is_endpoint(name) or Path(name).is_file() else find_role(name, "ppo")


def base_of_adapter(name: str) -> str | None:
    """The base model that a PEFT adapter names, None for what is no adapter."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def read_outputs(path: Path) -> list[tuple[Prompt, str]]:
    """Prompts and responses from a json, jsonl or csv file; `instruction` and `output` are AlpacaEval's names for them.

    Raises `InputError` naming file and line.
    """
    found: list[tuple[Prompt, str]] = []
    for line, row in read_rows(path):
        prompt = next((row[column] for column in PROMPT_COLUMNS if column in row), None)
        response = next((row[column] for column in RESPONSE_COLUMNS if column in row), None)
        if not isinstance(response, str):
            raise InputError(f"{path} line {line}: there is no text under response or output")
        try:
            found.append((parse_prompt(prompt), response))
        except InputError as error:
            raise InputError(f"{path} line {line}: {error}") from error
    if not found:
        raise InputError(f"{path} has no outputs")
    return found
