"""What passes between the parts of a stage, and the legend of shape suffixes.

| suffix | axis |
|---|---|
| B | sequences of a batch |
| T | tokens of a whole sequence, prompt and response, padded on the right |
| R | tokens of the response, padded on the right |
| N | real response tokens of a batch, one after the other, no padding |
| L | tokens of a packed batch, one after the other, no padding |
| U | different prefixes that rows of a batch start with |
| P | tokens of a prefix, padded on the right |
| Q, K | tokens of a row that attend, and that are attended to |
| H | hidden size |
| V | vocabulary |
| O, I | output and input features of a layer |

Index t of an `_R` tensor is the t-th response token: its log-prob is predicted, and its value estimated, from the
hidden state one position before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from one version of the policy.

    Attributes:
        prompts: token ids of each prompt, without padding.
        responses: token ids of each response; an EOS that ended it is its last token.
        logprobs: the sampler's log-prob of each response token, at the temperature it sampled with.
        finish: why each response ended; `length` means that it was cut, `stop` that its last token completed one of
            the texts in `stop`.
        version: version of the policy adapter that was sampled from.
        tasks: the task of each prompt, where the policy is routed by task.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    logprobs: list[list[float]]
    finish: list[FinishReason]
    version: int
    stop: tuple[str, ...] = ()
    tasks: tuple[int, ...] | None = None

    @property
    def truncated_B(self) -> Tensor:
        return torch.tensor([reason == "length" for reason in self.finish])

    def tokens(self) -> int:
        """Number of response tokens."""
        return sum(map(len, self.responses))


@dataclass(frozen=True)
class Sequences:
    """Prompt and response as one row each, padded on the right.

    Under a causal mask a real token never attends to what stands right of it, so rows need no attention mask and
    position ids count from 0; which tokens are real follows from the lengths, never from comparing ids with a pad id.
    `cut_B` says which responses were cut at the length limit, where the rows are a rollout's. `tasks_B` says which task
    a row is of, where the policy is routed by task; rows of different tasks share no prefix.
    """

    ids_BT: Tensor
    prompt_lengths_B: Tensor
    response_lengths_B: Tensor
    cut_B: Tensor | None = None
    tasks_B: Tensor | None = None

    @classmethod
    def of(cls, rollout: Rollout, pad_id: int) -> Sequences:
        """The rows of a rollout, which know of each response whether it was cut, and its task."""
        tasks_B = None if rollout.tasks is None else torch.tensor(rollout.tasks)
        rows = cls.pack(rollout.prompts, rollout.responses, pad_id)
        return replace(rows, cut_B=rollout.truncated_B, tasks_B=tasks_B)

    @classmethod
    def pack(cls, prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> Sequences:
        """Rows from ragged lists. Every prompt has at least one token, every response too."""
        rows = [torch.tensor(p + r) for p, r in zip(prompts, responses, strict=True)]
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        return cls(ids_BT, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses]))

    def __len__(self) -> int:
        return self.ids_BT.shape[0]

    @property
    def lengths_B(self) -> Tensor:
        return self.prompt_lengths_B + self.response_lengths_B

    @property
    def mask_BR(self) -> Tensor:
        """True at the real response tokens."""
        R = int(self.response_lengths_B.max())
        return torch.arange(R)[None, :] < self.response_lengths_B[:, None]

    @property
    def predicts_BT(self) -> Tensor:
        """True at the positions whose hidden state predicts a response token."""
        position_T = torch.arange(self.ids_BT.shape[1])[None, :]
        first_B1 = self.prompt_lengths_B[:, None] - 1
        return (position_T >= first_B1) & (position_T < first_B1 + self.response_lengths_B[:, None])

    @property
    def targets_N(self) -> Tensor:
        """The response tokens, row after row: in the order of `predicts_BT`."""
        return self.ids_BT[self.predicts_BT.roll(1, dims=1)]

    def take(self, index: Tensor) -> Sequences:
        """The rows of that index, cut to the longest of them."""
        longest = int(self.lengths_B[index].max())
        lengths = self.prompt_lengths_B[index], self.response_lengths_B[index]
        cut_B, tasks_B = (None if each is None else each[index] for each in (self.cut_B, self.tasks_B))
        return Sequences(self.ids_BT[index, :longest], *lengths, cut_B, tasks_B)


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the update needs; fp32, on the CPU, zero where `mask_BR` is False.

    Attributes:
        old_logprobs_BR: log-probs of the policy that sampled, nats.
        advantages_BR: from the estimator of the recipe, whitened where that says so.
        values_BR, returns_BR: the critic's estimates before the update, and what it is to learn; None without a critic.
        weights_BR: importance weights of the trainer's log-probs against the sampler's; 1 unless asked for.
        anchor_logprobs_BR: log-probs of the anchor, nats.
        scores_B: the score of each response before the KL.
    """

    sequences: Sequences
    mask_BR: Tensor
    old_logprobs_BR: Tensor
    anchor_logprobs_BR: Tensor
    values_BR: Tensor | None
    advantages_BR: Tensor
    returns_BR: Tensor | None
    weights_BR: Tensor
    scores_B: Tensor
