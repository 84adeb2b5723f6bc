"""A checkpoint as a `transformers` model in float32 and eval mode; PyTorch is imported only when one is asked for.

Nothing here shows progress bars: the caller draws its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgellm.builder.models.config import RawConfig
from edgellm.engines.weights import FloatArray


def load_folder(folder: Path) -> Any:
    """The model of a local Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_tensors(raw_config: RawConfig, read: Callable[[str], FloatArray]) -> Any:
    """The model of a config and of tensors by their Hugging Face names."""
    import torch
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = transformers.AutoConfig.for_model(**raw_config)
    model_class = getattr(transformers, raw_config["architectures"][0])
    with torch.device("meta"):
        empty = model_class(config)
    tied = set(empty.all_tied_weights_keys)
    weights = {name: torch.from_numpy(read(name)) for name in empty.state_dict() if name not in tied}
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()
