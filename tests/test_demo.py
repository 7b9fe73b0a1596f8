"""demo.py: what the page shows, and the page itself in a browser, where there is one."""
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import torch
from conftest import ROOT, random_model, tiny_config

import demo
import sample
from checkpoint import load_model, save_model
from dataset import encode_prompt
from model import GPT

TALE = "小猫在河边捡到一个铲子，<b>&问：“最后还给松鼠”"
ENDLESS = "很久"
SAMPLING = 0, 1.0, 30, 40, 7  # temperature, top-p, top-k, tokens, seed


def teller(tok, story, ends=True, **changes):
    """A model that tells one story, whatever it is asked, or one that tells it again and again: without attention each
    token follows from the one before."""
    ids = [encode_prompt(tok, "")[-1], *tok.encode(story)]
    assert len(set(ids)) == len(ids), "a token that comes twice has two successors"
    model = GPT(tiny_config(tok.vocab_size, n_embd=128, tie_embeddings=False, **changes)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        torch.nn.init.normal_(model.model.embed_tokens.weight, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.zero_()
        for token, following in zip(ids, [*ids[1:], tok.eos_id if ends else ids[1]]):
            model.lm_head.weight[following] += model.model.embed_tokens.weight[token]
    return model


# ---- the marks ----

def words(*names):
    return {"词汇": list(names)}


def test_marked_words_wherever_they_stand():
    assert demo.marked("铲子和铲子。", words("铲子", "草地")) == (
        '<mark class="word">铲子</mark>和<mark class="word">铲子</mark>。')
    assert demo.marked("哈哈哈哈", words("哈哈")) == '<mark class="word">哈哈</mark>' * 2
    assert demo.marked("", words("铲子")) == ""


def test_marked_is_safe_html():
    assert demo.marked("a<b>&\"'", {}) == "a&lt;b&gt;&amp;&quot;&#x27;"
    assert demo.marked("一个<i>&在", words("<i>")) == '一个<mark class="word">&lt;i&gt;</mark>&amp;在'
    assert "&lt;铲 &amp;" in demo.story_html("", words("<铲 &"), True)
    assert demo.marked("a.c abc", words("a.c")) == '<mark class="word">a.c</mark> abc'  # no pattern


def test_marked_overlaps():
    asked = words("铲子", "子") | {"随机句子": "他有铲子。"}
    assert demo.marked("“他有，铲子”。子", asked) == (
        '“<mark class="sentence">他有，</mark><mark class="word">铲子</mark>”。<mark class="word">子</mark>')


def test_marked_finds_a_sentence_where_check_does():
    two = {"随机句子": "天空中飘着ＡＢ朵 白云。风停了！"}
    assert demo.marked("看天空中，飘着ab朵白云吗", two) == '看<mark class="sentence">天空中，飘着ab朵白云</mark>吗'
    assert demo.marked("……", {"随机句子": "。"}) == "……"  # nothing to look for


def test_story_html_says_what_is_met():
    asked = words("铲子", "草地") | {"特点": ["对话", "转折"], "摘要": "甲", "随机句子": "他有铲子。"}
    for ended, sign in ((True, '<span class="missed">✗'), (False, '<span class="open">…')):
        html = demo.story_html("“他有铲子。”", asked, ended)
        assert '<span class="met">✓ 词汇 铲子</span>' in html
        assert f"{sign} 词汇 草地</span>" in html
        assert "✓ 特点 对话" in html and "✓ 随机句子" in html
        assert "转折" not in html and "摘要" not in html  # no rule can tell


# ---- the fields ----

def test_fields_become_constraints():
    assert demo.asked(" 铲子、“草地”\n", ["对话"], "", "白云。") == {
        "词汇": ["铲子", "草地"], "特点": ["对话"], "随机句子": "白云。"}


def last(models, *fields):
    *_, texts = demo.write(models, *fields)
    return texts


@pytest.mark.parametrize("fields, says", [
    (("", [], " ", ""), "至少填写一项"), (("，，", [], "", ""), "至少填写一项"),
    (("铲子\n草地", [], "", ""), "词汇.*一行"), (("", [], "甲\r\n乙", ""), "摘要.*一行"),
    (("", [], "长" * 200, ""), "太长.*128")])
def test_bad_fields_say_so_on_the_page(model_dir, fields, says):
    texts = last([load_model(model_dir)] * 2, *fields, *SAMPLING)
    assert len(texts) == 2
    for text in texts:
        assert re.search(f'class="problem".*{says}', text), text


# ---- writing ----

def test_two_models_write_what_sample_writes(model_dir, tok, capsys):
    torch.manual_seed(0)
    other = random_model(tiny_config(tok.vocab_size), seed=5)
    fields = "铲子", ["对话"], "", ""
    models = [load_model(model_dir), (other, tok)]
    texts = last(models, *fields, 0.9, 0.9, 30, 40, 7)
    assert texts[0] != texts[1]
    for (model, tokenizer), text in zip(models, texts):
        sample.print_story(model, tokenizer, "instruction", "词汇：铲子\n特点：对话", 40, 7,
                           {"temperature": 0.9, "top_p": 0.9, "top_k": 30})
        story = capsys.readouterr().out.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        assert text.startswith(f'<div class="story">{demo.marked(story, words("铲子"))}</div>')
    # the same model twice, the same seed: the same story; no seed: another one each time
    for seed in 7, None:
        one, two = last(models[:1] * 2, *fields, 1.0, 1.0, 0, 40, seed)
        assert one == two
    assert last(models[:1], *fields, 1.0, 1.0, 0, 40, None) != [one]


def test_the_story_comes_in_pieces(tok):
    models = [(teller(tok, TALE), tok), (teller(tok, ENDLESS, ends=False), tok)]
    states = list(demo.write(models, "铲子，草地", [], "", "", *SAMPLING))
    first = [state[0] for state in states]
    assert "…" in first[0] and "✗" not in first[0]
    assert "✓" in next(text for text in first if "✗" in text)  # at its end, before the other's
    assert "✗" not in states[-2][1] and states[-1][1].count("✗") == 2
    assert all(len(b) >= len(a) - 20 for a, b in itertools.pairwise(first))


# ---- the command ----

def test_without_gradio_one_line_says_so(monkeypatch, model_dir, refused):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(demo.main, ["--ckpt", model_dir], f"pip install {demo.GRADIO}")


def test_bad_arguments(tmp_path, refused, monkeypatch):
    refused(demo.main, ["--port", "70000"], "70000")
    refused(demo.main, ["--ckpt", "a", "b", "c"], "one model or two")
    monkeypatch.setitem(sys.modules, "gradio", sys)  # not used before the model is loaded
    refused(demo.main, ["--ckpt", tmp_path], tmp_path)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "demo.py", "requirements-dev.txt"])
def test_all_name_the_same_gradio(name):
    assert set(re.findall(r"gradio==[\d.]+", (ROOT / name).read_text(encoding="utf-8"))) == {demo.GRADIO}


# ---- the page, in a browser ----

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(tok, tmp_path_factory):
    """The address of a page of two models: one tells TALE, the other never ends."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    save_model(folder / "tale", teller(tok, TALE), tok)
    save_model(folder / "endless", teller(tok, ENDLESS, ends=False, block_size=2**16), tok)
    port = free_port()
    command = [sys.executable, ROOT / "demo.py", "--ckpt", "tale", "endless", "--port", str(port), "--device", "cpu"]
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}  # nobody is there
    with subprocess.Popen(command, cwd=folder, env=os.environ | proxies, stdout=subprocess.PIPE,
                          encoding="utf-8") as process:
        try:
            assert process.stdout.readline() == f"tale, endless: http://127.0.0.1:{port} (Ctrl-C ends)\n"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(locale="zh-CN")
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server)
    yield page
    page.close()
    assert requests and not errors
    assert {urlsplit(url).hostname for url in requests if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}


def test_a_story_in_the_browser(page, server, tmp_path):
    page.get_by_label("词汇").fill("铲子，<i>草地</i>")
    page.get_by_label("随机句子").fill("最后，还给松鼠。")
    page.get_by_label("对话").check()
    page.get_by_text("采样设置").click()
    page.get_by_label("最多生成的").last.fill("60000")
    page.get_by_label("温度").last.fill("0")
    page.get_by_role("button", name="写故事").click()
    # the first model ends, while the other goes on and on
    tale, endless = page.locator(".story").nth(0), page.locator(".story").nth(1)
    page.locator(".missed").first.wait_for()
    assert tale.inner_text() == TALE
    assert tale.locator("mark.word").all_inner_texts() == ["铲子"]
    assert tale.locator("mark.sentence").all_inner_texts() == ["最后还给松鼠"]
    assert page.locator(".met").all_inner_texts() == ["✓ 词汇 铲子", "✓ 特点 对话", "✓ 随机句子"]
    assert page.locator(".missed").all_inner_texts() == ["✗ 词汇 <i>草地</i>"]
    assert page.locator(".story b, .missed i").count() == 0
    length = len(endless.inner_text())
    page.wait_for_function(f"document.querySelectorAll('.story')[1].innerText.length > {length}")
    page.get_by_role("button", name="停止").click()
    page.wait_for_timeout(500)
    length = len(endless.inner_text())
    page.wait_for_timeout(500)
    assert len(endless.inner_text()) == length < 60000
    page.screenshot(path=tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_only_this_machine_can_ask(server):
    with pytest.raises(OSError):  # another of its own addresses; a server for all would answer
        socket.create_connection(("127.0.0.2", urlsplit(server).port), 2)


def test_bad_input_in_the_browser(page, server):
    page.get_by_role("button", name="写故事").click()
    page.locator(".problem").first.wait_for()
    assert "至少填写一项" in page.locator(".problem").first.inner_text()
