"""The page of `pe-rlhf inspect`: what each adapter would do before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pe_rlhf.report.charts import Line, draw_lines, draw_matrix
from pe_rlhf.report.format import number
from pe_rlhf.report.page import Page, PageSection, Plot, Table

Row = dict[str, Any]

COLUMNS = {
    "norm_A": "‖A‖",
    "norm_B": "‖B‖",
    "product": "‖s·B·A‖/‖W‖",
    "position": "position",
    "cosine": "cosine with G",
    "best": "best of rank 2r",
    "kernel_error": "kernel error",
    "kernel_alignment": "kernel alignment",
}
NOTE = (
    "Position: where A's rows are in the weight's spectrum, 0 at the greatest singular value, 1 at the least. Cosine:"
    " between the weight's change in the first step of SGD, s²(B·Bᵀ·G + G·Aᵀ·A) of a LoRA, and the full gradient G. The"
    " best of rank 2r bounds adapters that have the form of a LoRA. Kernel error: ‖K − K_full‖/‖K_full‖;"
    " alignment: their cosine as long vectors."
)


def inspect_page(metrics: Row, name: str, subtitle: str) -> str:
    """The page, from `Inspection.as_json()`: per init its totals, its layers and its kernel."""
    inits = metrics["inits"]
    kernels = [draw_matrix("Kernel: full model", metrics["kernel"], "sample")]
    return Page(
        title=f"{name}: adapters before training",
        kind="inspect",
        subtitle=subtitle,
        sections=[
            PageSection("All layers", tables=[_table("init", inits, COLUMNS, NOTE)]),
            PageSection("The first step, layer by layer", plots=[p for p in map(_cosines, inits) if p]),
            PageSection(
                "Neural tangent kernels",
                plots=kernels + [draw_matrix(f"Kernel: {i['init']}", i["kernel"], "sample") for i in inits],
            ),
            *(
                PageSection(f"Layers: {init['init']}", tables=[_table("layer", init["layers"], COLUMNS)], folded=True)
                for init in inits
            ),
        ],
    ).html()


def _table(first: str, rows: Sequence[Row], columns: dict[str, str], note: str = "") -> Table:
    """A row per init or layer; columns that no row has are left out."""
    there = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    cells = [(row[first], *(number(row.get(key)) for key in there)) for row in rows]
    return Table([first, *there.values()], cells, note=note, scrolls=True)


def _cosines(init: Row) -> Plot | None:
    """How well the first step follows the gradient, layer by layer, beside the best that rank 2r allows."""
    places = range(len(init["layers"]))
    lines = [Line(init["init"], places, [row["cosine"] for row in init["layers"]])]
    if init["best"] is not None:
        lines.insert(0, Line("best of rank 2r", places, [row["best"] for row in init["layers"]]))
    return draw_lines(f"First step: {init['init']}", "cosine with G", lines, x_label="layer")
