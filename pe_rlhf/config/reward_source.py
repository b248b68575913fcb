"""Where the scores of PPO come from: one section for each source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pe_rlhf.config.section import Positive, Rate, Section, refusal
from reward.judges.judge_settings import NamedJudge, wrong_address

KINDS = ("adapter", "ensemble", "model", "function", "url", "judge")
ANCHOR_RESPONSE, OWN_SCORE = "anchor", "score"  # what a judge compares with; else a column of the prompts
OWN_STAGE = ("stage", "reward")  # how a recipe names the ensemble of its own reward stage


class ScoreServer(Section):
    """How a remote scorer is asked."""

    batch_size: Positive = Field(default=64, description="responses in one request")
    concurrency: Positive = Field(default=4, description="requests at the same time")
    timeout: float = Field(default=60.0, gt=0, description="seconds for one request, its answer included")
    attempts: Positive = Field(default=6, description="tries of a request that fails for a temporary reason")
    columns: list[str] = Field(default_factory=list, description="columns of the prompts that are sent too")
    api_key_env: str | None = Field(
        default=None, description="environment variable with a key, sent as `Authorization: Bearer`; default: no key"
    )


class RewardSource(Section):
    """One source of scores: exactly one of adapter, ensemble, model, function, url and judge, with a weight."""

    adapter: str | None = Field(
        default=None, description="a run, or a reward stage's directory; `stage` is this run's own reward stage"
    )
    ensemble: str | None = Field(
        default=None,
        description="several reward adapters, trained by reward.ensemble, as adapter; `reward` is this run's too",
    )
    combine: Literal["mean", "mean_minus_std", "worst", "uwo", "weight_average"] = Field(
        default="mean",
        description="ensemble: mean, mean − k·std, the least, mean − k·variance, or one adapter of the mean weights",
    )
    k: Rate = Field(default=1.0, description="ensemble with mean_minus_std or uwo: weight of the disagreement")
    model: str | None = Field(default=None, description="a sequence-classification model with one label")
    trust_remote_code: bool = Field(default=False, description="model: run the code that comes with it")
    function: str | None = Field(
        default=None,
        description="module:callable that takes (prompts, responses) and columns of the prompts by their names,"
        " and returns scores",
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="function: its further arguments, by name")
    url: str | None = Field(
        default=None, description="a server that scores by the protocol of docs/rewards.md, as `pe-rlhf serve-reward`"
    )
    judge: NamedJudge | None = Field(
        default=None, description="a judge of the project; its max_requests holds over all starts of the run"
    )
    against: str = Field(
        default=ANCHOR_RESPONSE,
        description="judge: what a response is compared with: anchor (the anchor's response to the same prompt), or a"
        " column of the prompts with references; score: nothing, for judges that score; llm rates from 1 to 10",
    )
    server: ScoreServer = Field(default=ScoreServer(), description="url: how it is asked")
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="score only the responses to prompts with these values in their columns, `{source: maths}` for the"
        " part of a mixture; others get 0 from this source; default: all",
    )
    normalise: Literal["none", "running"] = Field(
        default="none",
        description="running: subtract the mean of this source's scores so far and divide by their standard deviation",
    )
    clip: float | None = Field(
        default=None, gt=0, description="clip the scores to ± this, after normalising; default: no limit"
    )
    weight: float = Field(default=1.0, description="weight of these scores, normalised and clipped, in the sum")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z0-9_]*$",
        description="its name in the metrics; default: the function's, or the kind of the source",
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None and (wrong := wrong_address(url)):
            raise refusal("", f"{url!r} {wrong}", "invalid")
        return url

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSource:
        if self.ensemble is None and {"combine", "k"} & self.model_fields_set and (self.combine, self.k) != ("mean", 1):
            raise refusal("combine", "it is for an ensemble", "conflict")
        if sum(getattr(self, kind) is not None for kind in KINDS) != 1:
            raise refusal("", f"name exactly one of {', '.join(KINDS[:-1])} and {KINDS[-1]}")
        return self


def source_names(sources: Sequence[RewardSource]) -> list[str]:
    """The name of each source in the metrics; a second one of the same name ends with _2, and so on."""
    names: list[str] = []
    for source in sources:
        kind = next(kind for kind in KINDS if getattr(source, kind) is not None)
        name = source.name or (source.function or "").rpartition(":")[2] or kind
        taken = (name, *(f"{name}_{i}" for i in range(2, len(sources) + 1)))
        names.append(next(candidate for candidate in taken if candidate not in names))
    return names
