"""AWQ's input scales, searched by nvidia-modelopt (awq_lite, arXiv 2306.00978) on the CPU."""

import contextlib
import copy
import io
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from edgellm.calib.recipe import Progress

ALPHA_STEP: Final = 0.2
"""Scales are (mean |x|)^alpha / (mean |w|)^(1 - alpha) with alpha in 0, 0.2, ... 1, the best per linear."""
_PASSES: Final = 2


def search_input_scales(
    model: torch.nn.Module, group_sizes: Mapping[str, int], windows: torch.Tensor, progress: Progress
) -> dict[str, torch.Tensor]:
    """Input scales (modelopt's pre_quant_scale, float32 [in_features]) of the modules in `group_sizes`, which gives the
    number of input channels that share a weight scale. `model` is left as it was; windows int64 [count, tokens].

    modelopt calls the model twice, for mean |x| and for the search. All windows go through in one batch, because the
    search quantises every weight anew for each batch and alpha.
    """
    if not group_sizes:
        return {}
    steps = itertools.count(1)
    stdout = sys.stdout

    def forward_loop(quantized: torch.nn.Module) -> None:
        quantized(windows, use_cache=False, logits_to_keep=1)
        with contextlib.redirect_stdout(stdout):
            progress("AWQ search", next(steps), _PASSES)

    progress("AWQ search", 0, _PASSES)
    with _quiet():
        import modelopt.torch.quantization as mtq

        quantized = mtq.quantize(copy.deepcopy(model), _config(mtq.INT4_AWQ_CFG, group_sizes), forward_loop)
    modules = dict(quantized.named_modules())
    return {name: modules[name].input_quantizer.pre_quant_scale.float() for name in group_sizes}


def _config(preset: Mapping[str, Any], group_sizes: Mapping[str, int]) -> dict[str, Any]:
    """The preset for our linears alone, each with its own group size."""
    linears = [
        {
            "quantizer_name": f"{name}.weight_quantizer",
            "cfg": {"num_bits": 4, "block_sizes": {-1: group_size, "type": "static"}},
            "enable": True,
        }
        for name, group_size in group_sizes.items()
    ]
    everything_off = {"quantizer_name": "*", "enable": False}
    algorithm = {"method": "awq_lite", "alpha_step": ALPHA_STEP}
    return {**preset, "quant_cfg": [everything_off, *linears], "algorithm": algorithm}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """modelopt prints what it does and warns of optional packages that it does not find; neither concerns a user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
