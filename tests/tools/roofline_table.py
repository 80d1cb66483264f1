"""Prints the table of least times in jaxpar/measure/README.md: `python tests/tools/roofline_table.py [--only WORD]`.

Each row is one `jaxpar compile`, which takes half a minute. No GPU is needed, only the packages of `.[compile]`.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_RECOMPUTE = [f"actor.model.recompute_{key}=null" for key in ("granularity", "method", "num_layers")]
FULL_RECOMPUTE = [
    "actor.model.recompute_granularity=full", "actor.model.recompute_method=uniform", "actor.model.recompute_num_layers=1",
]  # fmt: skip
EIGHT_B, LONG, MILLION = "llama3_8b_1node_8k.yaml", "llama3_8b_1node_128k.yaml", "llama3_8b_8nodes_1m.yaml"
SEVENTY_B = "llama3_70b_16nodes_8k.yaml"
INTERLEAVED = ["actor.model.pipeline_schedule=interleaved_1f1b", "actor.model.virtual_pipeline_model_parallel_size=4"]
ACROSS = ["data.reset_attention_mask=false"]

# label → arguments of `jaxpar compile`
ROWS = {
    "8B on 8, as shipped (SP 4, no recompute)": [EIGHT_B],
    "the same, `tp_comm_overlap`": [EIGHT_B, "actor.model.tp_comm_overlap=true"],
    "the same, full recompute": [EIGHT_B, *FULL_RECOMPUTE],
    "the same, full recompute, `tp_comm_overlap`": [EIGHT_B, *FULL_RECOMPUTE, "actor.model.tp_comm_overlap=true"],
    "dp 8, ZeRO-3, full recompute": [EIGHT_B, "dp8,zero=3", *FULL_RECOMPUTE],
    "dp 8, ZeRO-3, no recompute": [EIGHT_B, "dp8,zero=3"],
    "the same, across documents (cuDNN)": [EIGHT_B, "dp8,zero=3", *ACROSS],
    "the same, gradients leave in bf16": [EIGHT_B, "dp8,zero=3", "actor.optim.grad_reduce_dtype=bf16"],
    "131,072 tokens on 8": [LONG],
    "1,048,576 tokens on 64": [MILLION],
    "70B on 128, as shipped": [SEVENTY_B],
    "70B on 128, interleaved, 4 chunks, no recompute": [SEVENTY_B, *INTERLEAVED, *NO_RECOMPUTE],
}


def row(arguments: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        config, *rest = arguments
        command = [Path(sys.executable).parent / "jaxpar", "compile", ROOT / "configs" / config, *rest, "--json", file]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            return result.stderr.strip().splitlines()[-1]
        report = json.loads(file.read_text())
    found, memory = report["roofline"], report["memory"]
    other = sum(w["bytes"] for w in found["by_kind"] if w["kind"] in ("copies", "other kernels"))
    exposed, links = found["exposed"], found["links"]
    cells = [
        f"{found['chip_seconds']:.2f}",
        f"{exposed['nvlink']:.2f} of {links['nvlink']:.2f}",
        f"{exposed['network']:.2f} of {links['network']:.2f}",
        f"{found['launches']:,.0f}",
        f"{other / 1e9:,.0f}",
        f"{report['flops'] / report['model_flops']:.2f}",
        f"{memory['peak'] / 1e9:.1f}",
        f"{found['mfu_at_most']:.0%}",
    ]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose label contains this")
    only = parser.parse_args().only
    print(f"jax {importlib.metadata.version('jax')}, tokamax {importlib.metadata.version('tokamax')}\n")
    head = (
        "", "least s on the chip", "NVLink s exposed", "network s exposed", "launches",
        "GB outside products and attention", "executed / useful", "peak GB", "MFU at most",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for label, arguments in ROWS.items():
        if only in label:
            print(f"| {label} | {row(arguments)} |", flush=True)


if __name__ == "__main__":
    main()
