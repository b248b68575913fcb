"""The kind of judge `reward_model`, and the rewards of texts that it compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.adapter_models import SEQ_CLS
from pe_rlhf.model.loading import check_known, find_device
from pe_rlhf.model.passes import for_each_row
from pe_rlhf.runs.saved_roles import role_behind, weights_of
from pe_rlhf.scoring.classifier import Classifier, by_prompt
from pe_rlhf.scoring.reward_templates import template_check
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.judges import Judge
from reward.judges.guest import Guest
from reward.judges.judge_settings import JudgeSettings
from reward.judges.reward_model import reward_model_judge
from reward.records import Prompt

MICRO_BATCH_TOKENS = 1024
NAME_IT = "name a run's directory or a model: reward_model:RUN"


class RewardModelKind:
    """Makes judges from the rewards of a run of ours, or of a model with one label."""

    def __call__(self, settings: JudgeSettings) -> Judge:
        target = settings.needed_target(NAME_IT)
        trust = settings.trust_remote_code
        model, codec, score = load_rewards(target, settings.dtype, settings.device, trust_remote_code=trust)
        identity = f"{target} {settings.dtype} {weights_of(target, 'reward')}".rstrip()
        identity += f" {codec.day}" if codec.day else ""
        # A quantised base cannot be moved.
        fixed = getattr(getattr(model, "model", model), "is_quantized", False)
        guest = Guest(model, torch.device("cpu") if fixed else find_device(settings.device))
        guest.rest()
        check = template_check(target, "judge.target", trust)

        def scores(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            if not fixed:
                guest.come()
            return score(prompts, responses)

        def refusal(prompt: Prompt) -> str | None:
            try:
                check(prompt)
            except InputError as error:
                return str(error)
            return None

        return reward_model_judge(scores, identity, guest.rest, refusal)

    def check(self, settings: JudgeSettings, run_dir: Path | None) -> None:
        target = settings.needed_target(NAME_IT)
        # The reward model may be that of the run that asks, whose reward stage has not run yet.
        awaited = run_dir is not None and Path(target).expanduser().resolve().is_relative_to(run_dir.resolve())
        if not awaited and role_behind(target, "reward") is None:
            check_known(target, "judge.target", settings.trust_remote_code, SEQ_CLS)

    def prompt_check(self, settings: JudgeSettings) -> Callable[[Prompt], None]:
        return template_check(settings.needed_target(NAME_IT), "judge.target", settings.trust_remote_code)


class RewardScores(Protocol):
    """Rewards of responses; `cut` says which responses did not end, by default none."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool] | None = None
    ) -> list[float]: ...


def reward_scores(
    target: str,
    dtype: str = "float32",
    device: str = "auto",
    *,
    as_trained: bool = False,
    trust_remote_code: bool = False,
) -> RewardScores:
    """Rewards from the directory of a reward run of ours, or from a model with one label.

    as_trained: cut texts to the run's `reward.max_length`, as its stage does; otherwise to the model's limit.
    """
    return load_rewards(target, dtype, device, as_trained=as_trained, trust_remote_code=trust_remote_code)[2]


def load_rewards(
    target: str, dtype: str, device: str, *, as_trained: bool = False, trust_remote_code: bool = False
) -> tuple[nn.Module, TextCodec, RewardScores]:
    """The model behind `reward_scores`, how it is prompted, and those."""
    found = role_behind(target, "reward")
    if found is None:
        classifier = Classifier(target, find_device(device), dtype, trust_remote_code=trust_remote_code)
        model, codec = classifier.model, classifier.codec
        return model, codec, lambda prompts, responses, cut=None: classifier.score(prompts, responses, cut).tolist()
    backbone, codec = found.load("reward", dtype=dtype, device=device)
    limit = backbone.longest_sequence
    if as_trained and found.recipe is not None and found.recipe.reward is not None:
        limit = min(limit, found.recipe.reward.max_length)

    def score(prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool] | None = None) -> list[float]:
        whole, pairs = cut or [False] * len(prompts), [([0], [0])] * len(prompts)
        for group in by_prompt(prompts):
            sides = [(responses[i], whole[i]) for i in group]
            prompt, encoded = codec.encode_within(prompts[group[0]], sides, limit)
            for i, response in zip(group, encoded, strict=True):
                pairs[i] = (prompt, response)
        sequences = Sequences.pack([p for p, _ in pairs], [r for _, r in pairs], backbone.pad_token_id)
        # `AdapterScorer` would share the rows out to all ranks, but a judge is asked on rank 0 only.
        budget, compute = MICRO_BATCH_TOKENS, backbone.response_scores
        return for_each_row(backbone, "reward", sequences, budget, compute, this_rank_only=True).tolist()

    return backbone, codec, score
