import json
import random
import sys

import pytest
import sentencepiece
from conftest import STORIES, random_model, tiny_config

import tokenizer as tokenizers
from checkpoint import load_model, save_model, save_tokenizer

AWKWARD = [" ", "  a", "a▁b", "\0", "\r\n", "</s>", "\n\n", "", "▁", " ▁ ", "▁▁", "<0x0A>", "<unk>", "a\0b", "\t",
           "\u2028", "\ufffd", "你好，世界！", " 你 好 ", "😀👨‍👩‍👧", "𠮷野家", "①～ＡＢ", "e\u0301", "\u200b"]


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_strings_come_back_and_stream_whole(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert "".join(tok.decode_stream(ids)) == text


def test_any_string_comes_back(tok):
    hypothesis = pytest.importorskip("hypothesis")
    letters = hypothesis.strategies.text(hypothesis.strategies.characters(exclude_categories=["Cs"]), max_size=40)

    @hypothesis.given(letters | hypothesis.strategies.text(alphabet=" ▁\n小猫，a", max_size=20))
    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    def check(text):
        assert tok.decode(tok.encode(text)) == text
        assert "".join(tok.decode_stream(tok.encode(text))) == text
    check()


def test_a_stream_never_shows_part_of_a_character(tok):
    text = "小猫捡到了龘和😀。"
    pieces = list(tok.decode_stream(tok.encode(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "龘" in pieces and len(pieces) > 5  # it does come piece by piece


def test_a_stream_of_any_ids_equals_their_decoding(tok):
    rng = random.Random(0)
    for _ in range(300):  # broken bytes, controls, ids of a padded model
        ids = [rng.randrange(tok.vocab_size + 20) for _ in range(rng.randrange(30))]
        ids += [rng.randrange(4, 260) for _ in range(6)]
        assert "".join(tok.decode_stream(ids)) == tok.decode(ids)


def test_pieces(tok):
    pieces = [tok.sp.id_to_piece(i) for i in range(tok.vocab_size)]
    assert max(len(p) for i, p in enumerate(pieces) if not tok.is_byte[i] and not tok.sp.is_control(i)
               and not tok.sp.is_unknown(i)) == 4
    assert "▁" in pieces and "\n" in pieces and not any("\n" in p for p in pieces if p != "\n")
    assert tok.encode("：") != tok.encode(":")  # not normalized
    assert tok.decode([tok.eos_id]) == ""


def test_a_text_of_many_characters_leaves_room_for_merges():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 3000))) + "小猫小狗" * 400
    tok = tokenizers.train([text], 700)
    singles = [p for p in map(tok.sp.id_to_piece, range(260, tok.vocab_size)) if len(p) == 1]
    assert tok.vocab_size == 700 and len(singles) <= 700 * 3 // 4
    assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode("小猫小狗")) < 4


def test_a_small_text_gives_fewer_pieces():
    tok = tokenizers.train(["没有空格的短文本。"] * 3, 4096)
    assert 260 < tok.vocab_size < 400
    assert tok.decode(tok.encode("没有 空格\n")) == "没有 空格\n"


@pytest.mark.parametrize("texts, size", [(["小猫"], 100), ([" \n"], 500), ([], 500)])
def test_untrainable(texts, size):
    with pytest.raises(ValueError):
        tokenizers.train(texts, size)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.model"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="tokenizer.model"):
        tokenizers.load(tmp_path)


def test_another_tokenizer_model_loads_and_keeps_its_files(tmp_path):
    path = tmp_path / "theirs"
    path.mkdir()
    with open(path / "tokenizer.model", "wb") as f:  # with a dummy prefix, NFKC, no bytes, a unigram model
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(STORIES), model_writer=f, vocab_size=120,
                                                 model_type="unigram", hard_vocab_limit=False, minloglevel=2)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tok = tokenizers.load(path)
    assert tok.decode(tok.encode("小猫在河边捡到一个铲子")) == "小猫在河边捡到一个铲子"
    tok.encode("a▁b")
    save_tokenizer(tmp_path, tok)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"tokenizer_class": "T5Tokenizer",
                                                                            "chat_template": tokenizers.CHAT}
    assert tokenizers.load(path / "tokenizer.model").vocab_size == tok.vocab_size


def test_what_does_not_come_back_is_said(tok, tmp_path, capsys):
    def trained(texts, **options):
        with open(tmp_path / "tokenizer.model", "wb") as f:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=f, vocab_size=110,
                                                     hard_vocab_limit=False, minloglevel=2, **options)
        capsys.readouterr()
        tokenizers.load(tmp_path)
        return capsys.readouterr().err

    said = trained(STORIES)  # NFKC makes ASCII of ，：, and a newline is a space
    assert str(tmp_path / "tokenizer.model") in said and all(c in said for c in (r"'\n'", "'，'", "'：'"))
    assert "“" not in said
    assert "'“'" in trained([t.replace("“", "") for t in STORIES], normalization_rule_name="identity")
    save_tokenizer(tmp_path, tok)
    tokenizers.load(tmp_path)
    assert not capsys.readouterr().err


def test_a_base_that_adds_tokens_is_written_as_it_is_trained_here(tok, tmp_path):
    """add_bos_token in tokenizer_config.json, and the same in tokenizer.json: what we write adds nothing."""
    transformers = pytest.importorskip("transformers")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_tokenizer(theirs, tok)
    settings = json.loads((theirs / "tokenizer_config.json").read_text())
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True, "mine": 1}))
    fast = json.loads((theirs / "tokenizer.json").read_text())
    fast["post_processor"] = {"type": "Sequence", "processors": [{
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}]}
    (theirs / "tokenizer.json").write_text(json.dumps(fast))
    assert transformers.AutoTokenizer.from_pretrained(theirs)("小猫")["input_ids"][0] == 1
    save_tokenizer(tmp_path, tokenizers.load(theirs))
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not written["add_bos_token"] and not written["add_eos_token"] and written["mine"] == 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("小猫")["input_ids"] == tok.encode("小猫")


@pytest.mark.parametrize("with_json", [True, False])
def test_autotokenizer_gives_the_same_ids(tok, tmp_path, with_json):
    transformers = pytest.importorskip("transformers")
    if not with_json:
        pytest.importorskip("google.protobuf")
    save_tokenizer(tmp_path, tok)
    if not with_json:
        (tmp_path / "tokenizer.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    extras = ["\n", "\n\n", " ", "  ", "，", ",", "！", "“", "😀", "𠮷", "龘", "①", "\t", "a", "Hello ", "2024", "\r\n"]
    for _ in range(1000):
        story = rng.choice(STORIES)
        start = rng.randrange(len(story))
        text = story[start:start + rng.randrange(30)]
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(extras) + text[at:]
        ids = theirs(text)["input_ids"]
        assert ids == tok.encode(text), repr(text)
        assert theirs.decode(ids) == text


def test_real_text(real_data):
    texts = [json.loads(line)["text"] for line in open(real_data / "real_stories_zh.jsonl", encoding="utf-8")]
    tok = tokenizers.train(texts, 4096)
    ids = [tok.encode(text) for text in texts]
    assert [tok.decode(row) for row in ids] == texts
    assert sum(map(len, ids)) < 0.85 * sum(map(len, texts))


# ---- tokenizer.json alone ----

@pytest.fixture
def byte_level(tmp_path):
    """A directory with the tokenizer of Llama 3 and Qwen in small: byte-level BPE, special pieces, a BOS put before."""
    bpe = pytest.importorskip("tokenizers")
    fast = bpe.Tokenizer(bpe.models.BPE())
    fast.pre_tokenizer = bpe.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = bpe.decoders.ByteLevel()
    letters = bpe.pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(STORIES, bpe.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=letters))
    fast.post_processor = bpe.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    path = tmp_path / "theirs"
    path.mkdir()
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|begin|>"}))
    return path


TEXTS = [*STORIES[:5], "词汇：铲子，草地\n", "𠮷😀 a▁b  c", "<|end|>是什么？", "\ufffd", ""]


def test_a_tokenizer_json_alone_gives_every_text_back(byte_level):
    tok = tokenizers.load(byte_level)
    theirs = {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}}  # as older ones are written
    (byte_level / "tokenizer_config.json").write_text(json.dumps(theirs))
    assert tokenizers.load(byte_level).eos_id == tok.eos_id == 1 and 260 < tok.vocab_size <= 400
    for text in TEXTS:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and not {0, 1} & set(ids)
        assert "".join(tok.decode_stream(iter(ids))) == text
        assert "\ufffd" in text or not [part for part in tok.decode_stream(iter(ids)) if "\ufffd" in part]
    assert tok.encode_all(TEXTS) == [tok.encode(text) for text in TEXTS]
    assert tok.decode([*tok.encode("猫"), tok.eos_id, tok.vocab_size + 5]) == "猫"
    assert "".join(tok.pieces("abc")) == "abc"


def test_a_model_that_has_it_is_trained_and_saved_as_it_came(byte_level, tmp_path):
    tok = tokenizers.load(byte_level)
    save_model(tmp_path / "model", random_model(tiny_config(tok.vocab_size)), tok)
    assert not (tmp_path / "model" / "tokenizer.model").exists()
    _, again = load_model(tmp_path / "model")
    assert again.identity == tok.identity and again.encode("小猫") == tok.encode("小猫")
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "model")
    assert [auto(text)["input_ids"] for text in TEXTS[:6]] == [tok.encode(text) for text in TEXTS[:6]]
    assert auto.eos_token_id == tok.eos_id


@pytest.mark.parametrize("change", [{"eos_token": None}, {"eos_token": "<none>"}, {"eos_token": 3}, None])
def test_a_tokenizer_json_that_cannot_be_used(byte_level, change, monkeypatch):
    if change is None:
        (byte_level / "tokenizer.json").write_text("{}")
    else:
        (byte_level / "tokenizer_config.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenizers.load(byte_level)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        tokenizers.load(byte_level)
