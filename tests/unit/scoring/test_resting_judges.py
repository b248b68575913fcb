"""A local judge has its GPU only while it is asked: where it goes and when, with the moves noted instead of made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from pe_rlhf.model.loading import load_causal_lm
from pe_rlhf.model.memory_plan import GIB
from pe_rlhf.scoring import vllm_chat
from pe_rlhf.scoring.hf_chat import HFChat
from pe_rlhf.scoring.vllm_chat import VLLMChat
from reward.asking import Pair, judge_pairs
from reward.errors import JudgeError
from reward.judges.guest import Guest
from reward.judges.jury import Jury
from reward.judges.length import length_judge
from reward.judges.llm import LLMJudge
from reward.judges.reward_model import reward_model_judge
from reward.judges.templates import JudgePrompt
from reward.records import Message
from tests.stage_support import byte_model

PAIRS = [Pair("Say something", "ab" * n, "x" * (5 - n), position=n) for n in range(1, 4)]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CHAT: list[Message] = [{"role": "user", "content": "A or B?"}]


class Moving(nn.Linear):
    """A model that notes where it is sent, and stays."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list[str] = []

    def to(self, device: Any) -> Moving:  # type: ignore[override]
        self.places.append(str(device))
        return self


def chat_model(folder: Path, device: torch.device) -> tuple[HFChat, list[str]]:
    """A chat model, and where it was sent to."""
    path = byte_model(folder, pad_is_eos=True, initializer_range=0.4, max_position_embeddings=2048)
    model, tokenizer = load_causal_lm(str(path), dtype="float32", device=CPU, attention="sdpa", trust_remote_code=False)
    places: list[str] = []
    model.to = lambda device: places.append(str(device))  # type: ignore[method-assign,assignment]
    return HFChat(model, tokenizer, "x", device=device), places


def test_a_guest_comes_and_goes() -> None:
    here, there = Moving(), Moving()
    for model, device in ((here, CPU), (there, GPU)):
        guest = Guest(model, device)
        guest.come()
        guest.rest()
    assert (here.places, there.places) == (["cpu"], ["cuda", "cpu"])


def test_a_chat_model_is_on_its_gpu_while_pairs_are_judged(tmp_path: Path) -> None:
    chat, places = chat_model(tmp_path, GPU)
    judge = LLMJudge(chat, JudgePrompt("general"), min_label_mass=0)
    judge_pairs(judge, PAIRS, tmp_path / "verdicts.jsonl")
    assert places[0] == "cuda"
    assert (places[-1], places.count("cpu")) == ("cpu", 1)
    judge_pairs(judge, PAIRS, tmp_path / "verdicts.jsonl")  # all answered: it is not fetched for nothing
    assert places.count("cuda") == 1


def test_it_leaves_where_judging_fails(tmp_path: Path) -> None:
    chat, places = chat_model(tmp_path, GPU)
    judge = LLMJudge(chat, JudgePrompt("general"), verdict="probabilities", min_label_mass=1)
    with pytest.raises(JudgeError):
        judge_pairs(judge, PAIRS, tmp_path / "verdicts.jsonl")
    assert places[-1] == "cpu"


def test_members_of_a_jury_rest(tmp_path: Path) -> None:
    model = Moving()
    guest = Guest(model, GPU)
    by_reward = reward_model_judge(lambda prompts, responses: [1.0] * len(prompts), "x", guest.rest)
    judge_pairs(Jury([length_judge(), by_reward]), PAIRS, tmp_path / "verdicts.jsonl")
    assert model.places == ["cpu"]


class Engine:
    """Instead of a vLLM process: notes what it is asked, and gives a token's log-probs."""

    def __init__(self, *_: Any) -> None:
        self.asked: list[str] = []
        self.settings: dict[str, Any] = {}
        engines.append(self)

    def send(self, method: str, **arguments: Any) -> None:
        self.asked.append(method)
        if method == "start":
            self.settings = arguments["settings"]
        self._answer = [dict.fromkeys(arguments.get("ids", ()), -1.0) for _ in arguments.get("prompts", ())]

    def answer(self, timeout: float) -> Any:
        return self._answer

    def close(self) -> None:
        pass


engines: list[Engine] = []


def test_an_engine_sleeps_until_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = byte_model(tmp_path, pad_is_eos=True, initializer_range=0.4, max_position_embeddings=2048)
    monkeypatch.setattr(vllm_chat, "EngineProcess", Engine)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    chat = VLLMChat(str(path), "bfloat16", GPU, "x")
    chat.label_logprobs([CHAT], ("A", "B"))
    chat.label_logprobs([CHAT], ("A", "B"))
    chat.rest()
    chat.rest()
    asked, settings = engines[-1].asked, engines[-1].settings
    assert asked == ["start", "sleep", "wake_up", *["first_token_logprobs"] * 2, "sleep"]
    # The cache of 64 questions of 1,024 tokens, not half of the card.
    config = AutoConfig.from_pretrained(path)
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert settings["kv_cache_memory_bytes"] == (64 * 1024 + 32) * width * 2
    assert settings["gpu_memory_utilization"] == pytest.approx(3 / 80, abs=0.005)
    assert settings["enable_sleep_mode"]
