"""Judges that need our models: a local chat model, and rewards of a run or of a sequence-classification model.

They stand behind the protocol of `reward.judges`, like all others; importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from pe_rlhf.config.judge import JudgeConfig
from pe_rlhf.data.codec import cut_pair
from pe_rlhf.model.loading import find_device, load_causal_lm
from pe_rlhf.model.micro_batches import micro_batches
from pe_rlhf.model.names import check_model_name
from pe_rlhf.rollout.make import check_vllm
from pe_rlhf.runs.saved_roles import files_of, find_role, load_role_backbone, weights_of
from pe_rlhf.scoring.scorers import ModelScorer
from pe_rlhf.system.progress import progress
from pe_rlhf.types import Sequences
from reward.asking import Pair, judge_pairs
from reward.errors import InputError
from reward.judges import Judge
from reward.judges.judge_registry import JudgeSettings, judge_kinds, make_judge, register_judge, split_judge_name
from reward.judges.llm import ChatBackend, LLMJudge
from reward.judges.reward_model import reward_model_judge
from reward.judges.templates import JudgePrompt
from reward.records import Prompt
from reward.summary import Outcome

MICRO_BATCH_TOKENS = 4096
TARGETS = {"llm": "its model: llm:MODEL", "reward_model": "a run's directory or a model: reward_model:RUN"}


def judge_settings(judge: str | JudgeConfig) -> JudgeSettings:
    """The settings behind a recipe's `judge`: a name alone, or a section."""
    if isinstance(judge, JudgeConfig):
        return JudgeSettings(**judge.model_dump())
    kind, target = split_judge_name(judge)
    return JudgeSettings(kind, target)


def build_judge(judge: str | JudgeConfig) -> Judge:
    """The judge of a recipe. Raises `InputError` for what is wrong with it."""
    return make_judge(judge_settings(judge))


def check_judge(judge: str | JudgeConfig, run_dir: Path | None = None) -> None:
    """Raise `InputError` for what can be seen to be wrong with a judge without loading a model or asking a server.

    A reward model that `run_dir` is to hold, once its own reward stage has finished, may still be missing.
    """
    settings = judge_settings(judge)
    if settings.kind in TARGETS:
        target = _target(settings)
        path = Path(target).expanduser().resolve()
        awaited = run_dir is not None and path.is_relative_to(run_dir.resolve())
        if settings.kind == "reward_model" and not awaited and find_role(target, "reward") is None:
            check_model_name(target, "judge: reward_model")
        if settings.kind == "llm" and settings.base_url is None:
            check_model_name(target, "judge: llm")
    if settings.kind == "llm":
        JudgePrompt(settings.template)
        check_vllm(settings.engine == "vllm")
    elif settings.kind in ("function", "length") or settings.kind not in judge_kinds():
        make_judge(settings)


def ask_judge(
    judge: Judge | None, pairs: Sequence[Pair], path: Path, *, title: str, names: tuple[str, str], max_invalid: float
) -> list[Outcome]:
    """`judge_pairs` with progress and the win-rate so far; `names` are those of candidate and baseline.

    `judge` is None on the ranks that do not ask.
    """
    assert judge is not None
    with progress(title, len(pairs) * (2 if judge.sees_order else 1), "verdicts") as advance:

        def told(done: int, win_rate: float | None) -> None:
            advance(done, "" if win_rate is None else f"win-rate so far {win_rate:.3f}")

        candidate, baseline = names
        return judge_pairs(
            judge,
            pairs,
            path,
            candidate=candidate,
            baseline=baseline,
            max_invalid_share=max_invalid,
            on_progress=told,
        )


def llm_judge(settings: JudgeSettings) -> Judge:
    """A chat model at `base_url`, else one that vLLM or transformers load here."""
    target, prompt = _target(settings), JudgePrompt(settings.template)
    identity = f"{target} {settings.dtype} {files_of(target)}".rstrip()
    backend: ChatBackend
    if settings.base_url:
        from reward.judges.endpoint import Endpoint  # the client library takes a second to import

        backend = Endpoint(target, settings)
    elif settings.engine == "vllm":
        from pe_rlhf.scoring.vllm_chat import VLLMChat

        device = find_device(settings.device)
        backend = VLLMChat(target, settings.dtype, device, identity, memory_share=settings.gpu_memory_share)
    else:
        from reward.judges.hf_chat import HFChat

        model, tokenizer = load_causal_lm(
            target,
            dtype=settings.dtype,
            device=find_device(settings.device),
            attention="sdpa",
            trust_remote_code=False,
        )
        backend = HFChat(model, tokenizer, identity)
    return LLMJudge(
        backend,
        prompt,
        reasoning=settings.reasoning,
        reasoning_tokens=settings.reasoning_tokens,
        verdict=settings.verdict,
        attempts=settings.answer_attempts,
    )


class RewardScores(Protocol):
    """Rewards of responses; `cut` says which did not end, by default none."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool] | None = None
    ) -> list[float]: ...


def reward_scores(
    target: str, dtype: str = "float32", device: str = "auto", *, as_trained: bool = False
) -> RewardScores:
    """Rewards from a reward run of ours (its directory), or a model with one label.

    as_trained: cut what is longer than the run's `reward.max_length`, as its stage does; else the model's limit holds.
    """
    found = find_role(target, "reward")
    if found is None:
        scorer = ModelScorer(target, find_device(device), dtype)
        return lambda prompts, responses, cut=None: scorer.score_texts(prompts, responses, cut).tolist()
    backbone, codec = load_role_backbone(found, "reward", dtype=dtype, device=device)
    limit = backbone.max_positions or 10**9
    if as_trained and found.recipe is not None and found.recipe.reward is not None:
        limit = min(limit, found.recipe.reward.max_length)

    @torch.no_grad()
    def score(prompts: Sequence[Prompt], responses: Sequence[str], cut: Sequence[bool] | None = None) -> list[float]:
        texts = zip(prompts, responses, cut or [False] * len(prompts), strict=True)
        pairs = [cut_pair(*codec.encode_pair(*text), limit) for text in texts]
        sequences = Sequences.pack([p for p, _ in pairs], [r for _, r in pairs], backbone.pad_token_id)
        # Not by `AdapterScorer`, which shares the rows out: a judge is asked on one rank alone.
        scores_B = torch.zeros(len(sequences))
        with backbone.role("reward"):
            for index in micro_batches(
                backbone.budget_lengths(sequences), MICRO_BATCH_TOKENS, padded=not backbone.packs
            ):
                scores_B[index] = backbone.response_scores(sequences.take(index)).cpu()
        return scores_B.tolist()

    return score


def _reward_model(settings: JudgeSettings) -> Judge:
    target = _target(settings)
    score = reward_scores(target, settings.dtype, settings.device)
    identity = f"{target} {settings.dtype} {weights_of(target, 'reward')}".rstrip()
    return reward_model_judge(score, identity)


def _target(settings: JudgeSettings) -> str:
    if not settings.target:
        raise InputError(f"judge: {settings.kind} needs {TARGETS[settings.kind]}")
    return settings.target


register_judge("llm", llm_judge)
register_judge("reward_model", _reward_model)
