"""What all sections of a recipe share: strictness, ranges, and where data comes from."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from reward.settings import Positive, Section, Share, refusal

__all__ = [
    "FUNCTION_TIMEOUT",
    "TEMPLATE_DATE",
    "Data",
    "DataFile",
    "DataPart",
    "DataSource",
    "Day",
    "Decay",
    "Positive",
    "Rate",
    "Section",
    "Share",
    "refusal",
]

FUNCTION_TIMEOUT: Any = Field(
    default=None,
    gt=0,
    le=1e8,
    description="seconds for one call of a function or judge of yours; then it is given up; default: an hour, or what"
    " the environment variable PE_RLHF_FUNCTION_TIMEOUT says",
)
Day = Annotated[
    str,
    # YAML reads 2026-11-28 as a date.
    BeforeValidator(lambda value: value.isoformat() if isinstance(value, datetime.date) else value),
    AfterValidator(lambda text: datetime.date.fromisoformat(text).isoformat()),
]
TEMPLATE_DATE: Any = Field(
    default=None,
    description="the day that a chat template prints as today's, such as 2026-11-28; default: the day on which the run"
    " starts, which stays its day",
)
Rate = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class DataFile(Section):
    """A data set: a file (json, jsonl, csv, tsv, parquet, arrow, txt), a folder or a hub id; text is its `path`."""

    path: str = Field(
        default="",
        description="a file (also .gz, .bz2, .xz, .zst), a folder of such files or of `save_to_disk`, or a hub id; what"
        " is local is looked for beside the recipe, then in the working directory",
    )
    data_dir: str | None = Field(default=None, description="folder within the data set, such as `helpful-base`")
    format: str | None = Field(
        default=None,
        description="the layout of a known data set: hh_rlhf, helpsteer2, helpsteer3, ultrafeedback,"
        " ultrafeedback_binarized, shp, pku_saferlhf, tldr, nectar, arena, pairwise, openai,"
        " rewardbench2, sharegpt, alpaca, implicit; default: by the columns",
    )
    name: str | None = Field(default=None, description="configuration of a hub data set")
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub data set; default: the newest"
    )
    split: str = Field(default="train", description="the split, or a slice of it: `train[:200]`, `train[10%:]`")
    streaming: bool = Field(
        default=False,
        description="of a hub data set, fetch no more than the split's slice takes, such as `train[:20000]`, instead of"
        " all its files",
    )
    shuffle_buffer: Positive | None = Field(
        default=None,
        description="with streaming: take the rows shuffled, each drawn from a buffer of so many; the same rows in"
        " every run; default: as they come",
    )
    columns: dict[str, str] = Field(default_factory=dict, description="column name here → column name in the data set")

    @model_validator(mode="after")
    def _shuffles_a_stream(self) -> DataFile:
        if self.shuffle_buffer and not self.streaming:
            raise refusal("shuffle_buffer", "it is for streaming; rows that are all there are shuffled in training")
        return self


def _string_is_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class DataPart(DataFile):
    """One data set of a mixture."""

    label: str | None = Field(
        default=None, description="what the column `source` of its rows says; default: the name of the file or data set"
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="its share of the mixture is in proportion to it; default: all rows of all parts",
    )

    @model_validator(mode="after")
    def _is_somewhere(self) -> DataPart:
        if not self.path:
            raise refusal("path", "it is missing", "missing")
        return self

    @property
    def short_name(self) -> str:
        """The name of the file or data set."""
        return Path(self.path).name.partition(".")[0]


class DataSource(DataFile):
    """A data set: a file (json, jsonl, csv, tsv, parquet, arrow, txt), a folder or a hub id; text is its `path`.

    Or a mixture of several, `mix`.
    """

    mix: list[Annotated[DataPart, BeforeValidator(_string_is_path)]] | None = Field(
        default=None, description="several data sets as one, instead of `path`; their rows take turns"
    )
    size: Positive | None = Field(
        default=None,
        description="mix with weights: rows of the mixture; a part that has too few is repeated; default: as many as"
        " there can be without repeating any",
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> DataSource:
        if self.mix is None:
            if self.size is not None:
                raise refusal("size", "it is for a mixture; take rows of one data set by split: train[:100]")
            if not self.path:
                raise refusal("path", "it is missing", "missing")
            return self
        given = {name: getattr(self, name) for name in DataFile.model_fields if name in self.model_fields_set}
        if others := [name for name, value in given.items() if value and (name, value) != ("split", "train")]:
            raise refusal(others[0], "it is for one data set; give it to the parts of mix")
        if not self.mix:
            raise refusal("mix", "there are no data sets in it", "empty")
        for i, part in enumerate(self.mix):
            if not part.label and any(part.short_name == (other.label or other.short_name) for other in self.mix[:i]):
                raise refusal(f"mix.{i}.label", f"two parts are called {part.short_name!r}; give each a label")
        weighted = [part.weight is not None for part in self.mix]
        if any(weighted) != all(weighted):
            raise refusal(f"mix.{weighted.index(False)}.weight", "give each part a weight, or no part", "missing")
        if self.size is not None and not any(weighted):
            raise refusal("size", "it needs weights", "missing")
        return self

    @property
    def title(self) -> str:
        """What errors call it."""
        return self.path if self.mix is None else " + ".join(part.path for part in self.mix)


Data = Annotated[DataSource, BeforeValidator(_string_is_path)]
