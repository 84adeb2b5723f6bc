"""optimum-intel: `openvino_converter.py HF_FOLDER OUTPUT int4|half GROUP_SIZE TOKENIZER_GGUF`.

int4: symmetric, all layers but embedding and head, which get 8 bits, as optimum-intel does of itself. half: fp16
weights, which the CPU plugin multiplies in bf16 where the machine can.
"""

import sys

from optimum.exporters.openvino.convert import export_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer


def main() -> None:
    source, output, precision, group_size = sys.argv[1:5]
    is_int4 = precision == "int4"
    config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=int(group_size), ratio=1.0) if is_int4 else None
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, load_in_8bit=False, quantization_config=config, local_files_only=True
    )
    if not is_int4:
        model.half()
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.save_pretrained(output)
    export_tokenizer(tokenizer, output)


main()
