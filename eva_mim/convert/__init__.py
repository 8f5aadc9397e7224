"""Checkpoints between naming schemes, grids and file formats.

On plain state dicts, without files and side effects: `families.py` (with `layout.py`) says what a checkpoint is, `keys.py` lists
the names, `names.py` and `openai.py` rename, `tables.py` computes the buffers that only the original code stores, `resize.py`
fits weights to other grids and patch sizes.

On files that nobody trusts: `reading.py` opens a checkpoint of any kind lazily (`formats.py`, `pickles.py` and `known.py`,
`tensors.py`; `zero.py` for DeepSpeed's shards), and nothing in a file is ever called; `inspect.py` is `eva-mim inspect`. This
file stays light: no torch.
"""
