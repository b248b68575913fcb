"""A vLLM engine in a process beside this one as a judge's chat model."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from pe_rlhf.model.loading import DTYPES
from pe_rlhf.model.memory_plan import SLACK
from pe_rlhf.model.names import resolve_model
from pe_rlhf.model.whole import check_config, loading
from pe_rlhf.rollout.vllm.embedded import EngineProcess, engine_environment
from pe_rlhf.rollout.vllm.engine_arguments import BLOCK, cache_bytes, share_of_card
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import derive_seed
from reward.judges.chat_tokens import LEAST_ROOM, ChatTokens
from reward.judges.llm import Completion
from reward.records import Message

START_TIMEOUT, TIMEOUT = 1800.0, 1800.0  # seconds without progress
USUAL_TOKENS = 1024  # of a question, for the size of the cache; of longer questions fewer run at a time
LONGEST = 8192  # tokens of a question and its answer; a model may read less
BASE = "anchor"  # the tag of the weights that an engine starts with


class VLLMChat:
    """Chat with a model that vLLM loads; the engine starts here and ends with this object or this process.

    Args:
        model: a hub id, a directory or `pip:NAME`.
        identity: of the weights; verdicts of another identity are not reused.
        memory_share: the most of a GPU's memory that weights and cache take.
    """

    concurrency = 1

    def __init__(
        self,
        model: str,
        dtype: str,
        device: torch.device,
        identity: str,
        batch_size: int = 64,
        memory_share: float = 0.5,
        template_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        path = resolve_model(model)
        with loading(model, "judge.target"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_config(config, model, "judge.target")
        self.batch_size = batch_size
        text = config.get_text_config()
        longest = min(LONGEST, getattr(text, "max_position_embeddings", None) or LONGEST)
        self._tokens = ChatTokens(tokenizer, identity, longest, text.vocab_size, template_kwargs)
        self.identity = f"vllm:{identity} {self._tokens.day}".rstrip()
        settings: dict[str, Any] = {
            "model": path,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "skip_tokenizer_init": True,
            "generation_config": "auto",  # for the ids that end an answer; the requests set the sampling
            "max_model_len": longest,
            "max_num_seqs": batch_size,
            "enforce_eager": device.type == "cpu",
            "disable_log_stats": True,
        }
        usual = min(USUAL_TOKENS, longest)
        lengths = [usual] * max(batch_size, math.ceil(longest / usual))
        wanted, least = (cache_bytes(config, DTYPES[dtype], rows) for rows in (lengths, [longest]))
        # On a GPU it gives its memory back between questions, by vLLM's sleep mode.
        self._sleeps, self._asleep = device.type == "cuda", False
        if self._sleeps:
            torch.cuda.empty_cache()  # vLLM asks the card what is free, and torch keeps what it has freed
            card = torch.cuda.mem_get_info(device)
            settings |= {"enable_sleep_mode": True} | share_of_card(
                _weights(config, trust_remote_code) * DTYPES[dtype].itemsize,
                wanted,
                least,
                card,
                max(0.0, SLACK - memory_share) * card[1],
                "judge.gpu_memory_share",
                "raise judge.gpu_memory_share, or use a server (judge.base_url) or a smaller judge",
            )
        else:
            settings |= {"kv_cache_memory_bytes": wanted, "block_size": BLOCK}
        folder = Path(tempfile.mkdtemp(prefix="pe-rlhf-judge-"))
        log = folder.with_name(f"{folder.name}.log")
        self._engine = EngineProcess(log, folder, engine_environment(device))
        weakref.finalize(self, _end, self._engine, folder, log, os.getpid())
        say(f"waiting for the judge's vLLM to start; its output goes to {log}")
        self._engine.send("start", settings=settings)
        self._engine.answer(START_TIMEOUT)
        self.rest()

    def rest(self) -> None:
        """Leave the GPU to others until the next question."""
        if self._sleeps and not self._asleep:
            self._engine.send("sleep")
            self._engine.answer(TIMEOUT)
            self._asleep = True

    def _wake_up(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()
            self._engine.send("wake_up")
            self._engine.answer(TIMEOUT)
            self._asleep = False

    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        """One forward pass per chat. The text is empty: the most likely token is not looked at."""
        self._wake_up()
        rows, answers = self._tokens.encode(chats, room=1)
        ids = self._tokens.label_ids(labels)
        every = sorted({i for of_label in ids.values() for i in of_label})
        self._engine.send("first_token_logprobs", tag=BASE, prompts=list(rows.values()), ids=every)
        for i, table in zip(rows, self._engine.answer(TIMEOUT), strict=True):
            of_label = {
                label: torch.tensor([table[token] for token in tokens], dtype=torch.float64).logsumexp(dim=0).item()
                for label, tokens in ids.items()
            }
            answers[i] = Completion("", of_label, cut=True)
        return [answers[i] for i in range(len(chats))]

    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """Greedy at temperature 0, else sampled; the same seed gives the same answers to the same chats."""
        self._wake_up()
        rows, answers = self._tokens.encode(chats, room=min(max_tokens, LEAST_ROOM))
        sampling = {"temperature": temperature, "max_tokens": max_tokens, "stop_token_ids": self._ends()}
        seeds = [derive_seed(seed, "judge", *ids) for ids in rows.values()]
        self._engine.send("generate", tag=BASE, prompts=list(rows.values()), seeds=seeds, sampling=sampling)
        for (i, asked), (ids, _) in zip(rows.items(), self._engine.answer(TIMEOUT), strict=True):
            text = str(self._tokens.tokenizer.decode(ids, skip_special_tokens=True))
            # vLLM ends an answer at the model's longest sequence, too.
            answers[i] = Completion(text, cut=len(ids) >= min(max_tokens, self._tokens.longest - len(asked)))
        return [answers[i] for i in range(len(chats))]

    def _ends(self) -> list[int]:
        end = self._tokens.tokenizer.eos_token_id
        return [end] if isinstance(end, int) else []


def _weights(config: PretrainedConfig, trust_remote_code: bool) -> int:
    """Parameters of a model of that config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters())


def _end(engine: EngineProcess, folder: Path, log: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        engine.close()
        folder.rmdir()
        log.unlink(missing_ok=True)
