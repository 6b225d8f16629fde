"""Videos of detections that cannot be written, which OpenCV does not say."""

import numpy as np
import pytest

from retinanet_ext.errors import InputError
from retinanet_ext.prediction import drawing


def test_a_video_with_fewer_frames_or_without_an_encoder_is_refused(tmp_path, monkeypatch):
    frames = [np.zeros((48, width, 3), np.uint8) for width in (64, 64, 32, 64)]
    clip = tmp_path / "clip.mp4"
    with pytest.raises(InputError, match="cannot be written: 3 of 4 frames are in"):
        drawing._write_video(clip, frames, 25)
    monkeypatch.setattr(drawing, "CODEC", "none")
    with pytest.raises(InputError, match="does not encode 64 x 48 pixels at 25 frames per second"):
        drawing._write_video(clip, frames[:2], 25)
    assert not [*tmp_path.iterdir()]
