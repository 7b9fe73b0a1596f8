"""SentencePiece BPE with byte fallback: any text in, the same text out.

Tokenizer files are Hugging Face's own (`tokenizer.model`, `tokenizer_config.json`, `tokenizer.json`), so that
`AutoTokenizer` reads them; this file needs only sentencepiece. Any other `tokenizer.model` loads too, and where a model
has a `tokenizer.json` alone, the BPE in it (`JsonTokenizer`).
"""
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece

SPACE = "\u2581"  # ▁, SentencePiece's letter for a space
FILES = ("tokenizer.model", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
MAX_TRAIN_CHARS = 20_000_000  # more text hardly changes the pieces, and the trainer holds it all in memory


class Tokenizer:
    """vocab_size pieces; eos_id closes a story. `files`: what a model directory holds of it, by name, as bytes."""

    def __init__(self, files):
        self.files = files
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        self.vocab_size = self.sp.vocab_size()
        self.eos_id = self.sp.eos_id()
        if self.eos_id < 0:
            raise ValueError("the tokenizer has no end-of-sequence piece")
        self.is_byte = [self.sp.is_byte(i) for i in range(self.vocab_size)]
        # a literal ▁ would come back as a space, so it goes through its bytes
        self.space_bytes = [self.sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        if "tokenizer_config.json" not in files:
            files["tokenizer_config.json"] = json.dumps(self._config(), indent=2).encode()
        set_usage(files)

    def encode(self, text):
        """str -> list of ids. decode(encode(x)) == x for every string without surrogates (with our own tokenizers)."""
        if SPACE not in text or not all(self.is_byte[i] for i in self.space_bytes):
            return self.sp.encode(text)
        first, *others = map(self.sp.encode, text.split(SPACE))
        return first + [i for part in others for i in (*self.space_bytes, *part)]

    def encode_all(self, texts):
        """A list of str -> a list of ids for each, on all cores."""
        return [self.encode(text) if SPACE in text else ids
                for text, ids in zip(texts, self.sp.encode(texts, num_threads=os.cpu_count()))]

    def pieces(self, text):
        return self.sp.encode_as_pieces(text)

    @property
    def identity(self):
        """Bytes that no other tokenizer has."""
        return self.files["tokenizer.model"]

    @property
    def dtype(self):
        """Of token files: the smallest that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 65535 else np.uint32)

    def story(self, text):
        """A story as it stands in token files: its ids and an EOS behind them, an array (N,)."""
        return np.array(self.encode(text) + [self.eos_id], self.dtype)

    def decode(self, ids):
        """ids -> str. Bytes that are no UTF-8 become U+FFFD; ids beyond the pieces (a padded model) are left out."""
        return self.sp.decode([i for i in ids if i < self.vocab_size])

    def decode_stream(self, ids):
        """An iterable of ids -> pieces of text, as soon as they are certain: a character that spans several byte
        pieces comes whole. Joined they equal decode(ids)."""
        seen, sent, pending = [], "", b""
        for i in ids:
            if i >= self.vocab_size:
                continue
            seen.append(i)
            pending = pending + bytes([int(self.sp.id_to_piece(i)[3:-1], 16)]) if self.is_byte[i] else b""  # <0xE5>
            if not _is_utf8(pending):
                continue
            pending = b""
            text = self.decode(seen)
            yield text[len(sent):]
            sent = text
        yield self.decode(seen)[len(sent):]

    def _config(self):
        piece = self.sp.id_to_piece
        prefix = self.sp.encode_as_pieces("a")[0].startswith(SPACE)
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": prefix,
                  "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
                  "unk_token": piece(self.sp.unk_id()), "eos_token": piece(self.eos_id)}
        if self.sp.bos_id() >= 0:
            config["bos_token"] = piece(self.sp.bos_id())
        return config


class JsonTokenizer(Tokenizer):
    """A byte-level BPE as Llama 3, Qwen or SmolLM have it, read by Hugging Face's `tokenizers`. Same methods. Text that
    looks like a special piece is text."""

    def __init__(self, files):
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise ValueError("a tokenizer.json without a tokenizer.model needs pip install tokenizers") from None
        self.files = files
        self.fast = Fast.from_str(files["tokenizer.json"].decode())
        self.fast.encode_special_tokens = True
        self.vocab_size = max(self.fast.get_vocab().values()) + 1
        eos = json.loads(files["tokenizer_config.json"]).get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        self.eos_id = self.fast.token_to_id(eos) if isinstance(eos, str) else None
        if self.eos_id is None:
            raise ValueError("the tokenizer has no end-of-sequence piece")
        set_usage(files)

    def encode(self, text):
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts):
        return [encoding.ids for encoding in self.fast.encode_batch(texts, add_special_tokens=False)]

    def pieces(self, text):
        return [self.decode([i]) for i in self.encode(text)]

    @property
    def identity(self):
        return self.files["tokenizer.json"]

    def decode(self, ids):
        return self.fast.decode([i for i in ids if i < self.vocab_size])

    def decode_stream(self, ids):
        seen, sent = [], ""
        for i in ids:
            seen.append(i)
            text = self.decode(seen)
            if not text.endswith("\ufffd"):  # else the rest of a character may be still to come
                yield text[len(sent):]
                sent = text
        yield self.decode(seen)[len(sent):]


# the prompt of dataset.py, for programs that talk to a model in turns: one instruction, one story
CHAT = ("{% for message in messages %}{% if message['role'] == 'user' %}Instruct: {{ message['content'] }}\nOutput:"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}")


def set_usage(files):
    """Tell other programs how models are used that are trained here: without BOS, with EOS only where a story ends,
    after our prompt."""
    config = json.loads(files["tokenizer_config.json"])
    adds = str(config.get("tokenizer_class")).startswith("Llama")  # a Llama's adds BOS where nothing is said
    if config.get("add_bos_token", adds) or config.get("add_eos_token"):
        config |= {"add_bos_token": False, "add_eos_token": False}
    config["chat_template"] = CHAT
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    fast = json.loads(files.get("tokenizer.json", "{}"))
    if fast.get("post_processor"):
        files["tokenizer.json"] = json.dumps(fast | {"post_processor": None}, ensure_ascii=False).encode()


def _is_utf8(data):
    try:
        data.decode()
        return True
    except UnicodeDecodeError:
        return False


def load(path):
    """A `tokenizer.model`, or a directory with one or with a `tokenizer.json` -> Tokenizer. Raises ValueError if it is
    missing or unreadable."""
    path = Path(path)
    model, directory = (path / "tokenizer.model", path) if path.is_dir() else (path, None)
    files = {name: (directory / name).read_bytes() for name in FILES if directory and (directory / name).is_file()}
    kind = Tokenizer
    if model.is_file():
        files["tokenizer.model"] = model.read_bytes()
    elif {"tokenizer.json", "tokenizer_config.json"} <= set(files) and b"<0x0A>" not in files["tokenizer.json"]:
        kind, model = JsonTokenizer, directory / "tokenizer.json"
    else:  # a tokenizer.json with SentencePiece's byte pieces is a copy of the tokenizer.model that is missing
        raise ValueError(f"{model}: no such tokenizer (a SentencePiece tokenizer.model is needed, or a tokenizer.json "
                         "with its tokenizer_config.json)")
    try:
        tokenizer = kind(files)
    except Exception as e:  # sentencepiece raises RuntimeError, tokenizers a bare Exception
        raise ValueError(f"{model}: not a usable tokenizer ({str(e).strip()})") from None
    if lost := [c for c in "\n，：“”" if c not in tokenizer.decode(tokenizer.encode(f"好{c}好"))]:
        print(f"notice: {model} does not give back {' '.join(map(repr, lost))}; stories and prompts will lack them",
              file=sys.stderr)
    return tokenizer


def train(texts, vocab_size):
    """Iterable of str -> Tokenizer of vocab_size pieces (fewer if the text yields no more). Raises ValueError.

    BPE (Sennrich et al., arXiv 1508.07909), by SentencePiece (arXiv 1808.06226). No normalization: NFKC would turn
    ，：！ into ASCII. Pieces of at most 4 characters: longer ones swallow whole phrases of a small corpus, and then a
    word copied from the prompt has other pieces in the story.
    """
    special = 260  # <unk> <s> </s>, the newline, 256 bytes
    if vocab_size < special + 8:
        raise ValueError(f"--vocab-size {vocab_size} is too small: {special} pieces are bytes and specials")
    sample, total = [], 0
    for text in texts:
        sample.append(text)
        total += len(text)
        if total > MAX_TRAIN_CHARS:
            break
    counts = Counter()
    for text in sample:
        counts.update(text)
    # Single characters take at most three quarters of the pieces; the rarer ones of a Chinese text are left to the
    # byte pieces. (The trainer's own character_coverage stops at 98%, not enough for small vocabularies.)
    for c in "\n\0" + SPACE:
        counts.pop(c, None)
    alphabet = "".join(c for c, _ in counts.most_common((vocab_size - special) * 3 // 4 - 1))
    if not alphabet.strip():
        raise ValueError("there is no text to train a tokenizer on")
    others = re.compile("[^" + re.escape(alphabet) + "]+")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for text in sample for part in others.split(text) if part), model_writer=out,
            model_type="bpe", vocab_size=vocab_size, byte_fallback=True, character_coverage=1.0,
            max_sentencepiece_length=4, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, user_defined_symbols=["\n"], required_chars=SPACE, split_digits=True,
            hard_vocab_limit=False, max_sentence_length=1 << 30, num_threads=1, minloglevel=2)
    except RuntimeError as e:
        raise ValueError(f"the tokenizer could not be trained: {str(e).strip()}") from None
    tokenizer = Tokenizer({"tokenizer.model": out.getvalue()})
    tokenizer.files["tokenizer.json"] = json.dumps(_tokenizer_json(tokenizer.sp), ensure_ascii=False).encode()
    return tokenizer


def _tokenizer_json(sp):
    """The same BPE in the format of Hugging Face `tokenizers`, which spares its users sentencepiece and protobuf."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []  # every way to make a piece of two; SentencePiece prefers the piece of the higher score
    for i, piece in enumerate(pieces):
        if len(piece) > 1 and not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)):
            pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
            merges += [(-sp.get_score(i), pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    special = [i for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], "special": i in special, **flags}
                         for i in (*special, vocab["\n"])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": pieces[sp.unk_id()], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": [pair for _, pair in merges]},
    }
