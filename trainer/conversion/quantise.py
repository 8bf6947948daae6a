"""The process that quantises a GGUF: `python -m trainer.conversion.quantise SOURCE OUT TYPE`."""

from __future__ import annotations

import os
import sys

import llama_cpp

from trainer import process

TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main() -> None:
    process.on_parent_death(lambda: os._exit(1))
    source, out, kind = sys.argv[1:4]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = TYPES[kind]
    options.nthread = os.cpu_count() or 1
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), options))


if __name__ == "__main__":
    main()
