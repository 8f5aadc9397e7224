"""Videos of video files, frames and drawings: which frames are read, by written tables and by the frames' shades; bad files."""

from __future__ import annotations

import io
import random
import re
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from eva_mim.core.contracts import Video
from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.loader import EvalLoader
from eva_mim.data.preparation import VideoPreparation
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.scenes import DIRECTIONS, SceneSource
from eva_mim.data.sources.videos import DecodedFrames, VideoFile
from eva_mim.data.splits import open_splits
from eva_mim.data.video_views import FrameChoice, VideoEvalView, VideoTrainView
from eva_mim.data.view_settings import VideoViewSettings
from tests.conftest import picture, png, write_tar


def grey(number: int) -> int:
    """The shade of a frame, far enough from the next one's to survive a lossy codec."""
    return 12 + 6 * (number % 40)


def encoded(frames: int, *, size: tuple[int, int] = (64, 48), times: list[int] | None = None, form: str = "mp4") -> bytes:
    """A file whose frame i has the shade grey(i), with B-frames, a key frame every 12, and `times` in 1/1000 s."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "12", "bf": "2"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey(number), np.uint8), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def shades(video: Video, indices: list[int]) -> list[int]:
    """Which frames these are, by their shades."""
    return [round((float(np.asarray(frame).mean()) - 12) / 6) for frame in video.frames(indices)]


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_frames_of_a_file(form: str) -> None:
    video = VideoFile(encoded(40, form=form))
    assert len(video) == 40
    for indices in ([0], [39], [5, 17, 30], [3, 3, 4, 39], list(range(40)), [11, 12, 13], [20, 21]):
        assert shades(video, indices) == indices
    assert shades(video, [7]) == [7]  # back to an earlier frame in another call


def test_frames_at_uneven_times() -> None:
    """Frames are counted, not seconds."""
    times = np.cumsum(np.random.default_rng(0).integers(5, 400, 30)).tolist()
    video = VideoFile(encoded(30, times=times))
    assert len(video) == 30
    for indices in ([0, 10, 20, 29], [28, 29], list(range(0, 30, 3))):
        assert shades(video, indices) == indices


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    """None of them is a hang, a crash, or opens another file."""
    whole = encoded(20)
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(whole)
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    joined = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    for content in (b"", b"no video", playlist, joined, png(picture(0)), whole[: len(whole) // 3]):
        with pytest.raises((ValueError, OSError)):
            len(VideoFile(content))
    damaged = bytearray(whole)
    for place in range(len(whole) // 3, len(whole) // 3 + 400):
        damaged[place] ^= 0x5A
    with suppress(ValueError, OSError):
        VideoFile(bytes(damaged)).frames([0, 19])


# ---- which frames


def test_the_choice_of_frames_against_written_tables() -> None:
    assert FrameChoice(4).held_out(8) == [1, 3, 5, 7]
    assert FrameChoice(4).held_out(10) == [1, 3, 6, 8]
    assert FrameChoice(4).held_out(4) == [0, 1, 2, 3]
    assert FrameChoice(3, clips=2).held_out(12) == [1, 5, 9, 3, 7, 11]
    assert FrameChoice(4, "dense", stride=2).held_out(20) == [6, 8, 10, 12]  # from round(0.5 * (20 - 7)) on
    assert FrameChoice(4, "dense", stride=2, clips=3).held_out(20) == [0, 2, 4, 6, 6, 8, 10, 12, 13, 15, 17, 19]
    assert FrameChoice(4, "dense", stride=4).held_out(8) == [0, 2, 4, 6]  # 8 frames are too short for a stride of 4
    assert FrameChoice(4, "dense", stride=4).held_out(4) == [0, 1, 2, 3]
    assert FrameChoice(1).held_out(9) == [4]
    assert FrameChoice(1, "dense", stride=4).held_out(9) == [4]
    for length in (5, 16, 33):
        drawn = [FrameChoice(5).drawn(length, random.Random(seed)) for seed in range(300)]
        for part in range(5):
            seen = {indices[part] for indices in drawn}
            assert seen == {index for index in range(length) if any(
                int((part + share / 997) * length / 5) == index for share in range(997))}
        dense = [FrameChoice(5, "dense", stride=3).drawn(length, random.Random(seed)) for seed in range(300)]
        step = {5: 1, 16: 3, 33: 3}[length]
        assert all(np.diff(indices).tolist() == [step] * 4 for indices in dense)
        assert {indices[0] for indices in dense} == set(range(length - 4 * step))


def test_a_view_is_the_same_for_all_frames() -> None:
    """Of a video of one picture all frames of a view are equal; held out, the crops are where they should be."""
    video = DecodedFrames([picture(3, (60, 40))] * 4)
    settings = VideoViewSettings(flip=0.5, randaugment="rand-m9-n2", grayscale=0.3, erase=0.5)
    view = VideoTrainView(settings, 32, ((0.5,) * 3, (0.5,) * 3))
    found = [view(video, random.Random(seed)) for seed in range(8)]
    assert all(torch.equal(frames, frames[:1].expand_as(frames)) for frames in found)
    assert not torch.equal(found[0], found[1])
    moving = DecodedFrames([picture(seed, (60, 40)) for seed in range(4)])
    for crops, offsets in ((1, [8]), (3, [0, 8, 16])):
        shown = VideoEvalView(VideoViewSettings(crops=crops), 32, 2)(moving, random.Random(0))
        assert shown.shape == (2 * crops, 2, 3, 32, 32)
        for number, left in enumerate(offsets):
            for frame in range(4):
                wanted = np.asarray(picture(frame, (60, 40)).resize((48, 32), Image.Resampling.BICUBIC))[:, left : left + 32]
                row = shown[2 * number + frame // 2, frame % 2].permute(1, 2, 0).numpy()
                assert np.array_equal(row, wanted)


def test_a_single_drawn_frame_says_nothing_of_the_direction() -> None:
    """A nearest-neighbour classifier of one frame, of which nobody says when it was, is at chance; where the thing was first and
    where it is last tells."""
    source = SceneSource(SceneSettings(size=32, train=400), "train", frames=8)
    assert source.classes == DIRECTIONS
    right, seen = 0, list[Any]()
    for index in range(400):
        sample = source.read(index)
        video: Any = sample.image
        frames = np.stack([np.asarray(frame).astype(int) for frame in video.frames(range(8))])
        seen.append((frames[index % 8].ravel(), sample.label))
        there = np.abs(frames - np.median(frames, axis=0)).sum(3) > 60
        first, last = (np.argwhere(one).mean(0) if one.any() else np.zeros(2) for one in (there[0], there[-1]))
        down, across = last - first
        said = ("down" if down > 0 else "up") if abs(down) > abs(across) else ("right" if across > 0 else "left")
        right += said == DIRECTIONS[sample.label or 0]
    assert right / 400 > 0.95
    pixels, labels = np.stack([row for row, _ in seen]).astype(float), np.array([label for _, label in seen])
    squares = (pixels**2).sum(1)
    distances = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() < 0.33


# ---- sources


def contents(root: Path, kind: str) -> dict[str, Any]:
    """Six videos of 20 frames in two classes, one with 3 frames; frames are shades."""
    lengths = {f"{name}/{number}": 3 if number == 2 else 20 for name in ("jump", "run") for number in range(3)}
    if kind == "files":
        for name, length in lengths.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{name}.mp4").write_bytes(encoded(length))
        return {"source": "folder", "video": {}, "train": "."}
    frames = {name: [png(Image.new("RGB", (64, 48), (grey(i),) * 3)) for i in range(length)] for name, length in lengths.items()}
    if kind == "frames":
        for name, each in frames.items():
            (root / name).mkdir(parents=True)
            for i, content in enumerate(each):
                (root / name / f"{i:03d}.png").write_bytes(content)
        return {"source": "folder", "video": {"frames": True}, "train": "."}
    members = list[tuple[str, bytes]]()
    for place, (name, each) in enumerate(frames.items()):
        if kind == "shards":
            members.append((f"{place}.mp4", encoded(lengths[name])))
        else:
            members += [(f"{place}.{i:03d}.png", content) for i, content in enumerate(each)]
        members.append((f"{place}.cls", b"0" if name.startswith("jump") else b"1"))
    write_tar(root / "a-0.tar", members[: len(members) // 2])
    write_tar(root / "a-1.tar", [("note.txt", b"no video"), *members[len(members) // 2 :]])
    (root / "classes.txt").write_text("jump\nrun\n")
    return {"source": "shards", "video": {}, "train": "a-*.tar", "classes": "classes.txt"}


@pytest.mark.parametrize("kind", ["files", "frames", "shards", "shards of frames"])
def test_every_source_gives_the_same_clips(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = contents(tmp_path, kind) | {"root": str(tmp_path), "val_share": 0.4}
    settings = parse(DataSettings, tree, "data")
    splits = open_splits(settings)
    assert splits.train.classes == ("jump", "run")
    found = []
    for source in splits:
        for index in range(len(source)):
            if "note" in source.key(index):
                with pytest.raises(ValueError, match="no video member"):
                    source.read(index)
                continue
            sample = source.read(index)
            video: Any = sample.image
            found.append((sample.label, len(video), shades(video, [0, len(video) // 2, len(video) - 1])))
    wanted = [(label, length, [0, length // 2, length - 1]) for label in (0, 1) for length in (20, 20, 3)]
    assert sorted(found) == sorted(wanted)
    assert splits.facts()["train"] == len(splits.train)
    loader = EvalLoader(splits.train, VideoPreparation(VideoEvalView(VideoViewSettings(), 16, 5), 0, training=False,
                                                      choice=FrameChoice(5)), 4, 0)
    batches = list(loader)
    said = capsys.readouterr().err
    short = sum(len(splits.train.read(index).image) == 3 for index in range(len(splits.train))  # type: ignore[arg-type]
                if "note" not in splits.train.key(index))
    assert said.count("it has 3 frames, fewer than student.frames=5") == short
    assert sum(batch.size for batch in batches) == len(splits.train) - said.count("broken held-out")
    for batch in batches:
        middles = (batch.images.float().mean((1, 3, 4, 5)) - 12) / 6
        torch.testing.assert_close(middles, torch.tensor([2.0, 6, 10, 14, 18]).expand_as(middles), atol=0.35, rtol=0)


def test_videos_of_a_list(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(encoded(9))
        (tmp_path / f"{name}.csv").write_text(f"path,kind\n{name}.mp4,x\n")
    tree = {"source": "list", "root": str(tmp_path), "train": "a.csv", "val": "b.csv", "video": {},
            "columns": {"image": "path", "label": "kind"}}
    video: Any = open_splits(parse(DataSettings, tree, "data")).val.read(0).image
    assert shades(video, [8]) == [8]


def test_frames_of_several_sizes_are_a_broken_clip(tmp_path: Path) -> None:
    for number, size in enumerate([(64, 48)] * 5 + [(48, 64)]):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "a" / f"{number}.png")
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "b" / f"{number}.png")
    tree = {"source": "folder", "root": str(tmp_path), "train": ".", "val_share": 0.5, "video": {"frames": True}}
    source = open_splits(parse(DataSettings, tree, "data")).train.source
    video: Any = source.read(0).image
    with pytest.raises(ValueError, match=re.escape("its frames have several sizes: 48 x 64, 64 x 48")):
        video.frames(range(6))


@pytest.mark.parametrize(("tree", "text"), [
    ({"source": "scenes", "video": {"frames": True}}, "data.video.frames has no effect with data.source=scenes"),
    ({"source": "shards", "video": {"length": 4}}, "data.video.length has no effect with data.source=shards"),
    ({"source": "shards", "video": {}, "exif": True}, "data.video: videos are of 8-bit RGB and have no maps"),
    ({"source": "scenes", "video": {}, "segmentation": {}}, "data.video: videos are of 8-bit RGB and have no maps"),
])  # fmt: skip
def test_settings_that_do_not_fit(tree: dict[str, Any], text: str, tmp_path: Path) -> None:
    tree = tree | ({} if tree["source"] == "scenes" else {"root": str(tmp_path)})
    with pytest.raises(UserError) as raised:
        parse(DataSettings, tree, "data")
    assert text in str(raised.value)


def test_shards_without_clips(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", png(picture(0)))])
    tree = {"source": "shards", "root": str(tmp_path), "train": "a.tar", "video": {}}
    with pytest.raises(UserError, match=r"no record of .* has a video \(KEY\.mp4, KEY\.000\.jpg\)"):
        open_splits(parse(DataSettings, tree, "data"))


def test_real_frames(shared: Path) -> None:
    tree = {"source": "shards", "root": str(shared / "data" / "video_smoke"), "train": "*.tar", "classes": "classes.txt",
            "val_share": 0.5, "video": {}}
    splits = open_splits(parse(DataSettings, tree, "data"))
    videos: list[Any] = [source.read(index).image for source in splits for index in range(len(source))]
    assert sorted(map(len, videos)) == [15, 15, 18, 18] or all(15 <= len(video) <= 18 for video in videos)
    assert {video.frames([0])[0].size for video in videos} == {(426, 240), (320, 180)}
