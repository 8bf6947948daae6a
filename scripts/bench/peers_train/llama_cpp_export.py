"""llama.cpp's own way to a quantised GGUF, a step a process: the peer of scripts/bench/export.

    python llama_cpp_export.py convert LLAMA_CPP MODEL OUT
    python llama_cpp_export.py quantise SOURCE OUT q8_0|q4_k_m

`convert` is convert_hf_to_gguf.py as it is, but for one answer: it refuses a freshly trained tokenizer, so it
is told that this one splits text as Llama 3's. `quantise` is llama.cpp's function called plainly, which is all
that its program `llama-quantize` does; the program itself does not come with llama-cpp-python.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def convert(llama_cpp: Path, model: str, out: str) -> None:
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]  # llama.cpp's, found at run time

    TextModel.get_vocab_base_pre = lambda *_: "llama-bpe"
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "f16", "--outfile", out]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


def quantise(source: str, out: str, kind: str) -> int:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = {
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }[kind]
    return int(llama_cpp.llama_model_quantize(source.encode(), out.encode(), options))


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), *sys.argv[3:5])
    else:
        sys.exit(quantise(*sys.argv[2:5]))
