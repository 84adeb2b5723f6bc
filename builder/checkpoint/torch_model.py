"""The same checkpoint as `transformers` loads it; PyTorch is imported only when it is asked for."""

from pathlib import Path
from typing import Any


def load_causal_lm(folder: Path, **options: Any) -> Any:
    """The model of a local folder in float32 and eval mode, loaded without progress bars: the caller draws its own."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options).eval()
