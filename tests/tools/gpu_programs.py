"""Compiles one config with several settings for a GPU, in one process, which takes less time than `jaxpar compile` for each.

    python tests/tools/gpu_programs.py GPU CONFIG FOLDER SETTINGS...

Each of SETTINGS is a list of KEY=VALUE separated by spaces. The optimized program of the n-th is FOLDER/n.hlo. The last line
of the output is JSON: for each, what computes its attention → why.
"""

import json
import os
import sys
from pathlib import Path

from jaxpar.config import load_config
from jaxpar.run import xla


def main(gpu: str, path: str, folder: str, *settings: str) -> None:
    xla.apply_without_gpu({})
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxpar.measure.compile import compile_train_step, devices_to_compile_for
    from jaxpar.program import Program

    choices = []
    for number, text in enumerate(settings):
        config = load_config(path, text.split())
        program = Program(config, devices_to_compile_for(config, gpu, None)[0])
        compiled, _ = compile_train_step(program)
        (Path(folder) / f"{number}.hlo").write_text(compiled.as_text() or "")
        choices.append(program.attention_choices)
    print(json.dumps(choices))


main(*sys.argv[1:])
