"""What all sections of a recipe share: strictness, ranges, and where data comes from."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from reward.settings import Positive, Section, Share, refusal

__all__ = [
    "FUNCTION_TIMEOUT",
    "TEMPLATE_DATE",
    "Data",
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


class DataSource(Section):
    """A data set: a local file (json, jsonl, jsonl.gz, parquet, csv, txt), a folder or a hub id; text is its `path`."""

    path: str = Field(
        description="a file, a folder of such files or of `save_to_disk`, or a hub id; what is local is looked for"
        " beside the recipe, then in the working directory"
    )
    data_dir: str | None = Field(default=None, description="folder within the data set, such as `helpful-base`")
    format: str | None = Field(
        default=None,
        description="the layout of a known data set: hh_rlhf, helpsteer2, helpsteer3, ultrafeedback,"
        " ultrafeedback_binarized, shp, pku_saferlhf, tldr, nectar, arena, sharegpt, alpaca, implicit; default: by the"
        " columns",
    )
    name: str | None = Field(default=None, description="configuration of a hub data set")
    split: str = Field(default="train", description="the split, or a slice of it: `train[:200]`, `train[10%:]`")
    columns: dict[str, str] = Field(default_factory=dict, description="column name here → column name in the data set")


def _string_is_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Data = Annotated[DataSource, BeforeValidator(_string_is_path)]
