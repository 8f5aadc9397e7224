"""Token ids of a CLIP student against the original tokeniser's."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.clip import ClipStudent, token_counts
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


def test_counts_are_those_of_the_ids_of_open_clip() -> None:
    """With start and end, and not those of what is cut away."""
    texts = ["", "a photo", "an unusually-hyphenated, punctuated caption!", "word " * 100]
    ids = open_clip.SimpleTokenizer(context_length=200)(texts)
    assert token_counts(texts) == (ids != 0).sum(1).tolist()
    assert token_counts(["word " * 100]) == [102]
