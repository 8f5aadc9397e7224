"""Conversion of checkpoints between naming schemes, sizes and file formats, each proved by a comparison of outputs.

`convert.py` reads a source (`weights/`), changes its norm and sizes, writes the result and its record. `architecture.py` (with
`search.py`) finds the model of timm or open_clip that holds the weights. `targets.py` lists the formats, `writers.py` (with
`onnx.py`) writes them. `verify.py` (with `parity.py` and `timm_filters.py`) compares source and result. This file imports no
torch.
"""
