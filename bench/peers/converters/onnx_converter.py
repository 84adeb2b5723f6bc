"""onnxruntime-genai's model builder: `onnx_converter.py HF_FOLDER OUTPUT int4|half GROUP_SIZE TOKENIZER_GGUF`.

int4: activations in 8 bits (accuracy level 4), which is its fastest on CPUs.
"""

import subprocess
import sys
import tempfile


def main() -> None:
    source, output, precision, group_size = sys.argv[1:5]
    if precision != "int4":
        raise SystemExit("the CPU provider has no half-precision models")
    options = ["int4_accuracy_level=4", f"int4_block_size={group_size}"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    with tempfile.TemporaryDirectory() as cache:
        paths = ["--input", source, "--output", output, "--cache_dir", cache]
        subprocess.run([*builder, *paths, "-p", "int4", "-e", "cpu", "--extra_options", *options], check=True)


main()
