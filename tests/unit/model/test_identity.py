"""The base's identity is kept by its files: it is taken once for the same files, and anew for others."""

import shutil
from pathlib import Path

import pytest

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.system.cache import cache_dir


def test_it_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = resolve_model("random:tiny-llama"), tmp_path / "model"
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(source, folder)
    first = load_backbone(folder)
    assert first.anchor_sha256 == first.base_fingerprint()
    (kept,) = (cache_dir() / "fingerprints").iterdir()
    kept.write_text("kept")
    assert load_backbone(folder).anchor_sha256 == "kept"
    narrow = load_backbone(folder, dtype="bfloat16")
    assert narrow.anchor_sha256 == narrow.base_fingerprint()
    first.model.get_input_embeddings().weight.data[0, 0] += 1  # type: ignore[operator, index]
    first.model.save_pretrained(folder)  # a file of the same size
    changed = load_backbone(folder)
    assert changed.anchor_sha256 == changed.base_fingerprint() == first.base_fingerprint()
