"""The judges `llm` and `rating`: a chat model behind a server, in a vLLM engine, or in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pe_rlhf.data.codec import template_clock
from pe_rlhf.model.loading import check_known, find_device, load_causal_lm, longest_sequence, use_sound_attention
from pe_rlhf.model.names import resolve_model
from pe_rlhf.model.whole import loading
from pe_rlhf.rollout.make import check_vllm
from pe_rlhf.runs.saved_roles import files_of
from reward.judges import Comparison, Judge
from reward.judges.chat_tokens import ChatTokens
from reward.judges.judge_settings import JudgeSettings, api_key
from reward.judges.llm import ChatBackend, ChatJudge, LLMJudge
from reward.judges.templates import JudgePrompt
from reward.records import Prompt

NAME_IT = "name the model: KIND:MODEL"


class ChatKind:
    """Makes judges that are chat models, of one class and with prompts of one class."""

    def __init__(self, judge: type[ChatJudge] = LLMJudge, prompt: type[JudgePrompt] = JudgePrompt) -> None:
        self._judge, self._prompt = judge, prompt

    def __call__(self, settings: JudgeSettings) -> Judge:
        prompt = self._prompt(settings.template)  # first: a model takes minutes to load
        return self._judge(
            _backend(settings),
            prompt,
            reasoning=settings.reasoning,
            reasoning_tokens=settings.reasoning_tokens,
            verdict=settings.verdict,
            attempts=settings.answer_attempts,
            answer_tokens=settings.answer_tokens,
            min_label_mass=settings.min_label_mass,
        )

    def check(self, settings: JudgeSettings, run_dir: Path | None) -> None:
        target = settings.needed_target(NAME_IT)
        if settings.base_url is None:
            check_known(target, "judge.target", settings.trust_remote_code)
        else:
            api_key(settings.base_url, settings.api_key_env)
        self._prompt(settings.template)
        check_vllm(settings.engine == "vllm")

    def prompt_check(self, settings: JudgeSettings) -> Callable[[Prompt], None]:
        """By the judge's own template, and by the chat template of a local model."""
        question, tokens = self._prompt(settings.template), _local_tokens(settings)

        def check(prompt: Prompt) -> None:
            chat = question.chat(Comparison(prompt, "a", "b"), reasoning=settings.reasoning)
            if tokens is not None:
                tokens.text_of(chat)

        return check


def _local_tokens(settings: JudgeSettings) -> ChatTokens | None:
    """How a local model is asked, without its weights; None for a model behind a server."""
    if settings.base_url:
        return None
    target = settings.needed_target(NAME_IT)
    with loading(target, "judge.target"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(target), trust_remote_code=settings.trust_remote_code)
    return ChatTokens(tokenizer, target, 10**9, len(tokenizer), _template_arguments(settings))


def _template_arguments(settings: JudgeSettings) -> dict[str, Any]:
    return {"strftime_now": template_clock(), **settings.chat_template_kwargs}


def _backend(settings: JudgeSettings) -> ChatBackend:
    target = settings.needed_target(NAME_IT)
    if settings.base_url:
        from reward.judges.endpoint import Endpoint  # the client library takes a second to import

        return Endpoint(target, settings.base_url, settings, settings.top_logprobs, settings.chat_template_kwargs)
    device = find_device(settings.device)
    kwargs = settings.chat_template_kwargs
    identity = f"{target} {settings.dtype} {files_of(target)}{json.dumps(kwargs) if kwargs else ''}".rstrip()
    kwargs = _template_arguments(settings)
    if settings.engine == "vllm":
        from pe_rlhf.scoring.vllm_chat import VLLMChat

        share, trust = settings.gpu_memory_share, settings.trust_remote_code
        return VLLMChat(target, settings.dtype, device, identity, 64, share, kwargs, trust)
    from pe_rlhf.scoring.hf_chat import HFChat

    model, tokenizer = load_causal_lm(
        target,
        dtype=settings.dtype,
        device=torch.device("cpu"),  # it comes to its device when it is asked
        attention="sdpa",
        trust_remote_code=settings.trust_remote_code,
        key="judge.target",
    )
    if device.type == "cuda":
        use_sound_attention()
    longest = longest_sequence(model.config)
    return HFChat(model, tokenizer, identity, template_kwargs=kwargs, device=device, longest=longest)
