"""What the acceptance checks share: rows of a table, timing, models of real shapes with random weights."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.types import Sequences

# Shapes of Qwen2.5: hidden, inner, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "7B": (3584, 18944, 28, 28, 4, 152064),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "tiny": (128, 256, 2, 4, 2, 512),  # heads of 32: vLLM takes none that are smaller
}


@dataclass
class Row:
    """One line of the table. `ok` is None for a measurement that nothing is expected of."""

    check: str
    what: str
    found: str
    expected: str = ""
    ok: bool | None = None


@dataclass
class Bench:
    """Where the checks run, and what they have found so far."""

    device: torch.device
    quick: bool
    rows: list[Row] = field(default_factory=list)
    peak_tflops: float = 0.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def expect(self, check: str, what: str, found: object, expected: str, ok: bool) -> None:
        self._add(Row(check, what, _short(found), expected, bool(ok)))

    def note(self, check: str, what: str, found: object) -> None:
        self._add(Row(check, what, _short(found)))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        mark = {True: "ok  ", False: "FAIL", None: "    "}[row.ok]
        wanted = f"  (expected {row.expected})" if row.expected else ""
        print(f"{mark} {row.check:10} {row.what}: {row.found}{wanted}", flush=True)

    def as_json(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows]}

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], repeat: int = 3) -> float:
        """Median of some runs after a first one, each waited for."""
        run()
        taken = []
        for _ in range(repeat):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            taken.append(1e3 * (time.perf_counter() - start))
        return statistics.median(taken)

    def free(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()

    def model(self, shape: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> PreTrainedModel:
        """A Qwen2 of that shape with random weights, made on the device."""
        hidden, inner, whole, heads, groups, vocabulary = SHAPES["tiny" if self.quick else shape]
        sizes: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": min(whole, layers or whole),
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "eos_token_id": 2,
        }
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
        finally:
            torch.set_default_dtype(before)

    def backbone(self, shape: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Backbone:
        return load_backbone(self.model(shape, dtype, layers))


def run_checks(about: str | None, name: str, checks_of: Callable[[Bench, Path], dict[str, Callable[[], None]]]) -> None:
    """The command line of a script: run its checks in turn, write OUT/NAME.json, exit with 1 where one has failed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="tiny models, on whatever device there is")
    parser.add_argument("--only", nargs="*", help="names of checks")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        parser.error("there is no GPU here; --quick checks the script itself")
    if args.quick:
        torch.set_num_threads(1)  # more cost more than they give on tiny models
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PE_RLHF_CACHE", str(args.output / "cache"))
    bench = Bench(device, args.quick)
    for check, run in checks_of(bench, args.output).items():
        if args.only and check not in args.only:
            continue
        start = time.perf_counter()
        try:
            run()
        except Exception as error:  # one broken check must not hide the others
            traceback.print_exc()
            bench.expect(check, "ends without an error", f"{type(error).__name__}: {error}"[:300], "no error", False)
        bench.free()
        bench.note(check, "seconds", time.perf_counter() - start)
        report = bench.as_json() | {"quick": args.quick, "device": str(device)}
        (args.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in bench.rows if row.ok is False]
    print(f"\n{len(bench.rows)} rows, {sum(row.ok is True for row in bench.rows)} as expected, {len(failed)} not:")
    for row in failed:
        print(f"  {row.check} {row.what}: {row.found}, expected {row.expected}")
    sys.exit(1 if failed else 0)


def sequences(rows: int, prompt: int, response: int, vocabulary: int) -> Sequences:
    """Rows of random tokens, with nothing in common that could be computed once."""
    ids = torch.randint(3, vocabulary, (rows, prompt + response), generator=torch.Generator().manual_seed(0)).tolist()
    return Sequences.pack([row[:prompt] for row in ids], [row[prompt:] for row in ids], 0)


def move(backbone: Backbone, role: str, size: float = 1e-3) -> None:
    """Move a role's parameters at random, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.role_parameters(role).values():
            parameter.add_(size * torch.randn_like(parameter))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
