"""Where responses come from: a run of ours, an adapter, a model, a server, or a file of finished outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.evaluation.prompting import Prompting
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.model.whole import load_adapter_whole
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.layout import RoleFiles
from pe_rlhf.runs.saved_roles import (
    SavedRole,
    codec_of,
    is_endpoint,
    role_behind,
)
from pe_rlhf.system.files import read_json
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError
from reward.judges.templates import as_messages
from reward.records import Prompt, parse_prompt
from reward.row_files import in_line, read_rows

PROMPT_COLUMNS, RESPONSE_COLUMNS = ("prompt", "instruction"), ("response", "output")


class ResponseSource(Protocol):
    """Answers prompts."""

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        """Responses to prompts[start:], one after the other. The same start gives the same responses."""
        ...


class LocalSource:
    """A role of a backbone; a model without an adapter is the role `anchor`."""

    def __init__(self, backbone: Backbone, role: str, codec: TextCodec, settings: EvaluationSettings) -> None:
        self._backbone, self._role, self.codec = backbone, role, codec
        self._sampling, self._seed = settings.sampler, settings.seed

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        """In batches; what is drawn for a response depends on the seed and its number only."""
        rollout = HFRollout(self._backbone, self._role, self._sampling)
        for first in range(start, len(prompts), self._sampling.batch_size):
            batch = prompts[first : first + self._sampling.batch_size]
            ids = [self._ids(prompt, first + i) for i, prompt in enumerate(batch)]
            rows = range(first, first + len(batch))
            sampled = rollout.generate(ids, derive_seed(self._seed, "evaluate", self._role), rows)
            yield from self.codec.texts(sampled)

    def _ids(self, prompt: Prompt, number: int) -> list[int]:
        ids = self.codec.encode_prompt(prompt)
        limit = (self._backbone.max_positions or 10**9) - self._sampling.max_new_tokens
        if not 0 < len(ids) <= limit:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens; with its response the model takes prompts of 1 to {limit}",
                kind="too_long" if ids else "empty",
                key="sampling.max_new_tokens",
                row=number + 1,
            )
        return ids


class ServerSource:
    """A model behind an OpenAI-compatible server, named `http(s)://HOST/v1#MODEL`."""

    def __init__(self, url: str, settings: EvaluationSettings) -> None:
        from reward.judges.endpoint import Endpoint  # the client library takes a second to import

        base_url, _, model = url.partition("#")
        if not model:
            raise InputError(
                f"{url} names no model of the server", kind="missing", key="server", fix=f"use {url}#MODEL"
            )
        if settings.sampling.stop:
            raise InputError(
                "sampling.stop: what a server leaves out after a stop string is not known here",
                kind="conflict",
                key="sampling.stop",
                file=url,
                fix="evaluate the model itself, or leave it out",
            )
        self._endpoint = Endpoint(model, base_url, settings.server, keep=frozenset({"temperature", "max_tokens"}))
        self._sampling, self._seed = settings.sampling, settings.seed

    def check_server(self) -> None:
        """Raise `InputError` where the server refuses the key, `JudgeError` where nothing answers after all tries."""
        self._endpoint.check_server()

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        def ask(number: int) -> str:
            seed = derive_seed(self._seed, number) % 2**31
            chats = [as_messages(prompts[number])]
            (said,) = self._endpoint.generate(chats, self._sampling.max_new_tokens, self._sampling.temperature, seed)
            if said.error:
                raise InputError(f"prompt {number}: {said.error}", kind="too_long", row=number + 1)
            if said.cut and not said.text:  # the limit went into thoughts that the server does not show
                raise InputError(
                    f"prompt {number}: the answer is empty and cut (finish_reason: length)",
                    kind="too_long",
                    key="sampling.max_new_tokens",
                    row=number + 1,
                    fix="raise sampling.max_new_tokens",
                )
            return said.text

        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            waiting: deque[Future[str]] = deque()
            try:
                for number in range(start, len(prompts)):
                    waiting.append(pool.submit(ask, number))
                    # Not far ahead of the next answer: answers that were not yielded are lost if this process ends.
                    if len(waiting) > 2 * self._endpoint.concurrency:
                        yield waiting.popleft().result()
                yield from (answer.result() for answer in waiting)
            except BaseException:
                self._endpoint.stop()
                pool.shutdown(cancel_futures=True)
                raise


def load_anchor(found: SavedRole, settings: EvaluationSettings, prompting: Prompting) -> ResponseSource:
    """The anchor of a run's policy, in the dtype of the run."""
    backbone, _ = found.load_base(dtype=settings.dtype, device=settings.device)
    return LocalSource(backbone, ANCHOR, prompted_codec(backbone, prompting), settings)


def load_source(name: str, settings: EvaluationSettings, prompting: Prompting) -> ResponseSource:
    """The source of that name: `http(s)://…#MODEL`, a run, an adapter, or a model, prompted in that way.

    Raises `InputError` where there is nothing of that name.
    """
    if is_endpoint(name):
        return ServerSource(name, settings)
    dtype, device = settings.dtype, settings.device
    if (found := find_policy(name)) is not None:
        backbone, _ = found.load("policy", dtype=dtype, device=device)
        return LocalSource(backbone, "policy", prompted_codec(backbone, prompting), settings)
    if (base := base_of_adapter(name)) is not None:
        backbone = load_merged(name, base, dtype=dtype, device=device)
    else:
        backbone = load_backbone(name, dtype=dtype, device=device)
    return LocalSource(backbone, ANCHOR, prompted_codec(backbone, prompting), settings)


def prompted_codec(backbone: Backbone, prompting: Prompting) -> TextCodec:
    """How texts and tokens of a backbone belong together, prompted in that way."""
    backbone.tokenizer.chat_template = prompting.template
    return codec_of(backbone, "auto", prompting.arguments, prompting.date)


def load_merged(adapter: str, base: str, *, dtype: str, device: str) -> Backbone:
    """A model with a PEFT adapter of any make merged into it."""
    backbone = load_backbone(base, dtype=dtype, device=device)
    merged = load_adapter_whole(backbone.model, adapter).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    result = Backbone(merged, backbone.tokenizer, adapter)
    # The first backbone has emptied the generation config, which may name more ids that end a response.
    result.eos_token_ids = backbone.eos_token_ids
    return result


def find_policy(name: str) -> SavedRole | None:
    """The policy of a run of ours; None for a server, a file of outputs, another adapter, or a model."""
    return role_behind(name, "policy")


def base_of_adapter(name: str) -> str | None:
    """The base model that a PEFT adapter names; None if `name` is not an adapter."""
    path = RoleFiles(Path(name)).adapter_config
    return read_json(path)["base_model_name_or_path"] if path.is_file() else None


def read_outputs(path: Path) -> list[tuple[Prompt, str]]:
    """Prompts and responses from a json, jsonl or csv file; AlpacaEval calls them `instruction` and `output`.

    Raises `InputError` naming file and line.
    """
    found: list[tuple[Prompt, str]] = []
    for line, row in read_rows(path):
        prompt = next((row[column] for column in PROMPT_COLUMNS if column in row), None)
        response = next((row[column] for column in RESPONSE_COLUMNS if column in row), None)
        if not isinstance(response, str):
            raise InputError(
                f"{path} line {line}: there is no text under response or output",
                kind="missing",
                key="response",
                file=path,
                row=line,
            )
        try:
            found.append((parse_prompt(prompt), response))
        except InputError as error:
            raise in_line(path, line, error) from error
    if not found:
        raise InputError(f"{path} has no outputs", kind="empty", file=path)
    return found
