"""lora.py, the library part: PEFT is the judge. What starts at 0 is random in every test, or it would prove nothing."""
import json
import math
import shutil

import conftest
import pytest
import torch
from conftest import GEOMETRIES, tiny_config
from safetensors.torch import load_file, save_file

import evaluate
import lora
import sample
from checkpoint import load_model, save_model, save_tokenizer
from decoding import generate
from model import GPT, GPTConfig

TOKENIZER_FILES = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONCE = {"embed_tokens", "lm_head"}  # a model has one of each


def random_model(config, seed=0):
    """Small enough weights that logits are a few units, so that a difference of 1e-5 is one of rounding."""
    return conftest.random_model(config, seed, scale=0.03)


def study_config(vocab_size, **changes):
    """The study's attention, of which no matrix is square: 6 heads of 48 = 288, n_embd 512."""
    return tiny_config(vocab_size, **{"n_embd": 512, "n_head": 6, "n_kv_head": 6, "head_size": 48} | changes)


def randomise(model, seed=1):
    torch.manual_seed(seed)
    for module in lora.adapters(model).values():
        zero = module.lora_embedding_A if isinstance(module, lora.LoRAEmbedding) else module.lora_B.weight
        torch.nn.init.normal_(zero, std=0.1)
    return model


def adapted(config, targets=ALL, r=4, alpha=8, **options):
    model = random_model(config)
    lora.add(model, targets, r, alpha, **options)
    return randomise(model).eval()


IDX = torch.arange(3, 27).view(2, 12)


@pytest.mark.parametrize("scaling, targets", [("lora", ALL), ("rslora", ALL), ("rslora", [*ALL, "embed_tokens"])])
def test_ours_in_peft(tok, tmp_path, scaling, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tied = "embed_tokens" not in targets  # peft, merging, changes the tied head as well
    model = adapted(study_config(tok.vocab_size, tie_embeddings=tied), targets, r=8, alpha=16, scaling=scaling)
    save_model(tmp_path / "base", random_model(model.config), tok)
    lora.save(tmp_path / "adapter", model, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(model(IDX), theirs(IDX).logits, atol=1e-4)
    assert not torch.allclose(model(IDX), random_model(model.config)(IDX), atol=1e-2)  # the adapter does something
    merged = theirs.merge_and_unload()
    assert torch.allclose(lora.merged(model)(IDX), merged(IDX).logits, atol=1e-5)


@pytest.mark.parametrize("targets, r, rslora, tied", [
    (["q_proj", "v_proj"], 4, False, True), (ALL, 16, False, True), (ALL, 8, True, True),
    (["lm_head", "q_proj"], 8, False, False), (["lm_head"], 4, False, True),
    (["embed_tokens", "q_proj"], 8, True, False), (["embed_tokens"], 4, False, True)])
def test_theirs_here(tok, tmp_path, targets, r, rslora, tied):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_model(tmp_path / "base", random_model(study_config(tok.vocab_size, tie_embeddings=tied)), tok)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=r, lora_alpha=12, target_modules=targets, use_rslora=rslora,
                                                       task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model, _ = load_model(tmp_path / "base", tmp_path / "adapter")
    once = ONCE & set(targets)
    assert len(lora.adapters(model)) == len(once) + (len(targets) - len(once)) * model.config.n_layer
    assert torch.allclose(model.eval()(IDX), theirs(IDX).logits, atol=1e-5)
    if once:  # peft stores the own weight of head and embedding, too: it must be this base's
        other = random_model(model.config, seed=2)
        with pytest.raises(ValueError, match=f"{min(once)}.base_layer.weight is not the weight of this base"):
            lora.load(tmp_path / "adapter", other)


def test_the_base_stays_and_the_adapter_alone_is_saved(tok, tmp_path):
    base = random_model(study_config(tok.vocab_size))
    before = {name: p.clone() for name, p in base.state_dict().items()}
    model = random_model(base.config)
    lora.add(model, ALL, 4, 8)
    assert torch.equal(model(IDX), base(IDX))  # B = 0: the base exactly
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDX, IDX).backward()
    optimizer.step()
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
    after = model.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    lora.save(tmp_path, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [lora.CONFIG, lora.TENSORS]
    again = random_model(base.config)
    lora.load(tmp_path, again)
    assert torch.equal(again.eval()(IDX), model.eval()(IDX))
    half = random_model(base.config)
    lora.load(tmp_path, half, scale=0.0)
    assert torch.equal(half(IDX), base(IDX))


@pytest.mark.parametrize("target, other", [("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")])
def test_a_tied_head_is_untied_by_merging(tok, target, other):
    model = adapted(study_config(tok.vocab_size), [target, "q_proj"])
    weight = model.lm_head.weight.clone()  # the embedding's, too
    plain = lora.merged(model)
    after = {"lm_head": plain.lm_head.weight, "embed_tokens": plain.model.embed_tokens.weight}
    assert not plain.config.tie_embeddings and torch.equal(after[other], weight)
    assert not torch.equal(after[target], weight)
    assert torch.allclose(plain(IDX), model(IDX), atol=1e-5)
    stories = [generate(m, IDX.tolist(), 20, temperature=0) for m in (model, plain)]
    assert stories[0] == stories[1]
    assert lora.merged(adapted(model.config)).config.tie_embeddings


def test_what_does_not_fit_is_named(tok, tmp_path):
    model = random_model(study_config(tok.vocab_size))
    for targets, r, alpha, says in [(["query"], 4, 8, "q_proj"), (ALL, 0, 8, "r 0"), (ALL, 4, 0, "alpha 0"),
                                    (["q_proj"], 513, 8, "above both")]:
        with pytest.raises(ValueError, match=says):
            lora.add(model, targets, r, alpha)
    assert not lora.adapters(model)
    model = adapted(study_config(tok.vocab_size))
    lora.save(tmp_path, model)
    with pytest.raises(ValueError, match="another base model .model.embed_tokens.weight"):
        lora.load(tmp_path, random_model(model.config, seed=1))
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.load(tmp_path, model)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    inits = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica", "lora_ga")  # all change the base's weights
    for change, says in [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "IA3"),
                         *(({key: value}, key) for key in ("r", "lora_alpha", "lora_dropout")
                           for value in (True, "8", [8], -1, math.nan, math.inf, 10**400)),
                         ({"r": 1.5}, "r 1.5"), ({"lora_alpha": 1e300}, "lora_alpha"),
                         ({"use_rslora": "no"}, "use_rslora"), ({"use_qalora": True}, "use_qalora"),
                         *(({"init_lora_weights": name}, f"init_lora_weights '{name}'") for name in inits)]:
        (tmp_path / lora.CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=says):
            lora.load(tmp_path, random_model(model.config))
    (tmp_path / lora.CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / lora.TENSORS)
    for metadata in ("3", "x", '["base"]'):
        save_file(tensors, tmp_path / lora.TENSORS, metadata={"base": metadata})
        with pytest.raises(ValueError, match="not a safetensors file of an adapter"):
            lora.load(tmp_path, random_model(model.config))
    for value in (math.nan, math.inf):
        save_file({name: tensor * value for name, tensor in tensors.items()}, tmp_path / lora.TENSORS)
        with pytest.raises(ValueError, match="NaN or infinite values"):
            lora.load(tmp_path, random_model(model.config))
    (tmp_path / lora.TENSORS).write_bytes(b"x")
    with pytest.raises(ValueError, match="safetensors"):
        lora.load(tmp_path, random_model(model.config))
    (tmp_path / lora.TENSORS).unlink()
    with pytest.raises(ValueError, match=f"{lora.TENSORS} is missing"):
        lora.load(tmp_path, random_model(model.config))


def test_sizes_of_the_study():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=65024, n_head=6, n_kv_head=6, head_size=48, n_embd=512))
        lora.add(model, [*ALL[:4], "lm_head"], 256, 512)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 21_692_416


def test_sample_and_evaluate_take_an_adapter(model_dir, pairs_file, tmp_path, capsys, refused):
    model, tokenizer = load_model(model_dir)
    lora.add(model, ALL, 4, 64)
    lora.save(tmp_path / "a", randomise(model, 3))
    said = []
    for argv in ([], ["--adapter", str(tmp_path / "a")]):
        for scale in ([], ["--adapter-scale", "0"]):
            sample.main(["--ckpt", str(model_dir), "--prompt", "小猫", "--device", "cpu", *argv, *scale])
            said.append(capsys.readouterr().out)
        evaluate.main(["--ckpt", str(model_dir), "--base", str(model_dir), "--data", str(pairs_file), "--samples", "1",
                       "--device", "cpu", "--out", str(tmp_path / f"eval{len(argv)}"), *argv])
    assert said[0] == said[1] == said[3] != said[2]
    results = [json.loads((tmp_path / f"eval{n}" / "eval.json").read_text(encoding="utf-8")) for n in (0, 2)]
    assert results[0]["plain_nll"] == results[0]["base_nll"] == results[1]["base_nll"] != results[1]["plain_nll"]
    refused(sample.main, ["--ckpt", model_dir, "--adapter", tmp_path, "--prompt", "x"], lora.CONFIG)
    refused(sample.main, ["--ckpt", tmp_path / "a", "--prompt", "x"], "LoRA adapter", "--adapter")
    refused(evaluate.main, ["--ckpt", model_dir, "--adapter", tmp_path], lora.CONFIG)


# ---- training ----

def test_one_step_has_the_gradients_of_peft(tok, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = adapted(study_config(tok.vocab_size), [*ALL, "embed_tokens"], r=8, alpha=16).train()
    save_model(tmp_path / "base", random_model(model.config), tok)
    lora.save(tmp_path / "adapter", model, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    y = IDX.roll(-1, 1)
    (model(IDX, y) / y.numel()).backward()
    torch.nn.functional.cross_entropy(theirs(IDX).logits.flatten(0, 1), y.flatten()).backward()
    expected = {name.replace(".default", "").removeprefix(lora.PREFIX): p.grad
                for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(ours) == set(expected) and len(ours) == 2 * (7 * model.config.n_layer + 1)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-3)
        assert grad.abs().max() > 1e-4


def settings(model_dir, pairs_file, out, *more):
    return [str(a) for a in ("--init", model_dir, "--data", pairs_file, "--out", out, "--max-steps", "12", "--lr",
                             "5e-3", "--batch-size", "4", "--r", "4", "--alpha", "8", "--device", "cpu", "--warmup",
                             "2", "--eval-every", "4", "--save-every", "5", *more)]


@pytest.mark.parametrize("more", [["--targets", "all-linear"], ["--dtype", "bf16-mixed", "--dropout", "0.2"],
                                  ["--dtype", "bf16-true", "--targets", "study", "--scaling", "rslora"]])
def test_an_adapter_is_trained_and_resumed_bit_for_bit(model_dir, pairs_file, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr("common.has_bf16", lambda device: True)
    before = {p.name: p.read_bytes() for p in model_dir.iterdir()}
    out = tmp_path / "run"
    lora.main(settings(model_dir, pairs_file, out, *more))
    said = capsys.readouterr().out
    assert "trainable parameters of" in said and "铲子" in said  # the test cases at the end
    losses = [row["val_loss"] for row in map(json.loads, open(out / "log.jsonl")) if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.02
    assert {p.name for p in out.iterdir()} == {lora.CONFIG, lora.TENSORS, "last", "log.jsonl", "loss.png", "args.json",
                                               *TOKENIZER_FILES}
    assert {p.name: p.read_bytes() for p in model_dir.iterdir()} == before

    class Stop(Exception):
        pass

    import train_sft
    usual = train_sft.backward

    def interrupted(*args):
        interrupted.steps += 1
        if interrupted.steps == 9:
            raise Stop
        return usual(*args)
    interrupted.steps = 0
    monkeypatch.setattr(train_sft, "backward", interrupted)
    with pytest.raises(Stop):
        lora.main(settings(model_dir, pairs_file, tmp_path / "second", *more))
    monkeypatch.setattr(train_sft, "backward", usual)
    lora.main(["--out", str(tmp_path / "second"), "--resume"])
    for name in (lora.TENSORS, f"last/{lora.TENSORS}"):
        assert (tmp_path / "second" / name).read_bytes() == (out / name).read_bytes()

    lora.main(["merge", str(out), "--init", str(model_dir), "--out", str(tmp_path / "merged")])
    plain, _ = load_model(tmp_path / "merged")
    model, _ = load_model(model_dir)
    lora.load(out, model)
    near = 1e-3 if plain.config.tie_embeddings else 1e-2
    assert torch.allclose(plain.float()(IDX), model.float().eval()(IDX), atol=near)
    assert plain.config.tie_embeddings == ("all-linear" in more)  # the others adapt embedding or head
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written["tie_word_embeddings"] == plain.config.tie_embeddings


def test_what_an_adapter_is_cannot_change_when_it_is_resumed(model_dir, pairs_file, tmp_path, refused):
    out = tmp_path / "run"
    lora.main(settings(model_dir, pairs_file, out))
    before = (out / "last" / lora.TENSORS).read_bytes()
    for flag, value in (("--r", "16"), ("--alpha", "3"), ("--dropout", "0.5"), ("--scaling", "rslora"),
                        ("--targets", "q_proj"), ("--init", tmp_path)):
        refused(lora.main, ["--resume", "--out", out, "--max-steps", "14", flag, value], flag, value, "cannot change")
    assert (out / "last" / lora.TENSORS).read_bytes() == before
    lora.main(["--resume", "--out", str(out), "--max-steps", "14", "--r", "4", "--alpha", "8", "--lr", "1e-3", "--init",
               str(model_dir / ".." / model_dir.name)])  # as it was


def test_a_merge_that_fails_leaves_nothing(model_dir, pairs_file, tmp_path, monkeypatch, refused):
    out, merged = tmp_path / "run", tmp_path / "merged"
    lora.main(settings(model_dir, pairs_file, out))
    refused(lora.main, ["merge", out, "--init", model_dir, "--out", "/proc/merged"], "/proc/merged")
    monkeypatch.setattr("checkpoint.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    refused(lora.main, ["merge", out, "--init", model_dir, "--out", merged], "No space left")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    monkeypatch.undo()
    lora.main(["merge", str(out), "--init", str(model_dir), "--out", str(merged)])
    assert load_model(merged)


def test_only_the_adapter_is_optimized(model_dir, pairs_file, tmp_path):
    from checkpoint import find_last
    lora.main(settings(model_dir, pairs_file, tmp_path / "run", "--targets", "q_proj,v_proj"))
    last, state = find_last(tmp_path / "run")
    model, _ = load_model(model_dir)
    moments = state["optimizer"]["state"].values()
    assert len(moments) == 2 * 2 * model.config.n_layer
    assert sum(s["exp_avg"].numel() for s in moments) == sum(
        4 * (32 + out) for out in (32, 32)) * model.config.n_layer  # n_embd 32, two heads of 16
    assert {p.name for p in last.iterdir()} == {lora.CONFIG, lora.TENSORS, "train_state.pt", *TOKENIZER_FILES}


def test_peft_finds_base_and_tokenizer_from_any_folder(model_dir, pairs_file, tmp_path, monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.chdir(model_dir.parent)
    lora.main(settings(model_dir.name, pairs_file, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained("run")
    ours, tok = load_model(model_dir, tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, ours.eval()(IDX), atol=1e-4, rtol=1e-3)
    text = "词汇：铲子\n故事"
    assert transformers.AutoTokenizer.from_pretrained("run")(text)["input_ids"] == tok.encode(text)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_a_compiled_step_has_the_gradients_of_an_eager_one(tok):
    model = adapted(tiny_config(tok.vocab_size))
    x, y = IDX, IDX.roll(-1, 1)

    def gradients(forward):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            forward(x, y).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    eager, compiled = gradients(model), gradients(torch.compile(model))
    assert [name for name, g in eager.items() if g is not None] == [name for name in eager if "lora_" in name]
    for name, gradient in eager.items():
        if gradient is None:
            assert compiled[name] is None
        else:
            assert gradient.norm() > 0 and (compiled[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_an_adapter_for_someone_elses_model(tok, pairs_file, tmp_path):
    """Grouped-query, untied, in shards, from transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    save_tokenizer(tmp_path / "base", tok)
    lora.main(settings(tmp_path / "base", pairs_file, tmp_path / "run", "--targets", "study"))
    lora.main(["merge", str(tmp_path / "run"), "--init", str(tmp_path / "base"), "--out", str(tmp_path / "merged")])
    peft = pytest.importorskip("peft")
    merged = peft.PeftModel.from_pretrained(theirs.eval(), tmp_path / "run").merge_and_unload()
    plain, _ = load_model(tmp_path / "merged")
    assert torch.allclose(plain(IDX), merged(IDX).logits, atol=1e-5)
    base, _ = load_model(tmp_path / "base")
    assert not torch.allclose(plain(IDX), base(IDX), atol=1e-2)  # the adapter does something


def test_mistakes_of_the_command(model_dir, tok, pairs_file, tmp_path, refused, capsys):
    out = tmp_path / "run"
    refused(lora.main, settings(model_dir, pairs_file, out, "--targets", "query"), "query", "q_proj", "lm_head")
    refused(lora.main, settings(model_dir, pairs_file, out, "--r", "0"), "--r")
    refused(lora.main, settings(model_dir, pairs_file, out, "--alpha", "-1"), "--alpha")
    refused(lora.main, settings(model_dir, pairs_file, out, "--r", "9999"), "above both dimensions")
    refused(lora.main, ["--preset", "small"], "--dry-run")
    assert not out.exists()
    lora.main(["--dry-run", "--preset", "microstories", "--r", "8"])
    assert f"{337_920 + 8 * (65_024 + 512):,} trainable parameters" in capsys.readouterr().out
    lora.main(["--dry-run", "--preset", "microstories", "--r", "256", "--alpha", "512", "--targets", "study"])
    assert "21,692,416 trainable parameters" in capsys.readouterr().out

    lora.main(settings(model_dir, pairs_file, out))
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    refused(lora.main, settings(model_dir, pairs_file, out), "--resume", "--overwrite")
    lora.main(["merge", str(out), "--init", str(model_dir), "--out", str(tmp_path / "merged")])
    refused(lora.main, ["merge", out, "--init", model_dir, "--out", tmp_path / "merged"], "merged", "already")
    refused(lora.main, ["merge", out, "--init", tmp_path / "merged", "--out", tmp_path / "twice"], "another base model")
    refused(lora.main, ["merge", tmp_path, "--init", model_dir, "--out", tmp_path / "twice"], "adapter_config.json")
    assert not (tmp_path / "twice").exists()
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_what_is_merged_on_the_shapes_of_others_computes_the_same(name, tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(tiny_config(tok.vocab_size, **GEOMETRIES[name]))
    lora.add(model, ["q_proj", "v_proj", "down_proj"], 4, 8)
    for module in lora.adapters(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n}
    save_model(tmp_path, lora.merged(model), tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    idx = torch.randint(0, tok.vocab_size, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)
