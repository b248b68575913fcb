from pathlib import Path

import pytest

from pe_rlhf.config import BackboneConfig, RolloutConfig
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.make import make_rollout
from tests.stage_support import byte_model


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("stop", [[], ["."]])
def test_a_model_without_a_token_that_ends_a_response_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: bool, stop: list[str]
) -> None:
    backbone = load_backbone(str(byte_model(tmp_path / "model", pad_is_eos=False)))
    assert backbone.eos_token_ids == [0]
    backbone.eos_token_ids = [0] if ends else []
    config, log = RolloutConfig(stop=stop), tmp_path / "log"
    make_rollout(backbone, "anchor", config, BackboneConfig(), folder=tmp_path, log=log, longest_prompt=4).close()
    assert ("eos_token_id" in capsys.readouterr().err) == (not ends and not stop)
