"""Exact frames, whatever the order of asking; readable complaints about files that are no videos."""

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data.video_io import VideoError, encode_video, probe, read_frames, resize, write_gif, write_video


def numbered(count, height=32, width=48):
    """Frames that say their own number in 8 grey bars."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    bars = np.repeat(bits, width // 8, axis=1)[:, None, :, None] * 255
    return np.broadcast_to(bars, (count, height, width, 3)).astype(np.uint8)


def read_numbers(frames):
    bars = frames[:, 16].mean(-1).reshape(len(frames), 8, -1).mean(-1) > 128
    return (bars << np.arange(8)).sum(1).tolist()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, numbered(200), 24)
    return path


@pytest.mark.parametrize("wanted", [[0, 1, 2], [5, 5, 9, 40], [70, 150, 199], list(range(64, 200, 15))])
def test_frames_are_exact(clip, wanted):
    assert read_numbers(read_frames(clip, indices=wanted)) == wanted
    assert read_numbers(read_frames(clip.read_bytes(), indices=wanted)) == wanted


def test_start_stride_and_rest(clip):
    assert read_numbers(read_frames(clip, start=3, stride=7, num=4)) == [3, 10, 17, 24]
    assert read_numbers(read_frames(clip, start=190)) == list(range(190, 200))
    assert read_numbers(read_frames(clip, stride=50)) == [0, 50, 100, 150]


def test_probe(clip):
    info = probe(clip)
    assert (info.num_frames, info.height, info.width, info.fps, info.codec) == (200, 32, 48, 24.0, "h264")


def test_scaling_while_decoding(clip):
    assert read_frames(clip, num=2, size=(16, 24)).shape == (2, 16, 24, 3)
    assert read_frames(clip, num=2, size=lambda height, width: (height // 4, width // 4)).shape == (2, 8, 12, 3)
    assert resize(numbered(2), (16, 24)).shape == (2, 16, 24, 3)


def test_what_cannot_be_read(clip, tmp_path):
    with pytest.raises(VideoError, match="asked for frame 200"):
        read_frames(clip, indices=[199, 200])
    with pytest.raises(VideoError, match="asked for frame 500"):
        read_frames(clip, indices=[500])
    with pytest.raises(VideoError, match="rising"):
        read_frames(clip, indices=[3, 2])
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4: cannot be opened"):
        probe(tmp_path / "text.mp4")
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:2000])
    with pytest.raises(VideoError, match=r"half\.mp4"):
        read_frames(tmp_path / "half.mp4")
    with pytest.raises(VideoError, match=r"gone\.png"):
        read_frames(tmp_path / "gone.png")


def test_writing(tmp_path):
    write_video(tmp_path / "odd.mp4", numbered(3)[:, :31, :45], 8)
    assert (probe(tmp_path / "odd.mp4").height, probe(tmp_path / "odd.mp4").width) == (32, 46)
    write_gif(tmp_path / "clip.gif", numbered(4), 8)
    assert read_numbers(read_frames(tmp_path / "clip.gif")) == [0, 1, 2, 3]
    assert encode_video(numbered(5), 8) == encode_video(numbered(5), 8), "shards must come out the same every time"
    with pytest.raises(UserError, match="uint8"):
        write_video(tmp_path / "float.mp4", numbered(3).astype(np.float32), 8)


def test_images_are_one_frame_videos(tmp_path):
    from PIL import Image

    Image.fromarray(numbered(1)[0]).save(tmp_path / "image.png")
    assert probe(tmp_path / "image.png").num_frames == 1
    assert read_frames((tmp_path / "image.png").read_bytes(), size=(8, 8)).shape == (1, 8, 8, 3)
