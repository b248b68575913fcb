"""Where responses come from: a run of ours, an adapter, a model, a server, or a file of finished outputs."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel

from pe_rlhf.backbone import Backbone, load_backbone
from pe_rlhf.base_model import base_of_role, load_base
from pe_rlhf.checkpoint import load_role
from pe_rlhf.config import Recipe, SamplingConfig
from pe_rlhf.recipes import load_recipe
from pe_rlhf.roles import ANCHOR
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.seeding import derive_seed
from pe_rlhf.text import TextCodec
from reward.errors import InputError
from reward.records import Prompt, parse_prompt
from reward.verdicts import read_rows

PROMPT_COLUMNS, RESPONSE_COLUMNS = ("prompt", "instruction"), ("response", "output")
ROLES = {"ppo": "policy", "reward": "reward"}  # what a stage's adapter plays


class Policy(Protocol):
    """Answers prompts."""

    def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
        """Responses to prompts[start:], one after the other. The same start gives the same responses."""
        ...


@dataclass(frozen=True)
class RoleFolder:
    """A role that a stage wrote: its folder, the base model's name, and the recipe of its run where that is there."""

    folder: Path
    base: str
    recipe: Recipe | None

    def load_base(self, *, dtype: str, device: str) -> tuple[Backbone, TextCodec]:
        """The run's anchor, loaded and prompted as the recipe says; in `dtype` where there is no recipe."""
        if self.recipe is None:
            backbone = load_backbone(self.base, dtype=dtype, device=device)
            return backbone, _codec(backbone, "auto")
        backbone = load_base(self.recipe, self.base, device)
        return backbone, _codec(backbone, self.recipe.chat_template)


def find_role(name: str, stage: str) -> RoleFolder | None:
    """The adapter of a stage from a run's, a stage's or the adapter's own directory; None where it is none of these."""
    path = Path(name).expanduser()
    for folder in (path / stage / "adapter", path / "adapter", path):
        if (folder / "role.json").is_file():
            break
    else:
        if (path / "recipe.yaml").is_file():
            raise InputError(f"{path} is a run without a finished {stage} stage")
        return None
    recipe = next((f for p in (folder.parent, folder.parent.parent) if (f := p / "recipe.yaml").is_file()), None)
    try:
        description = json.loads((folder / "role.json").read_text(encoding="utf-8"))
        base, role = description["base_model"], str(description["role"])
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder / 'role.json'} is damaged: {error}") from error
    if not role.startswith(ROLES[stage]):
        raise InputError(f"{folder} holds a {role}, not a {ROLES[stage]}")
    base = base_of_role(folder, base)
    return RoleFolder(folder, base, None if recipe is None else load_recipe(recipe))


def load_role_backbone(found: RoleFolder, role: str, *, dtype: str, device: str) -> tuple[Backbone, TextCodec]:
    """The base model with that role on it, and the codec of the run; `dtype` as of `RoleFolder.load_base`."""
    backbone, codec = found.load_base(dtype=dtype, device=device)
    load_role(backbone, role, found.folder)
    return backbone, codec


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
        from reward.judges.registry import JudgeSettings

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
    return LocalPolicy(backbone, ANCHOR, _codec(backbone, "auto"), sampling, seed)


def load_merged(adapter: str, base: str, *, dtype: str, device: str) -> Backbone:
    """A model with a PEFT adapter of any make merged into it."""
    backbone = load_backbone(base, dtype=dtype, device=device)
    merged = PeftModel.from_pretrained(backbone.model, adapter).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    result = Backbone(merged, backbone.tokenizer, adapter)
    result.eos_token_ids = backbone.eos_token_ids  # it has emptied the generation config, which may name more of them
    return result


def weights_of(name: str, stage: str) -> str:
    """What tells the weights under a directory's name from others that were there before; "" for other names.

    Adapters by their bytes, whole models, which take long to read, by their files' sizes and times.
    """
    found = None if is_endpoint(name) else find_role(name, stage)
    return files_of(str(found.folder) if found else name, small=found is not None)


def files_of(name: str, *, small: bool = False) -> str:
    """As `weights_of`, of a directory that is known to hold the weights itself; `small`: go by the bytes."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ""
    digest, small = hashlib.sha256(), small or (folder / "adapter_config.json").is_file()
    for file in sorted(folder.glob("*.safetensors")):
        about = file.stat()
        digest.update(file.name.encode())
        digest.update(file.read_bytes() if small else f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


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


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


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


def _codec(backbone: Backbone, chat_template: str) -> TextCodec:
    eos = backbone.eos_token_ids[0] if backbone.eos_token_ids else None
    return TextCodec(backbone.tokenizer, chat_template, eos)
