"""Runs the functions of this folder with jax, flatbuffers, numpy and safetensors alone.

    python load.py

Each of them is called on the inputs of example.safetensors. Printed is how far its result is from what
was computed when the folder was written: max|a - b| / max|b|.
"""

import json
from pathlib import Path

import numpy as np
from jax import export
from safetensors.numpy import load_file


def main() -> None:
    folder = Path(__file__).parent
    example = load_file(folder / "example.safetensors")
    for name, function in json.loads((folder / "manifest.json").read_text())["functions"].items():
        exported = export.deserialize(bytearray((folder / function["file"]).read_bytes()))
        arguments = [load_file(folder / function["params"])] if function["params"] else []
        arguments += [example[value["example"]] for value in function["inputs"]]
        result, expected = exported.call(*arguments), example[function["output"]["example"]]
        print(name, result.shape, float(np.abs(result - expected).max() / np.abs(expected).max()))


if __name__ == "__main__":
    main()
