"""Training of teachers: input that is rejected before anything is written."""

import pytest

from evotok_plugin.training.teacher import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--max_steps=-1"], "max_steps must be at least 1, got -1"),
        (["--learning_rate=-1"], "learning_rate must be at least 0, got -1.0"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0, got nan"),
        (["--seed=-1"], "seed must be from 0"),
        (["--model", "{1: 2}"], "expected a mapping"),
        (["--model", "{encoder_num_heads: -1}"], "encoder_num_heads must be from 1"),
        (["--model", "{ema_decay: .nan}"], "ema_decay must be between 0 and 1, got nan"),
        (["--model", "{initializer_range: -1}"], "initializer_range must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_rejected(tmp_path, capsys, flags, message):
    assert main(["--data", "images", "--tokenizer", "text", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "captions.jsonl is empty; expected lines with image and captions"),
        ("[" * 100_000, "captions.jsonl: expected lines with image and captions"),
        ('{"image": 1, "captions": ["a"]}', "captions.jsonl: expected lines with image and captions"),
    ],
)
def test_damaged_captions_are_rejected(tmp_path, capsys, content, message):
    (tmp_path / "captions.jsonl").write_text(content)
    given = ["--data", str(tmp_path), "--tokenizer", "text", "--output_dir", str(tmp_path / "out")]
    assert main(given) == 2
    assert message in capsys.readouterr().err
