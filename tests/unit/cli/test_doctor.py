"""`pe-rlhf doctor` and `--version`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import pytest
import torch

import pe_rlhf
from tests.runs import Outcome

Cli = Callable[..., Outcome]
EXTRAS = ("vllm", "deepspeed", "bitsandbytes", "vaderSentiment", "tensorboard", "wandb")


def lines(outcome: Outcome) -> dict[str, str]:
    """What is said of each name."""
    assert outcome.code == 0
    return {line.split()[0]: line for line in outcome.out.splitlines() if line.startswith("  ")}


def test_versions_devices_and_extras(cli: Cli) -> None:
    said = lines(cli("doctor"))
    assert said["torch"].split()[1] == torch.__version__
    assert said["transformers"].split()[1] == importlib.metadata.version("transformers")
    assert f"{torch.get_num_threads()} threads" in said["cpu"]
    for name in EXTRAS:
        assert ("missing" in said[name].split()) == (importlib.util.find_spec(name) is None)


def test_what_is_missing_says_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in EXTRAS else find(name))
    said = lines(cli("doctor"))
    declared = importlib.metadata.metadata("pe-rlhf").get_all("Provides-Extra") or []
    for name in EXTRAS:
        assert "missing" in said[name].split()
        extra = said[name].partition("pip install 'pe-rlhf[")[2].partition("]'")[0]
        assert extra in declared


def test_a_build_for_another_torch_is_warned_of(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1" if name == "torchaudio" else version(name))
    assert "pip uninstall torchaudio" in cli("doctor").out


def test_the_version(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.code, outcome.out) == (0, f"pe-rlhf {pe_rlhf.__version__}\n")
    assert pe_rlhf.__version__ == importlib.metadata.version("pe-rlhf")
