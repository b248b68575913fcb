"""Scores of responses: by a reward adapter on the shared backbone, another model, or a function."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_row
from pe_rlhf.runs.saved_roles import SavedRole, find_role
from pe_rlhf.scoring.classifier import Classifier
from pe_rlhf.scoring.remote import was_cut
from pe_rlhf.system.distributed import all_rows, on_main, own_rows
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.judges import load_score_function, score_responses
from reward.records import NO_COLUMNS, Columns, Prompt


class Scorer(Protocol):
    """Gives each response of a batch one number."""

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        """Scores _B, fp32, on the CPU, of responses given both as text and as tokens.

        `columns` are the other columns of the prompts' rows.
        """
        ...


class AdapterScorer:
    """A reward role on the shared backbone: scores the very tokens that were sampled."""

    def __init__(self, backbone: Backbone, role: str, micro_batch_tokens: int) -> None:
        self._backbone, self._role, self._budget = backbone, role, micro_batch_tokens

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        return for_each_row(self._backbone, self._role, sequences, self._budget, self._backbone.response_scores)


class ModelScorer:
    """A sequence-classification model with one label, which reads the texts; every rank scores its share of the rows.

    `eos_token_ids` are the policy's: a response that does not end with one was cut.
    """

    def __init__(self, classifier: Classifier, eos_token_ids: list[int]) -> None:
        self._classifier, self._eos_token_ids = classifier, torch.tensor(eos_token_ids)

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        cut = was_cut(sequences, self._eos_token_ids)
        own = own_rows(len(sequences))
        texts = ([prompts[i] for i in own], [responses[i] for i in own], [cut[i] for i in own])
        return torch.tensor(all_rows(self._classifier.score(*texts).tolist(), len(sequences)))


class FunctionScorer:
    """A Python function of prompts, responses and columns, called on rank 0 and checked at every call.

    `arguments` are the recipe's, by name.
    """

    def __init__(self, path: str, columns: Collection[str] = (), arguments: Mapping[str, Any] | None = None) -> None:
        self._arguments = arguments or {}
        self._function = load_score_function(path, columns, self._arguments)

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        return torch.tensor(
            on_main(lambda: score_responses(self._function, prompts, responses, columns, self._arguments))
        )


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
