"""`structvit bench input`: its output, and frames equal to those of the plain loop."""

import re
import time

from conftest import structvit

from structvit_jax.performance import input_speed


def test_it_runs(tmp_path, capsys):
    video = str(tmp_path / "video.mp4")
    input_speed.write_video(video, key_interval=60)
    structvit("bench", "input", f"--video={video}", "--clips=3")
    out = capsys.readouterr().out
    assert re.search(
        r"video.mp4, \d+ kbit/s: decoding [\d.]+ ms per clip, plain loop [\d.]+ ms \([\d.]+ times\)", out
    )
    for name in ("clips", "images"):
        stages = r"open and index [\d.]+ ms, decode [\d.]+ ms, augment and crop [\d.]+ ms"
        assert re.search(rf"{name}: [\d.]+ per second on one core \({stages}\)", out)


def test_frames_agree_with_the_plain_loop(tmp_path, monkeypatch):
    """`compare_decoding` raises if a clip differs. Processor time does not depend on other processes."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    path = str(tmp_path / "video.mp4")
    input_speed.write_video(path, key_interval=30)
    seconds, plain = input_speed.compare_decoding(path, 5)
    assert 3 * seconds < plain
