"""A transformers model in this process as the judge's chat model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        self.identity, self.batch_size = f"hf:{identity}", batch_size
        vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        self._tokens = ChatTokens(tokenizer, self.identity, longest or 10**9, vocabulary, template_kwargs)
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        """One forward pass per batch; the text is the most likely first token."""
        self._guest.come()
        rows, answers = self._tokens.encode(chats, room=1)
        ids = self._tokens.label_ids(labels)
        for batch in _batches(rows, self.batch_size):
            logprobs_BV = torch.log_softmax(self._last_logits([rows[i] for i in batch]).float(), dim=-1)
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
        for batch in _batches(rows, self.batch_size):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                ids_BT, mask_BT, _ = self._left_padded([rows[i] for i in batch])
                room = min(max_tokens, self._tokens.longest - ids_BT.shape[1])
                output_BT: Any = self._model.generate(  # type: ignore[operator]  # a decorator hides its type
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    max_new_tokens=room,
                    pad_token_id=self._pad_id(),
                    **sampling,
                )
            said_BR = output_BT[:, ids_BT.shape[1] :].tolist()
            texts = self._tokenizer.batch_decode(said_BR, skip_special_tokens=True)
            for i, text, said in zip(batch, texts, said_BR, strict=True):
                answers[i] = Completion(text, cut=len(said) == room and not self._ends() & set(said))
        return [answers[i] for i in range(len(chats))]

    def rest(self) -> None:
        self._guest.rest()

    def _last_logits(self, rows: list[list[int]]) -> Tensor:
        ids_BT, mask_BT, position_BT = self._left_padded(rows)
        keep: dict[str, Any] = {"logits_to_keep": 1} if self._last_only else {}
        output = self._model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False, **keep
        )
        return output.logits[:, -1]

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        width, device = max(map(len, rows)), self._model.device
        ids_BT = torch.tensor([[self._pad_id()] * (width - len(row)) + row for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)

    def _ends(self) -> set[int]:
        config: Any = self._model.generation_config
        ends = config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _pad_id(self) -> int:
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0


def _batches(rows: dict[int, list[int]], size: int) -> list[list[int]]:
    """Batches of row numbers, rows of similar length together so that little padding is computed."""
    order = sorted(rows, key=lambda i: len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]
