"""A base that ZeRO-3 has split over two ranks: its dtype, its numbers, and that passes fetch weights ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.distributed.launching import script_on_ranks

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

PASSES = """
import json, sys
from functools import partial
import torch
from pe_rlhf.adapters.gradients import Probe, ProbedStatistics, _groups
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.optim.zero import import_deepspeed, init_processes, shard_base
from pe_rlhf.system.distributed import gathered, leave_group
from tests.model_types import build
from tests.tiny import perturb, ragged_sequences, tiny_model

dtype, form = getattr(torch, sys.argv[1]), sys.argv[2]
init_processes(True)

def model():
    if form == "experts":
        return build("mixtral").to(dtype)
    return tiny_model("llama", dtype, num_hidden_layers=4, tie_word_embeddings=form == "tied")

whole, split = load_backbone(model()), load_backbone(model())
# In proportion to a model of this size, where the defaults are for billions of weights.
zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2000}
zero |= {"stage3_max_reuse_distance": 1, "stage3_max_live_parameters": 9000}
shard_base(split.model, {"zero_optimization": zero}, torch.device("cpu"))
for backbone in (whole, split):
    for role in ("policy", "value"):
        backbone.add_adapter(role, init="pissa", rank=3, alpha=6)
        perturb(backbone, role)

import_deepspeed()
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
late, fetch = [], Coordinator.fetch_sub_module

def noted(self, module, forward):
    late.extend(p for p in module.parameters(recurse=False) if p.ds_status.name == "NOT_AVAILABLE")
    return fetch(self, module, forward)

Coordinator.fetch_sub_module = noted
rows, found = ragged_sequences(), {"late": [], "same": True}

def one_pass(role, gradient, logits=False):
    late.clear()
    results = []
    for backbone in (whole, split):
        with backbone.role(role), torch.set_grad_enabled(gradient):
            if logits:
                numbers = backbone(rows.ids_BT).logits
            else:
                numbers = backbone.response_values(rows) if role == "value" else backbone.response_logprobs(rows)[0]
        gradients = []
        if gradient:
            parameters = [p for n, p in backbone.role_parameters(role).items() if "head" not in n]
            gradients = torch.autograd.grad(numbers.sum(), parameters)
        results.append([numbers.detach(), *gradients])
    found["same"] &= all(map(torch.equal, *results))
    found["late"].append(len(late))

split.heads["value"].weight.data.fill_(0.1); whole.heads["value"].weight.data.fill_(0.1)
for role in ("anchor", "policy", "value"):
    one_pass(role, False)
for _ in range(2):
    for role in ("policy", "value"):
        one_pass(role, True)
for role in ("anchor", "policy", "value"):
    one_pass(role, False)
one_pass("policy", False, logits=True)
with gathered(split.model.get_output_embeddings()):
    found["same"] &= torch.equal(split.model.lm_head.weight, whole.model.lm_head.weight)
base = [p for p in split.model.parameters() if hasattr(p, "ds_id")]
found["weights"] = len({id(p) for p in split.model.model.parameters() if hasattr(p, "ds_id")})
found["kept"] = sum(p.numel() for p in base)  # what is whole when no pass is running
found["base"] = sorted({str(p.ds_tensor.dtype) for p in base})
found["trained"] = sorted({str(p.dtype) for p in split.role_parameters("policy").values()})
def statistics(backbone, parts):
    def loss(part):
        states = decoder_of(backbone.model)(input_ids=rows.ids_BT[part], use_cache=False).last_hidden_state
        return states[..., :3].float().square().sum()

    mask_BT, batch_B = torch.arange(rows.ids_BT.shape[1]) < rows.lengths_B[:, None], torch.arange(len(rows)) % 2
    probes = [Probe(partial(loss, part), mask_BT[part], batch_B[part]) for part in parts]
    return ProbedStatistics(backbone.base_layer, lambda need: probes)

whole_batch, halves = [slice(None)], [slice(0, 2), slice(2, None)]  # of halves, gradients are summed group by group
cases = (("lora", "cross_task", whole_batch), ("lora", "corda", halves), ("rosa", "lora", halves))
for kind, init, parts in cases if form != "experts" else ():
    states, groups = [], []
    for backbone in (whole, split):
        layers = {name: backbone.base_layer(name) for name in backbone.role_layers("policy")}
        groups.append([list(group) for group in _groups(layers, "inputs" if init == "corda" else "gradient")])
        given = {"kind": kind, "init": init, "rank": 3, "targets": ["q_proj", "down_proj"]}
        backbone.add_adapter(f"{kind}_{init}", statistics=statistics(backbone, parts), **given)
        states.append(backbone.role_state(f"{kind}_{init}"))
    found["same"] &= all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    found["same"] &= groups[0] == groups[1] and len(groups[0]) > 10  # as many layers at a time
one_pass("policy", True)
found["kept"] += sum(p.numel() for p in base)
print(json.dumps(found))
leave_group()
"""


@pytest.mark.parametrize(("dtype", "form"), [("bfloat16", "own"), ("float32", "tied"), ("bfloat16", "experts")])
def test_a_split_base_keeps_its_dtype_and_numbers_and_is_fetched_ahead(tmp_path: Path, dtype: str, form: str) -> None:
    """The head has weights of its own or the embeddings'; or the adapters are on fused experts, too."""
    for found in script_on_ranks(PASSES, tmp_path, dtype, form):
        # As with the whole base, to the bit: log-probs, values, gradients, logits; factors and masks from statistics.
        assert found["same"]
        assert (found["base"], found["trained"]) == ([f"torch.{dtype}"], ["torch.float32"])
        assert found["kept"] == 0
        # The first pass comes to every weight before it is asked for.
        assert found["late"][0] == found["weights"]
        if form == "experts":
            continue  # two blocks are too few to run ahead in
        # Once a pass with a gradient was recorded, those of its turning point are late at most, whatever role it plays.
        with_gradient, without = found["late"][5:7], found["late"][7:11]
        assert max(with_gradient) <= found["weights"] / 3, found["late"]
        assert max(without) <= 2, found["late"]
