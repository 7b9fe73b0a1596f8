"""runs/microstories.sh at toy width: every command of it, one after the other, on a CPU."""
import json
import os
import subprocess
import sys

from conftest import ROOT


def test_the_whole_path_at_toy_width(tmp_path):
    rows = tmp_path / "rows.jsonl"
    pairs = [{"instruction": "词汇：小猫", "output": f"小猫第{i}次来了。"} for i in range(40)]
    rows.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    out = tmp_path / "out"
    size = {"BOOKS": "64", "OUT": str(out), "PYTHON": sys.executable,
            "PRETRAIN": "--n-layer 1 --n-head 2 --head-size 8 --n-embd 16 --intermediate-size 16 --batch-size 2 "
                        "--block-size 128 --max-steps 2",
            "SFT": f"--data {rows} --max-steps 2 --eval-every 2",
            "EVALUATE": f"--data {rows} --samples 1"}
    done = subprocess.run(["bash", ROOT / "runs" / "microstories.sh"], env=os.environ | size, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((out / "sft" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 65024 and config["num_hidden_layers"] == 1
    assert "a vocabulary of " in done.stdout and "a vocabulary of 65024" not in done.stdout  # the rest is padding
    assert "铲子" in done.stdout and "repeated 4-grams" in done.stdout
