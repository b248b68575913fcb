"""What all sections of a recipe share: strictness, ranges, and where data comes from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from reward.errors import Kind

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def refusal(key: str, message: str, kind: Kind = "conflict") -> PydanticCustomError:
    """What a validator of a section raises for one of its keys; `explain.py` reads key and kind."""
    return PydanticCustomError("refusal", "{message}", {"key": key, "message": message, "kind": kind})


class Section(BaseModel):
    """A part of a recipe. Unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and pydantic with it, would take `steps: yes` for one step."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"input should not be {str(value).lower()}")
        return value


class DataSource(Section):
    """A data set: a local file (json, jsonl, jsonl.gz, parquet, csv, txt) or a hub id. A plain string is its `path`."""

    path: str = Field(
        description="a file or a hub id; a file is looked for beside the recipe, then in the working directory"
    )
    name: str | None = Field(default=None, description="configuration of a hub data set")
    split: str = Field(default="train", description="the split, or a slice of it: `train[:200]`, `train[10%:]`")
    columns: dict[str, str] = Field(default_factory=dict, description="column name here → column name in the data set")


def _string_is_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Data = Annotated[DataSource, BeforeValidator(_string_is_path)]
