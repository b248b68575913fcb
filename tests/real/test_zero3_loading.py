"""ZeRO-3 splits a base while it is loaded: no rank ever has all of it in memory of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.names import resolve_model
from tests.integration.distributed.launching import script_on_ranks

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

# Pages of the checkpoint's file are shared by all ranks and can be dropped: what counts is RssAnon.
LOADS = """
import json, pathlib, re, sys, threading, time
import torch
from pe_rlhf.config.load import make_recipe
from pe_rlhf.optim.zero import init_processes
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.distributed import leave_group

def own_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

init_processes(True)
folder = pathlib.Path(sys.argv[1])
tree = {"name": "x", "model": sys.argv[2], "deepspeed": "all_split.json", "reward": {"data": "p.jsonl"}}
context = StageContext(make_recipe(tree, folder / "x.yaml"), folder, "reward")
torch.ones(1).sum()
before, peak, done = own_mib(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], own_mib())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
backbone = context.backbone()
done.set(); thread.join()
sizes = [p.ds_numel * p.element_size() / 2**20 for p in backbone.model.parameters()]
found = {"peak": peak[0] - before, "base": sum(sizes), "largest": max(sizes)}
print(json.dumps(found))
leave_group()
"""
OVERHEAD = 64  # MiB: DeepSpeed's buffers, the allocator's gaps


def test_a_rank_has_its_share_and_one_layer(tmp_path: Path, smollm2: Backbone) -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "all_split.json").write_text(json.dumps(config))
    for found in script_on_ranks(LOADS, tmp_path, str(tmp_path), resolve_model(smollm2.name)):
        assert found["base"] > 500
        assert found["peak"] <= found["base"] / 2 + found["largest"] + OVERHEAD, found
