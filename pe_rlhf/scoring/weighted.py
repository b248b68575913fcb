"""The reward of PPO: the weighted sum of a recipe's sources, each normalised and clipped first where it says so."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pe_rlhf.algo.running_moments import RunningMoments
from pe_rlhf.config.reward_source import RewardSource, source_names
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.peft_roles import load_start
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.scoring.classifier import Classifier
from pe_rlhf.scoring.ensemble import EnsembleScorer, find_ensemble, load_average
from pe_rlhf.scoring.judge_scorer import AnchorResponses, JudgeScorer, check_against
from pe_rlhf.scoring.remote import RemoteScorer, check_columns
from pe_rlhf.scoring.scorers import AdapterScorer, FunctionScorer, ModelScorer, Scorer, find_reward
from pe_rlhf.system.distributed import on_main
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.records import NO_COLUMNS, Columns, Prompt

Moments = dict[str, list[float]]  # by the name of the source: count, mean, sum of squares


@dataclass
class Part:
    """One source of the sum; `moments` are those of all its scores so far."""

    name: str
    scorer: Scorer
    settings: RewardSource
    moments: RunningMoments = field(default_factory=RunningMoments)

    def rows(self, count: int, columns: Columns) -> list[int]:
        """Those whose columns have the values that the source asks for."""
        wanted = self.settings.where.items()
        return [row for row in range(count) if all(columns[name][row] == value for name, value in wanted)]

    def contribution(self, scores_B: Tensor, learns: bool) -> Tensor:
        """Weight times the scores, normalised by mean and deviation of all so far, these included, and clipped.

        Where nothing is learnt and nothing is known yet, they are normalised by their own. Raises `InputError` for a
        number that float32 does not hold.
        """
        if self.settings.normalise == "running":
            taken = self.moments.with_batch(scores_B) if learns or not self.moments.count else self.moments
            scores_B = taken.normalise(scores_B)
            self.moments = taken if learns else self.moments
        if (limit := self.settings.clip) is not None:
            scores_B = scores_B.clamp(-limit, limit)
        rewards_B = self.settings.weight * scores_B
        if not_finite := (~rewards_B.isfinite()).nonzero().flatten().tolist():
            row = not_finite[0]
            raise InputError(
                f"ppo.reward: {self.name}: {rewards_B[row]:g} for response {row}; a reward is at most 3e38 in size",
                kind="not_finite",
                key="ppo.reward",
                row=row + 1,
            )
        return rewards_B


class WeightedScorer:
    """The weighted sum of several scorers.

    learns: whether running means and deviations take in each batch; they are the same on every rank, as the scores are.
    metrics: of the last batch, each source's mean and deviation before normalising; empty where the only source is
    the reward as it is.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts, self.learns = list(parts), False
        self.metrics: dict[str, float] = {}

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        contributions: list[Tensor] = []
        self.metrics = {}
        for part in self._parts:
            if part.settings.where:
                rows = part.rows(len(prompts), columns)
                if not rows:
                    continue
                scores_B = part.scorer.score(*_of_rows(rows, prompts, responses, sequences, columns))
                whole_B = scores_B.new_zeros(len(prompts))
                whole_B[rows] = part.contribution(scores_B, self.learns)
                contributions.append(whole_B)
            else:
                scores_B = part.scorer.score(prompts, responses, sequences, columns)
                contributions.append(part.contribution(scores_B, self.learns))
            if len(self._parts) > 1 or part.settings.normalise != "none" or part.settings.clip is not None:
                self.metrics[f"source_{part.name}"] = scores_B.mean().item()
                self.metrics[f"source_{part.name}_std"] = scores_B.std(correction=0).item()
            own: dict[str, float] = getattr(part.scorer, "metrics", {})
            self.metrics |= {f"source_{part.name}_{name}": value for name, value in own.items()}
        if not contributions:
            raise InputError(
                "ppo.reward: no source scores any of the prompts of this step; their `where` leaves all of them out",
                kind="conflict",
                key="ppo.reward",
            )
        return torch.stack(contributions).sum(dim=0)

    def moments(self) -> Moments:
        """What is known of each normalised source, for a checkpoint."""
        normalised = [part for part in self._parts if part.settings.normalise == "running"]
        return {p.name: [p.moments.count, p.moments.mean, p.moments.squares] for p in normalised}

    def set_moments(self, saved: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `moments` gave; a source that is not in it starts anew."""
        for part in self._parts:
            if part.name in saved:
                count, mean, squares = saved[part.name]
                part.moments = RunningMoments(int(count), mean, squares)


def _of_rows(
    rows: list[int], prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns
) -> tuple[list[Prompt], list[str], Sequences, Columns]:
    """What a scorer is given of some rows."""
    chosen = {name: [values[row] for row in rows] for name, values in columns.items()}
    taken = sequences.take(torch.tensor(rows))
    return [prompts[row] for row in rows], [responses[row] for row in rows], taken, chosen


def check_where(sources: Sequence[RewardSource], columns: Collection[str]) -> None:
    """Raise `InputError` where a source asks for a column that the prompts do not have."""
    for number, source in enumerate(sources):
        if missing := [name for name in source.where if name not in columns]:
            raise InputError(
                f"ppo.reward: where: the prompts have no column {missing[0]!r}",
                kind="missing",
                key=f"ppo.reward.{number}.where",
                fix="the column `source` is that of prompts: {mix: …}" if missing[0] == "source" else None,
            )


def make_scorer(
    sources: list[RewardSource],
    backbone: Backbone,
    run_dir: Path,
    micro_batch_tokens: int,
    columns: Collection[str] = (),
    *,
    files: StageFiles | None = None,
    anchor: AnchorResponses | None = None,
) -> tuple[WeightedScorer, list[str]]:
    """The scorer of a recipe's reward sources, and the roles that it has added to the backbone.

    Reward adapters become roles `reward`, `reward_2`, … Functions may ask for `columns`, which the prompts' rows have.

    files, anchor: for judges: where their answers are kept, by default nowhere, and what the anchor answers.
    """
    check_where(sources, columns)
    parts: list[Part] = []
    roles: list[str] = []

    def new_role() -> str:
        roles.append(f"reward_{len(roles) + 1}" if roles else "reward")
        return roles[-1]

    for name, source in zip(source_names(sources), sources, strict=True):
        if source.function is not None:
            scorer: Scorer = FunctionScorer(source.function, columns, source.arguments)
        elif source.model is not None:
            classifier = Classifier(
                source.model,
                backbone.device,
                backbone.model.dtype,
                key="ppo.reward.model",
                trust_remote_code=source.trust_remote_code,
            )
            scorer = ModelScorer(classifier, backbone.eos_token_ids)
        elif source.url is not None:
            check_columns(source.server.columns, columns)
            scorer = RemoteScorer(source.url, source.server, backbone.eos_token_ids)
            on_main(scorer.check_server)
        elif source.ensemble is not None:
            members = find_ensemble(source.ensemble, run_dir)
            if source.combine == "weight_average":
                load_average(backbone, new_role(), members)
                scorer = AdapterScorer(backbone, roles[-1], micro_batch_tokens)
            else:
                own = [new_role() for _ in members]
                for role, member in zip(own, members, strict=True):
                    load_role(backbone, role, member.folder)
                scorer = EnsembleScorer(backbone, own, source.combine, source.k, micro_batch_tokens)
        elif source.judge is not None:
            check_against(source, columns)
            kept = files or StageFiles(Path(tempfile.mkdtemp(prefix="pe-rlhf-judged-")))
            scorer = JudgeScorer(source, kept, anchor)
        else:
            if source.adapter in (None, "stage"):
                load_role(backbone, new_role(), find_reward(source.adapter, run_dir).folder)
            else:
                load_start(backbone, new_role(), source.adapter, "ppo.reward.adapter")
            scorer = AdapterScorer(backbone, roles[-1], micro_batch_tokens)
        parts.append(Part(name, scorer, source))
    return WeightedScorer(parts), roles
