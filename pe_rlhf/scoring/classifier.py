"""Reward models of others: sequence classifiers with one label, which read a conversation as they were trained to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.adapter_models import SEQ_CLS, base_of
from pe_rlhf.model.loading import DTYPES, longest_sequence
from pe_rlhf.model.names import check_model_name, find_adapter, resolve_model
from pe_rlhf.model.whole import check_vocabulary, load_adapter_whole, load_whole, loading
from reward.errors import InputError
from reward.records import Prompt


class Classifier:
    """A sequence-classification model with one label, on texts.

    It is given the whole conversation by its own tokenizer and chat template, and is read at the last token of each
    row. Without a template it gets a prompt and a response as a pair of texts where its tokenizer separates such (BERT,
    DeBERTa), otherwise one after the other, with the end token. `key` is where the model is named, for messages.

    Raises `InputError` for a model that has another number of labels, or whose weights are not those of one with one.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype | str,
        *,
        batch_size: int = 16,
        key: str = "reward model",
        trust_remote_code: bool = False,
    ) -> None:
        model, self._tokenizer = _load(name, dtype, device, key, trust_remote_code)
        self.model = model.requires_grad_(False).eval()
        self.codec, self._batch_size = TextCodec(self._tokenizer), batch_size
        self._limit = _longest_row(self.model, self._tokenizer)
        separates = self._tokenizer.cls_token_id is not None and self._tokenizer.sep_token_id is not None
        self._takes_pairs = self.codec.template is None and separates

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool] | None = None) -> Tensor:
        """Scores _B, fp32, on the CPU; `cut` says which responses did not end, by default none.

        A conversation that is longer than the model takes is cut as in training: all that share a prompt alike.
        """
        whole = cut or [False] * len(prompts)
        rows = self._pairs(prompts, responses) if self._takes_pairs else self._conversations(prompts, responses, whole)
        scores = [self._scores(rows[i : i + self._batch_size]) for i in range(0, len(rows), self._batch_size)]
        return torch.cat(scores) if scores else torch.zeros(0)

    def _pairs(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, list[int]]]:
        self._tokenizer.truncation_side = "left"
        pairs = zip(prompts, responses, strict=True)
        texts = [(self.codec.render(prompt), response) for prompt, response in pairs]
        return [
            dict(
                self._tokenizer(*text, truncation="longest_first", max_length=self._limit, return_attention_mask=False)
            )
            for text in texts
        ]

    def _conversations(
        self, prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool]
    ) -> list[dict[str, list[int]]]:
        rows: list[dict[str, list[int]]] = [{} for _ in prompts]
        for group in by_prompt(prompts):
            sides = [(responses[i], cut[i]) for i in group]
            for i, ids in zip(
                group, self.codec.encode_conversations(prompts[group[0]], sides, self._limit), strict=True
            ):
                rows[i] = {"input_ids": ids}
        return rows

    def _scores(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """One batch, padded on the right with an id that no row holds: by that id transformers find each row's end."""
        held = {token for row in rows for token in row["input_ids"]}
        pad = next(i for i in (self._tokenizer.pad_token_id, *range(len(held) + 1)) if i is not None and i not in held)
        width = max(len(row["input_ids"]) for row in rows)
        filling = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
        columns = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        batch = {
            name: torch.tensor([row[name] + [filling[name]] * (width - len(row[name])) for row in columns])
            for name in columns[0]
        }
        self.model.config.pad_token_id = pad
        return self.model(**{n: t.to(self.model.device) for n, t in batch.items()}).logits[:, 0].float().cpu()


def by_prompt(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """The numbers of the rows of each prompt."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(i)
    yield from groups.values()


def _load(
    name: str, dtype: torch.dtype | str, device: torch.device, key: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_model_name(name, key, SEQ_CLS)
    adapter = find_adapter(name, fetch=True)
    path = resolve_model(name if adapter is None else base_of(adapter, key, SEQ_CLS))
    with loading(name, key):
        said, _ = PreTrainedConfig.get_config_dict(path)
        labels = said.get("num_labels") or len(said.get("id2label") or ()) or None
        config = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(name, key, trust_remote_code)
    arguments = {"config": config, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if adapter is not None:
        arguments |= {"dtype": torch.float32, "new_head": True}  # the adapter has it; summed in fp32
        plain = load_whole(AutoModelForSequenceClassification, path, name=path, key=key, **arguments)
        merged: Any = load_adapter_whole(plain, str(adapter), key).merge_and_unload()  # type: ignore[operator]
        check_vocabulary(merged, tokenizer, name, key)
        return merged.to(device, DTYPES[dtype] if isinstance(dtype, str) else dtype), tokenizer
    if labels not in (None, 1):
        message = f"{key}: {name!r} has {labels} labels, a reward model has one"
        raise InputError(message, kind="conflict", key=key, file=name)
    # A config may leave out that there is one label, and transformers' default is two: the weights decide.
    model = load_whole(AutoModelForSequenceClassification, path, name=name, key=key, **arguments)
    check_vocabulary(model, tokenizer, name, key)
    return model, tokenizer


def tokenizer_of(name: str, key: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of an adapter's folder; where that has none, its base's."""
    adapter = find_adapter(name, fetch=True)
    if adapter is None or (adapter / "tokenizer_config.json").is_file():
        path = resolve_model(name) if adapter is None else str(adapter)
    else:
        path = resolve_model(base_of(adapter, key, SEQ_CLS))
    with loading(name, key):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _longest_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a classifier takes, by its config and its tokenizer, which may know of fewer."""
    positions = longest_sequence(model.config) or 10**9
    for name, module in model.named_modules():
        # RoBERTa and similar models count positions from after the padding id.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # type: ignore[operator]  # an index, then
    return min(positions, tokenizer.model_max_length)
