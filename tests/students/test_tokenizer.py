"""Token ids of a CLIP student against the original tokeniser's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.clip import ClipStudent
from tests.students.golden import load


@pytest.mark.parametrize("length", [77, 16])
def test_texts_become_the_ids_of_the_original_code(shared: Path, length: int) -> None:
    """A shorter context cuts a long text and keeps the end token, and changes nothing else."""
    golden, facts = load(shared, "tokenizer")
    student = ClipStudent(ClipSettings(name="vit_nano_patch4_32", text=TextSettings(context_length=length)))
    made = student.tokenizer()(facts["texts"])
    for ids, expected in zip(made, golden["out/tokens"], strict=True):
        used = int(expected.argmax()) + 1
        wanted = expected[:length].clone()
        if used > length:
            wanted[-1] = expected.max()
        assert torch.equal(ids, wanted.to(ids.dtype))
