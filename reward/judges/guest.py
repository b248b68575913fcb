"""Judges that give the memory of a GPU back between questions: others need it meanwhile, above all a PPO step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class Guest:
    """A model that is on its device while it is asked, and otherwise in the CPU's memory."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device

    def come(self) -> None:
        self._model.to(self._device)

    def rest(self) -> None:
        if self._device.type != "cpu":
            import torch  # here: what asks judges imports this file, and is imported to show a page

            self._model.to("cpu")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what torch keeps for itself is missing to an engine on the same card


def rest(judge: object) -> None:
    """Let a judge give back what it has on a GPU until it is asked again, where it can (`rest`)."""
    if callable(method := getattr(judge, "rest", None)):
        method()
