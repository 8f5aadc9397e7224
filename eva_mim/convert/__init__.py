"""Checkpoints between naming schemes, sizes and file formats.

On plain state dicts, without files and side effects: `families.py` (with `layout.py`) says what a checkpoint is, `keys.py` lists
the names, `names.py`, `openai.py` and `huggingface.py` rename, `tables.py` computes the buffers that only the original code
stores, `resize.py` fits weights to other grids and patch sizes.

On files that nobody trusts: `reading.py` opens a checkpoint of any kind lazily (`formats.py`, `pickles.py`, `known.py`,
`torchscript.py`, `tensors.py`; `zero.py` for DeepSpeed's shards), `describe.py` reads what lies beside it, `deferred.py` keeps
its tensors on the disk, `source.py` puts it under our names. Nothing in a file is ever called.

From there to a result: `architecture.py` (with `told.py`, `candidates.py`) finds the model, `convert.py` changes it,
`targets.py` lists the formats, `writers.py` (with `writing.py`, `onnx.py`) writes them, `proof.py` (with `parity.py`,
`originals.py`) proves the result. `command.py` and `inspect.py` are the commands. This file stays light: no torch.
"""
