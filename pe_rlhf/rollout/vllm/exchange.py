"""Handing weights to an engine in another process, by a folder with the versions that an engine still needs."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from pe_rlhf.model.backbone import Backbone

SHARD_BYTES = 2 << 30
MEMORY_FOLDER = Path("/dev/shm")


class WeightExchange:
    """A folder of this process, which nobody else can read, with one sub-folder per version of the weights.

    In a parent with the setgid bit its group can read it.

    Removes folders that killed processes of this machine left behind.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        prefix = f"pe-rlhf-{socket.gethostname()}-"
        for left in parent.glob(f"{prefix}*"):
            if not _alive(left.name.removeprefix(prefix).split("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent)).resolve()
        if parent.stat().st_mode & stat.S_ISGID:  # a server may run as another user of that group
            self.folder.chmod(0o2750)

    def put_adapter(self, backbone: Backbone, role: str, name: str, rank: int) -> Path:
        """Write a role as a PEFT LoRA of that rank."""
        path = self.folder / name
        backbone.export_adapter(role, path, rank=rank)
        return path

    def put_merged(self, backbone: Backbone, role: str, name: str) -> Path:
        """Write `W0 + ΔW` of a role as a safetensors checkpoint, in files of about 2 GiB.

        Under the names that checkpoints have, which vLLM knows: transformers fuses experts when it loads a model.
        """
        path = self.folder / name
        path.mkdir()
        shard: dict[str, Tensor] = {}
        number, size = 0, 0

        def write() -> None:
            named = revert_weight_conversion(backbone.model, shard)
            whole = {key: tensor.contiguous() for key, tensor in named.items()}
            save_file(whole, path / f"model-{number:05d}.safetensors")

        for key, tensor in backbone.merged_tensors(role):
            if shard and size + tensor.nbytes > SHARD_BYTES:
                write()
                shard, number, size = {}, number + 1, 0
            shard[key] = tensor.detach().cpu()
            size += tensor.nbytes
        write()
        return path

    def drop(self, name: str) -> None:
        """Remove a version that no engine needs."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def memory_backed(size: int, otherwise: Path) -> Path:
    """A folder in memory (/dev/shm) with room for `size` bytes, `otherwise` another one."""
    if MEMORY_FOLDER.is_dir() and os.access(MEMORY_FOLDER, os.W_OK):
        return MEMORY_FOLDER if shutil.disk_usage(MEMORY_FOLDER).free > size * 1.1 else otherwise
    return otherwise


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        return True
    return True
