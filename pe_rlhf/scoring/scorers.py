"""Scores of responses: reward adapters on the shared backbone, another model, a Python function, and weighted sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pe_rlhf.config import RewardSource
from pe_rlhf.data.codec import TextCodec, cut_pair
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.names import check_model_name, resolve_model
from pe_rlhf.model.passes import for_each_row
from pe_rlhf.model.whole import check_vocabulary, load_whole, loading
from pe_rlhf.runs.saved_roles import SavedRole, find_role, load_role
from pe_rlhf.system.distributed import all_rows, on_main, own_rows
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.judges import load_function, score_responses
from reward.records import Prompt


class Scorer(Protocol):
    """Gives each response of a batch one number."""

    def score(self, prompts: list[Prompt], responses: list[str], sequences: Sequences) -> Tensor:
        """Scores _B, fp32, on the CPU, of responses given both as text and as tokens."""
        ...


class AdapterScorer:
    """A reward role on the shared backbone: scores the very tokens that were sampled."""

    def __init__(self, backbone: Backbone, role: str, micro_batch_tokens: int) -> None:
        self._backbone, self._role, self._budget = backbone, role, micro_batch_tokens

    def score(self, prompts: list[Prompt], responses: list[str], sequences: Sequences) -> Tensor:
        return for_each_row(self._backbone, self._role, sequences, self._budget, self._backbone.response_scores)


class ModelScorer:
    """A sequence-classification model with one label; it reads the text by its own tokenizer.

    `eos_token_ids` are the policy's: a response that does not end with one was cut, and gets no EOS here either.
    `key` is where the model is named, for messages.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        dtype: torch.dtype | str,
        eos_token_ids: Sequence[int] = (),
        batch_size: int = 16,
        key: str = "reward model",
    ) -> None:
        check_model_name(model, key)
        path = resolve_model(model)
        with loading(model, key):
            config = AutoConfig.from_pretrained(path)
            self._tokenizer = AutoTokenizer.from_pretrained(path)
        if (labels := config.num_labels) != 1:
            raise InputError(f"{key}: {model!r} has {labels} labels, a reward model has one", kind="conflict", key=key)
        loaded = load_whole(AutoModelForSequenceClassification, path, name=model, key=key, config=config, dtype=dtype)
        check_vocabulary(loaded, self._tokenizer, model, key)
        self._model = loaded.requires_grad_(False).eval()
        self._model.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides the overloads
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._codec, self._batch_size = TextCodec(self._tokenizer), batch_size
        self._limit = _longest_row(self._model, self._tokenizer)
        self._eos_token_ids = torch.tensor(eos_token_ids)

    def score(self, prompts: list[Prompt], responses: list[str], sequences: Sequences) -> Tensor:
        last_B = sequences.ids_BT[torch.arange(len(sequences)), sequences.lengths_B - 1]
        cut = (~torch.isin(last_B, self._eos_token_ids)).tolist()
        own = own_rows(len(sequences))
        texts = ([prompts[i] for i in own], [responses[i] for i in own], [cut[i] for i in own])
        return torch.tensor(all_rows(self.score_texts(*texts).tolist(), len(sequences)))

    @torch.no_grad()
    def score_texts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool] | None = None
    ) -> Tensor:
        """Scores _B of texts; `cut` says which responses did not end, by default none.

        Of a text that is longer than the model takes, the start of the prompt is left out.
        """
        triples = zip(prompts, responses, cut or [False] * len(prompts), strict=True)
        pairs = (cut_pair(*self._codec.encode_pair(*triple), self._limit) for triple in triples)
        rows = [prompt + response for prompt, response in pairs]
        scores: list[Tensor] = []
        for start in range(0, len(rows), self._batch_size):
            batch = self._tokenizer.pad(
                {"input_ids": rows[start : start + self._batch_size]}, padding_side="right", return_tensors="pt"
            )
            scores.append(self._model(**batch.to(self._model.device)).logits[:, 0].float().cpu())
        return torch.cat(scores) if scores else torch.zeros(0)


def _longest_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a classifier takes, by its config and its tokenizer, which may know of fewer."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    for name, module in model.named_modules():
        # RoBERTa and similar models count positions from after the padding id.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # type: ignore[operator]  # an index, then
    return min(positions, tokenizer.model_max_length)


class FunctionScorer:
    """A Python function of prompts and responses, called on rank 0 and checked at every call."""

    def __init__(self, path: str) -> None:
        self._function = load_function(path)

    def score(self, prompts: list[Prompt], responses: list[str], sequences: Sequences) -> Tensor:
        return torch.tensor(on_main(lambda: score_responses(self._function, prompts, responses)))


class WeightedScorer:
    """The weighted sum of several scorers."""

    def __init__(self, parts: list[tuple[float, Scorer]]) -> None:
        self._parts = parts

    def score(self, prompts: list[Prompt], responses: list[str], sequences: Sequences) -> Tensor:
        weighted = [weight * scorer.score(prompts, responses, sequences) for weight, scorer in self._parts]
        return torch.stack(weighted).sum(dim=0)


def make_scorer(
    sources: list[RewardSource], backbone: Backbone, run_dir: Path, micro_batch_tokens: int
) -> tuple[WeightedScorer, list[str]]:
    """The scorer of a recipe's reward sources, and the roles that it has added to the backbone.

    Reward adapters become roles `reward`, `reward_2`, …
    """
    parts: list[tuple[float, Scorer]] = []
    roles: list[str] = []
    for source in sources:
        if source.function is not None:
            scorer: Scorer = FunctionScorer(source.function)
        elif source.model is not None:
            scorer = ModelScorer(
                source.model, backbone.device, backbone.model.dtype, backbone.eos_token_ids, key="ppo.reward.model"
            )
        else:
            roles.append(f"reward_{len(roles) + 1}" if roles else "reward")
            load_role(backbone, roles[-1], find_reward(source.adapter, run_dir).folder)
            scorer = AdapterScorer(backbone, roles[-1], micro_batch_tokens)
        parts.append((source.weight, scorer))
    return WeightedScorer(parts), roles


def find_reward(adapter: str | None, run_dir: Path) -> SavedRole:
    """The reward adapter that a recipe names: `stage` is this run's, all else a run's, a stage's or its own directory.

    Raises `InputError` that names the key where there is none.
    """
    place = run_dir if adapter in (None, "stage") else Path(adapter).expanduser()
    try:
        return find_role(place, "reward")
    except InputError as error:
        key = "ppo.reward.adapter"
        raise InputError(f"{key}: {error}", kind=error.kind, key=key, file=error.file) from error
