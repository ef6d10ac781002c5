"""Tensors of files as others publish them: safetensors, PyTorch pickles, folders of either (shards together).

For the small networks of evaluation, which are held in memory; `convert` streams the large ones.
"""

import json
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model", "module")  # what training scripts put around


def read_tensors(path) -> dict[str, np.ndarray]:
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        if not files:
            raise UserError(f"{path} holds no weights: wanted .safetensors or {', '.join(PICKLES)}")
        return {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return _read_pickle(path) if path.suffix in PICKLES else _read_safetensors(path)


def read_config(path) -> dict:
    """config.json of a folder, or nothing."""
    file = Path(path) / "config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download it again") from None


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: pip install torch, or give a .safetensors file"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({reason})") from None
    while not any(hasattr(value, "numpy") for value in loaded.values()):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            raise UserError(f"{path} holds no tensors, only {', '.join(map(str, list(loaded)[:5]))}")
        loaded = inner
    tensors = {name: value for name, value in loaded.items() if hasattr(value, "numpy")}
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}
