"""What a vLLM server is asked before a run starts, when no weights are loaded: is it there, and can it be the run's?

Another model shows by its vocabulary and tokenizer. Other weights show when the base is loaded: see `probe.py`.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import PurePath

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pe_rlhf.config import SamplerConfig, SamplingConfig
from pe_rlhf.rollout.vllm.http import Server, ServerFault, server_error
from pe_rlhf.rollout.vllm.probe import asked, other_model
from pe_rlhf.rollout.vllm.requests import NEUTRAL
from pe_rlhf.system.progress import say

TEXT = "What is 37 + 4? def add(first, second): return first + second  # Übung, 東京"
SHARED = 0.5  # least share of ids that both tokenizers have; spaces at the start may be another id


def look_at_servers(
    sampling: SamplerConfig,
    model: str,
    known: tuple[PreTrainedConfig, PreTrainedTokenizerBase] | None,
    *,
    wait: bool,
) -> None:
    """Ask each server of a section whether it can be this run's.

    Args:
        model: its name or folder.
        known: its config and tokenizer, where they are at hand.
        wait: whether a server that is not there may still come, within `start_timeout`.

    Raises `TrainingError` for a server that is not there, `InputError` for one that wants another key, is no vLLM
    server, has no room for a response, or serves another model.
    """
    for url in sampling.urls:
        server = Server(url, sampling.timeout)
        with closing(server):
            server.wait(sampling.start_timeout if wait else 0)
            if isinstance(sampling, SamplingConfig):
                server.check_length(1 + sampling.max_new_tokens)
            if PurePath(server.root).name.lower() != PurePath(model).name.lower():
                say(f"warning: {server.url} serves {server.root}, the run's model is {model}: are they the same?")
            if known is not None:
                try:
                    _compare(server, model, *known)
                except ServerFault as fault:
                    raise server_error(f"{server.url}: {fault}") from fault


def _compare(server: Server, model: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` where the server's tokenizer or vocabulary is another one."""
    own, theirs = tokenizer(TEXT, add_special_tokens=False).input_ids, server.tokens_of(TEXT)
    if theirs is not None and len(set(own) & set(theirs)) < SHARED * len(set(own)):
        raise other_model(server, f"{server.root}, whose tokenizer is not that of {model}")
    size: int | None = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is not None:
        asked(
            server, [size - 1], {**NEUTRAL, "temperature": 1.0, "max_tokens": 1, "ignore_eos": True}, server.base, model
        )
