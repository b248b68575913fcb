"""What all settings share, in a recipe and on the command line: unknown keys, NaN and infinity are errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from reward.errors import Kind

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def refusal(key: str, message: str, kind: Kind = "conflict") -> PydanticCustomError:
    """What a validator raises: a section's for one of its keys, a field's for "", since pydantic adds the field's key.

    The error that users see has key and kind.
    """
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
