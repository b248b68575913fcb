"""Writing files so that a full disk or a kill leaves the old one."""

from pathlib import Path

from pe_rlhf.processes import is_main


def write_whole(path: Path, text: str) -> None:
    """Write a text file, on rank 0; until the new one is whole, the old one is there."""
    if not is_main():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
