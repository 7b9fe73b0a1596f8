"""Shared by all tests: a small tokenizer, small models on disk, and the real texts, where they are."""
import json
import os
import random
from pathlib import Path

import pytest
import torch

from checkpoint import save_model
from model import GPT, GPTConfig
from pretrain import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent

# A text of its own, so that no test hangs on what the generator writes this week.
STORIES = [
    f"{who}在{where}捡到一个{what}。{who}问{friend}：“这是你的{what}吗？”{friend}摇摇头说：“不是我的{what}。”"
    f"{who}在{where}等了很久，最后把{what}还给了{owner}。"
    for who in ("小猫", "小狗", "小兔", "小熊") for where in ("河边", "树下", "路上", "草地")
    for what in ("铲子", "皮球", "帽子", "苹果") for friend, owner in (("小鸭", "松鼠"), ("小鹿", "刺猬"))
]


# the study's shape (heads * head_size != n_embd), grouped-query attention, an untied head; the shapes of others, with a
# context of 32 tokens stretched to 128 in Llama 3's
GEOMETRIES = {
    "microstories": {"n_head": 6, "n_kv_head": 6, "head_size": 48, "n_embd": 512, "n_layer": 2},
    "grouped": {"n_head": 4, "n_kv_head": 2, "rope_base": 5e5},
    "untied": {"n_head": 4, "n_kv_head": 1, "tie_embeddings": False, "norm_eps": 1e-6},
    "llama3": {"n_head": 4, "n_kv_head": 2, "n_embd": 64, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "qwen2": {"n_head": 4, "n_kv_head": 2, "qkv_bias": True, "n_embd": 64},
    "qwen3": {"n_head": 4, "n_kv_head": 2, "qk_norm": True, "n_embd": 64},
}


def tiny_config(vocab_size, **changes):
    return GPTConfig(**{"block_size": 128, "vocab_size": vocab_size, "n_layer": 2, "n_head": 2, "n_kv_head": 2,
                        "head_size": 16, "n_embd": 32, "intermediate_size": 48, **changes})


def random_model(config, seed=0, scale=0.1):
    """A model whose weights, norm gains too, are far enough from their first values to matter."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale)
    return model.eval()


@pytest.fixture(scope="session")
def tok():
    return train_tokenizer(STORIES * 4, 500)


@pytest.fixture(scope="session")
def model_dir(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, random_model(tiny_config(tok.vocab_size), scale=0.0), tok)
    return path


@pytest.fixture(scope="session")
def pairs():
    rng = random.Random(0)
    rows = []
    for text in STORIES[:60]:
        words = rng.sample(["铲子", "皮球", "帽子", "苹果", "小猫"], 2)
        rows.append({"instruction": f"词汇：{'，'.join(w for w in words if w in text) or text[:2]}", "input": "",
                     "output": text[:rng.randrange(20, len(text))]})
    return rows


@pytest.fixture(scope="session")
def pairs_file(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("MICROSTORIES_REAL_DATA")
    if not folder:
        pytest.skip("MICROSTORIES_REAL_DATA does not name a folder with real_stories_zh.jsonl")
    return Path(folder)


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words): the command ends with exit code 2 and one line that holds the words -> that line."""
    def check(main, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in argv])
        assert e.value.code == 2
        err = capsys.readouterr().err.strip()
        assert "\n" not in err and err, err
        for word in words:
            assert str(word) in err, err
        return err
    return check
