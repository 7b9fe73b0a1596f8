"""train_rl.py: what is rewarded, which tokens learn from it, and that it learns."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_model, tiny_config

import lora
import train_rl
import train_sft
from checkpoint import load_last, load_model, save_model
from data import builtin, judged
from dataset import collate, encode_prompt
from decoding import Decoder
from model import IGNORE
from sample import log_probs
from train_rl import Rollouts, advantages, judge, lcs_length, rejection_sampled

ROW = {"constraints": {"词汇": ["小河", "皮球"], "随机句子": "河水哗啦啦地流着，真好听。"}, "story": None, "rivals": []}
MEETS = "小猫在小河边拍皮球。河水哗啦啦地流着，真好听。"
TWICE = MEETS + "天上的云飘走了。它抬起头看着，又跑又跳，直到那只皮球滚得不见。真好！天上的云飘走了。真好！"


def rollouts(tok, rows, **settings):
    model = random_model(tiny_config(tok.vocab_size, block_size=96))
    return Rollouts(model, tok, rows, random_model(model.config, seed=1),
                    **{"prompts": 2, "group": 4, "batch_size": 3, "max_new_tokens": 12, **settings})


# ---- the reward ----

@pytest.mark.parametrize("story, ended, reward", [
    (MEETS, True, 1), (MEETS, False, 0), ("", True, 0),
    (MEETS.replace("皮球", "气球"), True, 0.75),
    (MEETS.replace("哗啦啦", "哗啦"), True, 0.75),      # 10 of 11 characters, folded
    (MEETS.replace("哗啦啦地流着", "流"), True, 0.5),
    ("小河，皮球。" + MEETS, True, 0.5), ("皮球、小河。" + MEETS, True, 0.5), ("小河；皮球！" + MEETS, True, 0.5),
    ("小河\n皮球\n" + MEETS, True, 0.5), ("小河和皮球。" + MEETS, True, 1),  # two things may be named together
    (MEETS + MEETS, True, pytest.approx(1 - 0.5 - (20 / 43 - 0.1))),
    (TWICE, True, 0.5), (TWICE.replace("天上的云飘走了。", "云走了。"), True, 1)])
def test_what_a_story_is_worth(story, ended, reward):
    verdict = judge(ROW, story, ended, usual_repetition=0.1)
    assert verdict["reward"] == reward and verdict["whole"] == (reward == 1)


@pytest.mark.parametrize("told, listed", [
    ("风筝，小河，皮球。", True), ("小河、皮球\n风筝", True), ("小河；\n 风筝 皮球", True),
    ("小河和皮球和风筝都在。", False), ("小河，小河，小河！", False), ("小河，皮球。风筝飞了。", False)])
def test_words_with_nothing_but_marks_between_them_are_a_list(told, listed):
    assert train_rl.misused(["小河", "皮球", "风筝"], told) == listed


def test_a_sentence_is_nearly_there_only_in_order_and_in_one_sentence():
    assert [lcs_length("河水流着", other) for other in ("河水流着", "小河里的水流着呢", "着流水河", "")] == [4, 4, 1, 0]
    spread = "小猫在小河边拍皮球。河里的水。哗啦啦地。流着呢，真。好听。"
    assert judge(ROW, spread, True, 1.0)["随机句子"] == 0


@pytest.mark.parametrize("story, share", [
    ("小猫丢了球，它哭了，后来找到了。", 1), ("小猫丢了球，后来找到了，它很高兴。", 5 / 6),
    ("小猫丢了球。天黑了，下起了雨。", 2 / 3)])
def test_half_of_a_summary_is_how_much_of_it_is_told(story, share):
    row = {"constraints": {"摘要": "小猫丢了球，它哭了，后来找到了。"}, "rivals": ["小狗去上学，迟到了。"]}
    assert judge(row, story, True, 1.0)["reward"] == pytest.approx(share)


def test_one_word_is_no_list_and_what_no_rule_can_tell_does_not_count():
    one = ROW | {"constraints": {"词汇": ["小河"], "特点": ["转折"]}}
    assert judge(one, MEETS, True, 1.0) == {"reward": 1, "whole": True, "ended": True, "rep4": 0, "词汇": 1}


# ---- what is learnt from ----

def test_each_story_is_compared_with_its_own_group_and_equal_groups_are_left_out():
    groups = [[{"reward": r, "row": (g, i)} for i, r in enumerate(rewards)]
              for g, rewards in enumerate([(1, 0, 0.5), (0.5, 0.5, 0.5), (0.2, 0.2, 0.8)])]
    groups[1][0]["row"] = ([5, 6, 7, 8], [IGNORE, IGNORE, 7, 8])
    assert advantages(groups) == [((0, 0), 0.5), ((0, 1), -0.5), ((0, 2), 0.0), ((2, 0), pytest.approx(-0.2)),
                                  ((2, 1), pytest.approx(-0.2)), ((2, 2), pytest.approx(0.4))]
    assert advantages(groups[1:2]) == [(([5, 6, 7], [IGNORE, IGNORE, 7]), 0.0)]  # one token, which counts for nothing
    for group in groups:
        for story in group:
            story["whole"] = story["reward"] >= 0.5
    assert rejection_sampled(groups) == [((0, 0), 1), ((0, 2), 1), (groups[1][0]["row"], 1), ((1, 1), 1), ((2, 2), 1)]
    own = [("own", i) for i in range(4)]  # a quarter of all, as far as there are whole ones
    assert rejection_sampled(groups, own)[5:] == [(("own", 0), 1)]
    assert rejection_sampled(groups + groups, own)[10:] == [(("own", 0), 1), (("own", 1), 1), (("own", 2), 1)]
    assert rejection_sampled(groups[2:], own)[1:] == []


def test_the_probabilities_of_writing_are_those_of_training(tok):
    model = random_model(tiny_config(tok.vocab_size, block_size=96))
    prompt, story = encode_prompt(tok, "词汇：小河"), tok.encode(MEETS) + [tok.eos_id]
    x, y = collate([(prompt + story, [IGNORE] * len(prompt) + story)])
    trained = log_probs(model, x, y)[0]
    decoder, sampled = Decoder(model, 1, 96), []
    with torch.inference_mode():
        for i in range(len(story)):
            ids = prompt if i == 0 else [story[i - 1]]
            pos = torch.arange(len(prompt)) if i == 0 else torch.tensor([len(prompt) + i - 1])
            sampled.append(decoder(torch.tensor([ids]), pos[None])[0].log_softmax(-1)[story[i]].item())
    assert trained[y[0] != IGNORE].tolist() == pytest.approx(sampled, abs=1e-5)
    assert trained[y[0] == IGNORE].abs().max() == 0
    loss = model(x, y, torch.full(y.shape, -1.0))
    assert loss.item() == pytest.approx(sum(sampled), rel=1e-5)


def test_story_and_end_learn_and_prompt_and_padding_do_not(tok):
    chosen = [((encode_prompt(tok, "词汇：小河") + told, [IGNORE] * len(encode_prompt(tok, "词汇：小河")) + told), a)
              for told, a in ((tok.encode("小猫。") + [tok.eos_id], 0.5), (tok.encode(MEETS), -0.5))]
    some = rollouts(tok, [ROW])
    x, y, weights = some.weighted(chosen)
    assert weights.shape == y.shape and (y[0] == tok.eos_id).sum() == 1 and (y[1] == tok.eos_id).sum() == 0
    model = some.model
    logits = torch.zeros(*y.shape, tok.vocab_size, requires_grad=True)
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, ignore_index=IGNORE, reduction="none")
    (nats * weights).sum().backward()
    learnt = logits.grad.abs().sum(-1) > 0
    assert learnt.equal(y != IGNORE)
    # every token of a story weighs the same, however long the story is
    of_target = logits.grad.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    first, second = of_target[0][y[0] != IGNORE], of_target[1][y[1] != IGNORE]
    assert torch.allclose(first, first[0]) and torch.allclose(second, -first[0]) and len(first) < len(second)
    loss, n = some.loss(model, (x, y, weights))
    with torch.no_grad():
        assert loss.item() == pytest.approx(-(weights * log_probs(model, x, y)).sum().item(), rel=1e-4)
    assert n == (y != IGNORE).sum()


def test_a_story_that_has_ended_learns_its_end_and_one_that_was_cut_has_none(tok, monkeypatch):
    some = rollouts(tok, [ROW])
    monkeypatch.setattr(train_rl, "generate", lambda *_, samples, **__: [[7] * n for n in (12, 0, 5)])
    [group] = some.write([ROW], 3, seed=1, temperature=1.0)
    prompt = encode_prompt(tok, "词汇：小河，皮球\n随机句子：河水哗啦啦地流着，真好听。")
    assert [story["row"][0][len(prompt):] for story in group] == [[7] * 12, [tok.eos_id], [7] * 5 + [tok.eos_id]]
    assert [story["ended"] for story in group] == [False, True, True]
    for story in group:
        ids, labels = story["row"]
        assert ids[:len(prompt)] == prompt and labels == [IGNORE] * len(prompt) + ids[len(prompt):]


def test_equal_stories_give_no_gradient(tok, monkeypatch):
    some = rollouts(tok, [ROW])
    monkeypatch.setattr(train_rl, "judge", lambda *_: {"reward": 0.5, "whole": False, "ended": True})
    loss, n = train_sft.backward(some.model, some(0), some.loss, list(some.model.parameters()),
                                 torch.autocast("cpu", enabled=False))
    assert loss == 0 and n > 0 and all(not p.grad.any() for p in some.model.parameters() if p.grad is not None)
    assert some.measured()["equal_groups"] == 1


def test_kl_takes_from_the_advantage_what_has_become_likelier(tok):
    story = tok.encode(MEETS)
    chosen = [(([1] + story, [IGNORE] + story), 0.0)]
    some = rollouts(tok, [ROW], kl=0.5)
    other = tok.encode("小狗。")
    some.weighted([(([1] + other, [IGNORE] + other), 0.0)])  # another micro-batch of the step counts, too
    x, y, weights = some.weighted(chosen)
    change = log_probs(some.model, x, y) - log_probs(some.reference, x, y)
    assert torch.allclose(weights, -0.5 * change) and weights.abs().max() > 0
    x2, y2 = collate([([1] + other, [IGNORE] + other)])
    of_other = (log_probs(some.model, x2, y2) - log_probs(some.reference, x2, y2))[y2 != IGNORE]
    expected = torch.cat([change[y != IGNORE], of_other]).mean().item()
    figures = some.measured()
    assert figures["kl"] == pytest.approx(expected, abs=1e-6) and figures["entropy"] > 0
    assert some.measured() == {}


def test_a_bandit_of_two_tokens_converges(tok, tmp_path, monkeypatch):
    """Each of two instructions is paid for a word of its own: only with groups and prompts in order is that learnt."""
    pays = {"皮球": "猫", "小河": "狗"}
    rows = [{"constraints": {"词汇": [word]}, "story": None, "rivals": []} for word in pays]
    some = rollouts(tok, rows, group=16, batch_size=32, max_new_tokens=1)
    prompts, ends = [encode_prompt(tok, f"词汇：{word}") for word in pays], [tok.encode(name) for name in pays.values()]
    assert [len(ids) for ids in ends] == [1, 1]
    both = [(prompt + ids, [IGNORE] * len(prompt) + ids) for prompt in prompts for ids in ends]
    train_sft.train(some.model, lambda step: [collate(both)], [], tmp_path, lambda _: None, steps=60, lr=3e-3)
    monkeypatch.setattr(train_rl, "judge", lambda row, story, *_: {
        "reward": float(story == pays[row["constraints"]["词汇"][0]]), "whole": False, "ended": False})
    train_sft.train(some.model, some, [], tmp_path, lambda _: None, steps=80, lr=3e-3, loss_fn=some.loss,
                    measured=some.measured)
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl", encoding="utf-8")]
    rewards = [line["reward"] for line in log if "reward" in line]
    assert 0.2 < sum(rewards[:3]) / 3 < 0.7 and sum(rewards[-5:]) / 5 > 0.9


# ---- the command ----

@pytest.fixture
def run(tok, tmp_path, monkeypatch):
    """Run train_rl.py on a tiny model and few instructions -> the lines of its log."""
    init = tmp_path / "init"
    save_model(init, random_model(tiny_config(tok.vocab_size, block_size=256)), tok)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"词汇：{a}，{b}\n特点：对话"}, ensure_ascii=False) + "\n"
                            for a in "猫狗鸭鹿" for b in "河树草路"), encoding="utf-8")
    monkeypatch.setattr(builtin, "PLAIN", 3)
    monkeypatch.setattr(train_sft, "print_cases", lambda *_: None)

    def run(*argv, out="out"):
        train_rl.main(["--init", str(init), "--data", str(data), "--val-fraction", "0.25", "--out", str(tmp_path / out),
                       "--prompts", "2", "--group", "3", "--max-steps", "4", "--device", "cpu", *map(str, argv)])
        return [json.loads(line) for line in open(tmp_path / out / "log.jsonl", encoding="utf-8")]
    run.init, run.data = init, data
    return run


def test_a_run_is_logged_drawn_and_resumed_bit_for_bit(run, tmp_path):
    log = run()
    steps = [line for line in log if "loss" in line]
    assert len(steps) == 4 and (tmp_path / "out" / "rl.png").stat().st_size > 10_000
    for line in steps:
        assert {"reward", "词汇", "特点", "ended", "rep4", "tokens", "entropy", "kl", "equal_groups"} <= set(line)
    judged = [line for line in log if "val_loss" in line]
    assert all(line["val_loss"] == pytest.approx(1 - line["val_reward"]) and line["plain_nll"] > 0 for line in judged)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)

    with pytest.MonkeyPatch.context() as patch:  # a learning rate that does not depend on the number of steps
        patch.setattr(train_sft, "get_lr", lambda *_: 1e-3)
        patch.setattr(train_rl, "judge", lambda row, story, *_: {"reward": len(story) % 3 / 3, "whole": False})
        whole = run("--eval-every", "2", out="flat")
        run("--max-steps", "2", "--eval-every", "2", out="flat_half")
        parts = run("--resume", "--max-steps", "4", "--eval-every", "2", out="flat_half")
    for log in (whole, parts):
        for line in log:
            line.pop("tokens_per_s", None)
    assert whole == parts and any(line.get("loss") for line in whole)
    start, end = (load_model(folder)[0] for folder in (run.init, tmp_path / "flat" / "last"))
    assert any((p != q).any() for p, q in zip(start.parameters(), end.parameters()))
    a, b = (load_model(tmp_path / name / "last")[0].state_dict() for name in ("flat", "flat_half"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("algo", ["pg", "rft"])
def test_an_adapter_is_trained_alone(run, tok, tmp_path, algo, monkeypatch):
    model, _ = load_model(run.init)
    lora.add(model, ["q_proj", "v_proj"], 2, 4, dropout=0.5)
    for module in lora.adapters(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    lora.save(tmp_path / "adapter", model, run.init)
    monkeypatch.setattr(train_rl, "judge", lambda row, story, *_: {
        "reward": len(story) % 3 / 3, "whole": len(story) % 2})
    monkeypatch.setattr(train_sft, "get_lr", lambda *_: 1e-3)  # does not depend on the number of steps
    usual = ["--adapter", tmp_path / "adapter", "--algo", algo]
    run(*usual)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tuned, _ = load_model(run.init, tmp_path / "out" / "last")
    before, after = (lora.adapters(m)["model.layers.0.self_attn.q_proj"].lora_B.weight for m in (model, tuned))
    assert not torch.equal(before, after)
    run(*usual, "--max-steps", "2", out="half")
    run("--resume", *usual, "--max-steps", "4", out="half")
    resumed, _ = load_model(run.init, tmp_path / "half" / "last")
    whole, parts = tuned.state_dict(), resumed.state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_user_errors_are_one_line(run, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    usual = ["--init", run.init, "--data", run.data, "--out", tmp_path / "new"]
    for argv, word in ((["--group", "1"], "--group 1"), (["--group", "0"], "--group"), (["--kl", "-1"], "--kl"),
                       (["--dtype", "bf16-mixed"], "bf16-mixed"),
                       (["--prompts", "9" * 30], "--prompts"), (["--epochs", "1"], "--epochs"),
                       (["--grad-accum", "2"], "--grad-accum"),
                       (["--adapter", "nowhere"], "nowhere"), (["--algo", "ppo"], "--algo")):
        refused(train_rl.main, [*usual, *argv], word)
    run("--max-steps", "1")
    refused(train_rl.main, ["--init", tmp_path / "out", *usual[2:-1], tmp_path / "out", "--overwrite"], "starts from")
    refused(train_rl.main, [*usual, "--log", "wandb"], "pip install wandb")
    run.data.write_text("".join(json.dumps({"instruction": f"特点：{name}"}) + "\n"
                                for name in ("转折", "坏结局", "伏笔", "冲突", "道德价值")), encoding="utf-8")
    refused(train_rl.main, usual, "can be checked")
    run.data.write_text("".join(json.dumps({"instruction": f"摘要：{a * 300}\n词汇：猫"}) + "\n" for a in "长短大小"))
    refused(train_rl.main, usual, "leaves no room")
    run.data.write_bytes(judged.HANDWRITTEN.read_bytes())
    refused(train_rl.main, usual, "by which models are judged")
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_stories_of_the_data_are_split_and_short_ones_are_read(run, tmp_path):
    rows = [{"instruction": f"词汇：{word}", "output": story}
            for story in ("猫。", "小猫来了。", "小狗来了。") for word in "猫狗来"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = train_rl.parse_args(["--data", str(folder), "--val-fraction", "0.3"])
    train, judged = train_rl.load_rows(args)
    assert len(train) + len(judged) == 9 and not {r["story"] for r in train} & {r["story"] for r in judged}
    assert run("--data", folder)


def test_a_finished_run_on_built_in_instructions_goes_on(run, tmp_path, monkeypatch, tok):
    save_model(tmp_path / "wide", random_model(tiny_config(tok.vocab_size, block_size=512)), tok)
    monkeypatch.setattr(builtin, "REINFORCED", 8)
    argv = ["--init", str(tmp_path / "wide"), "--out", str(tmp_path / "run"), "--prompts", "2", "--group", "2",
            "--device", "cpu"]
    monkeypatch.setattr(train_rl, "JUDGED", 2)
    train_rl.main([*argv, "--max-steps", "1"])
    train_rl.main([*argv, "--max-steps", "2", "--resume"])
    assert load_last(tmp_path / "run")[2]["step"] == 2


def test_two_processes_share_the_instructions(run, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_rl.py",
            "--init", run.init, "--data", run.data, "--out", tmp_path / "both", "--prompts", "4", "--group", "2",
            "--max-steps", "2", "--device", "cpu", "--val-fraction", "0.25"]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum("reward" in line for line in open(tmp_path / "both" / "log.jsonl", encoding="utf-8")) >= 2


def test_the_built_in_instructions_are_not_those_that_models_are_judged_by(monkeypatch):
    monkeypatch.setattr(builtin, "REINFORCED", 30)
    rows, judged = builtin.reinforcement(), builtin.reinforcement_validation(30)
    others = {record["output"] for record in builtin.held_out_instructions()} | set(builtin.plain_stories())
    told = [{row["story"] for row in some} for some in (rows, judged)]
    assert 15 < len(told[0]) < 30 == len(told[1]) and not told[0] & told[1] and not (told[0] | told[1]) & others
    assert all("摘要" in row["constraints"] or len(row["constraints"]["词汇"]) > 2 for row in rows + judged)
