"""A transformers model in this process as the judge's chat model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from pe_rlhf.rollout.reading import FORCED_BR, PROMPTS, Reading, find_reading
from reward.judges.chat_tokens import LEAST_ROOM, ChatTokens
from reward.judges.guest import Guest
from reward.judges.llm import Completion
from reward.records import Message


class HFChat:
    """Chat with a loaded model. The probability of a label is summed over all tokens that read as it.

    device: where the model computes; between `rest` and the next question it is on the CPU. longest: tokens of a prompt
    and its answer; default: no limit.
    """

    concurrency = 1

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: str,
        batch_size: int = 8,
        template_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        longest: int | None = None,
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._guest = Guest(model, device or model.device)
        self.batch_size = batch_size
        vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        self._tokens = ChatTokens(tokenizer, identity, longest or 10**9, vocabulary, template_kwargs)
        self.identity = f"hf:{identity} {self._tokens.day}".rstrip()
        # What the checkpoint says of sampling is for answers in text only.
        self._sampling, model.generation_config = model.generation_config, GenerationConfig()
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
        self._found: Reading | None = None

    @torch.no_grad()
    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        """One forward pass per batch; the text is the most likely first token."""
        self._guest.come()
        rows, answers = self._tokens.encode(chats, room=1)
        ids = self._tokens.label_ids(labels)
        first = GenerationConfig(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        for batch in self._batches(rows):
            output: Any = self._run([rows[i] for i in batch], self._reading, first)
            logprobs_BV = torch.log_softmax(output.logits[0].float(), dim=-1)
            tops = self._tokenizer.batch_decode(logprobs_BV.argmax(dim=-1)[:, None])
            for i, logprobs_V, top in zip(batch, logprobs_BV, tops, strict=True):
                of_label = {label: logprobs_V[own].logsumexp(dim=0).item() for label, own in ids.items()}
                answers[i] = Completion(top, of_label, cut=True)
        return [answers[i] for i in range(len(chats))]

    @torch.no_grad()
    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """Greedy at temperature 0, else sampled; the same seed gives the same answers to the same chats."""
        self._guest.come()
        rows, answers = self._tokens.encode(chats, room=min(max_tokens, LEAST_ROOM))
        sampling: dict[str, Any] = {"do_sample": temperature > 0, "top_k": 0, "top_p": 1.0}
        if temperature > 0:
            sampling["temperature"] = temperature
        for batch in self._batches(rows):
            width = max(len(rows[i]) for i in batch)
            room = min(max_tokens, self._tokens.longest - width)
            config = copy.deepcopy(self._sampling)
            config.update(**sampling, max_new_tokens=room)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                said_BR = self._run([rows[i] for i in batch], self._reading, config)[:, width:].tolist()
            texts = self._tokenizer.batch_decode(said_BR, skip_special_tokens=True)
            for i, text, said in zip(batch, texts, said_BR, strict=True):
                answers[i] = Completion(text, cut=len(said) == room and not self._ends() & set(said))
        return [answers[i] for i in range(len(chats))]

    def rest(self) -> None:
        self._guest.rest()

    def _batches(self, rows: dict[int, list[int]]) -> list[list[int]]:
        """Batches of row numbers: rows of similar length, as far as the model may read them together."""
        numbers = list(rows)
        return [[numbers[i] for i in batch] for batch in self._reading.batches(list(rows.values()), self.batch_size)]

    @property
    def _reading(self) -> Reading:
        """How the model reads a batch, found where it computes: it may have come to another device than its own."""
        if self._found is None:
            config = GenerationConfig(max_new_tokens=FORCED_BR.shape[1])
            self._found = find_reading(
                lambda rows, forced, reading: self._run(rows, reading, config, LogitsProcessorList([forced])),
                lambda ids_1T: self._model(input_ids=ids_1T, use_cache=False).logits,
                PROMPTS,
                vocabulary=self._model.get_input_embeddings().num_embeddings,  # type: ignore[arg-type]
                device=self._model.device,
                tolerance=1e-4 if self._model.dtype == torch.float32 else 0.05,
                key="judge.engine",
            )
        return self._found

    def _run(
        self,
        rows: list[list[int]],
        reading: Reading,
        config: GenerationConfig,
        processors: LogitsProcessorList | None = None,
    ) -> Any:
        width, device = max(map(len, rows)), self._model.device
        ids_BT = torch.tensor([[self._pad_id()] * (width - len(row)) + row for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        config.pad_token_id, config.use_cache = self._pad_id(), reading > Reading.WITHOUT_CACHE
        return self._model.generate(  # type: ignore[operator]  # a decorator hides its type
            input_ids=ids_BT,
            attention_mask=mask_BT if self._takes_mask else None,
            generation_config=config,
            logits_processor=processors,
        )

    def _ends(self) -> set[int]:
        ends: Any = self._sampling.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _pad_id(self) -> int:
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0
