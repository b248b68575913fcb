"""Shared prefixes: what several rows of a batch start with is computed once, in every role and with gradients.

A chat template's system prompt stands at the start of every row, and the two responses of a preference pair have their
prompt in common. The prefixes run first, each once; the rest of each row then attends to its prefix's keys and values
through the model's own cache, so positions, masks and sliding windows are the model's. Results differ from those of
whole rows by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pe_rlhf.types import Sequences

WORTHWHILE = 0.9  # an extra pass of few tokens has to leave at most this share of the tokens to compute
LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}
# Each row keeps its prefix's keys and values, an eighth or less of what a computed token keeps for the backward pass.
KEPT_TOKENS_PER_TOKEN = 8


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of a batch of rows, and which tokens come after them.

    Attributes:
        row_U: a row that starts with each prefix.
        columns_UP: the prefix's columns in it, at the right end; what is left of them is padding.
        attends_UP: False at that padding.
        prefix_B: which prefix each row starts with.
        columns_BS: the columns of the row's other tokens, which are their positions; past its end its last column
            again and again.
        follows_BS: False at those repetitions.
    """

    row_U: Tensor
    columns_UP: Tensor
    attends_UP: Tensor
    prefix_B: Tensor
    columns_BS: Tensor
    follows_BS: Tensor

    @classmethod
    def of(cls, sequences: Sequences, prefix_B: Tensor, lengths_U: Tensor) -> Prefixes:
        """Prefixes of those lengths; prefix u is what the first row with `prefix_B == u` starts with."""
        row_U = torch.stack([(prefix_B == u).nonzero()[0, 0] for u in range(len(lengths_U))])
        columns_UP = torch.arange(int(lengths_U.max())) - (lengths_U.max() - lengths_U)[:, None]
        first_B = lengths_U[prefix_B]
        last_B1 = sequences.ids_BT.shape[1] - 1
        columns_BS = first_B[:, None] + torch.arange(int((sequences.lengths_B - first_B).max()))
        follows_BS = columns_BS < sequences.lengths_B[:, None]
        return cls(row_U, columns_UP.clamp(min=0), columns_UP >= 0, prefix_B, columns_BS.clamp(max=last_B1), follows_BS)

    def tokens(self) -> int:
        """How many tokens are computed, padding included."""
        return self.columns_UP.numel() + self.columns_BS.numel()

    def attends(self) -> Tensor:
        """Attention mask of the rows, prefix and rest, _B(P+S).

        True at repetitions, too: no token attends to a later one, and one that attends to nothing would be NaN.
        """
        return torch.cat([self.attends_UP[self.prefix_B], torch.ones_like(self.follows_BS)], dim=1)

    def of_prefixes(self, values: Tensor) -> Tensor:
        """Values _UP… of the prefixes' tokens from those of all tokens, _BT…."""
        return values[self.row_U[:, None], self.columns_UP]

    def of_rest(self, values: Tensor) -> Tensor:
        """Values _BS… of the tokens after the prefixes from those of all tokens, _BT…."""
        return values[torch.arange(len(self.prefix_B))[:, None], self.columns_BS]


def find_prefixes(sequences: Sequences) -> Prefixes | None:
    """What is best computed once: the start that all rows have in common, or the prompts, where rows have equal ones.

    None where neither saves a tenth of the tokens. A prompt's last token is never part of its prefix: it predicts the
    first response token, and so belongs to what is asked for.
    """
    plans = [plan for plan in (_common_start(sequences), _equal_prompts(sequences)) if plan is not None]
    best = min(plans, key=Prefixes.tokens, default=None)
    return best if best is not None and best.tokens() <= WORTHWHILE * sequences.ids_BT.numel() else None


def common_length(sequences: Sequences) -> int:
    """How many tokens all rows start with, up to the last but one of the shortest prompt."""
    same_T = (sequences.ids_BT == sequences.ids_BT[:1]).all(dim=0)
    return min(int(same_T.cumprod(0).sum()), int(sequences.prompt_lengths_B.min()) - 1)


def kept_tokens(prefix_length: int) -> int:
    """As how many tokens of a budget a row's copy of its prefix's keys and values counts."""
    return -(-prefix_length // KEPT_TOKENS_PER_TOKEN)


def _common_start(sequences: Sequences) -> Prefixes | None:
    length = common_length(sequences) if len(sequences) > 1 else 0
    if length < 1:
        return None
    return Prefixes.of(sequences, torch.zeros(len(sequences), dtype=torch.long), torch.tensor([length]))


def _equal_prompts(sequences: Sequences) -> Prefixes | None:
    lengths = sequences.prompt_lengths_B.tolist()
    prompts = [tuple(row[:length]) for row, length in zip(sequences.ids_BT.tolist(), lengths, strict=True)]
    number = {prompt: u for u, prompt in enumerate(dict.fromkeys(prompts))}
    if len(number) == len(prompts) or min(lengths) < 2:
        return None
    prefix_B = torch.tensor([number[prompt] for prompt in prompts])
    return Prefixes.of(sequences, prefix_B, torch.tensor([len(prompt) - 1 for prompt in number]))


def takes_prefixes(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix are the same whatever follows, and are all that the model keeps of it.

    A recurrent state cannot be shared by tokens, and some rotary embeddings turn keys by how long the whole row is.
    """
    layers = DynamicCache(config=model.config).layers
    keeps_keys = bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return keeps_keys and not _rope_types(model.config) & LENGTH_DEPENDENT_ROPE


def _rope_types(config: PretrainedConfig) -> set[str]:
    """The kinds of rotary embeddings of a model's layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}
