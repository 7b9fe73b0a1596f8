"""A page for the browser: order a story, watch it being written, see what it meets. Needs gradio.

    pip install gradio==6.31.0
    python demo.py                                      out/sft, else the base model
    python demo.py --ckpt base out/sft                  two models side by side, with the same seed
"""
import itertools
import os
import random
import re
from html import escape

import common
from common import fail, number, pick_device, to_path

import torch

from checkpoint import find_model, load_model
from constraints import FEATURE, FEATURES, NEWLINE, SENTENCE, SUMMARY, WORDS, check, fold, parse, render, sentences
from dataset import encode_prompt
from decoding import stream
from sample import SINGLE, flat

GRADIO = "gradio==6.31.0"
CSS = """
.story {white-space: pre-wrap; line-height: 1.9; font-size: 1.1em; margin-bottom: 1em}
.met, .open, .missed, .problem {display: inline-block; margin: 0 .6em .4em 0; padding: 1px 8px; border-radius: 3px}
.story mark, .met {color: #14532d; background: #bbf7d0; border-radius: 3px}
.story mark.sentence {color: #1e3a8a; background: #bfdbfe}
.missed, .problem {color: #7f1d1d; background: #fecaca}
"""


def asked(words, features, summary, sentence):
    """What the fields hold -> constraints. Raises ValueError, in Chinese, if it is nothing, or more than a line."""
    fields = {WORDS: words, FEATURE: "，".join(features), SUMMARY: summary, SENTENCE: sentence}
    for key, text in fields.items():
        if NEWLINE.search(text.strip()):
            raise ValueError(f"“{key}”只能写一行，请去掉换行。")
    constraints = parse("\n".join(f"{key}：{text.strip()}" for key, text in fields.items()))[0]
    if not constraints:
        raise ValueError("请至少填写一项：词汇、特点、摘要或随机句子。")
    return constraints


def places(story, sentence):
    """[(start, end)] of a sentence in the story, found as `check` finds it: punctuation, width and case aside."""
    at = [i for i, char in enumerate(story) for _ in fold(char)]  # place in the folded story -> place in the story
    wanted = re.escape(fold(sentence))
    return [(at[found.start()], at[found.end() - 1] + 1)
            for found in re.finditer(wanted, "".join(map(fold, story))) if wanted]


def marked(story, constraints):
    """The story as HTML, the words and sentences that were asked for in <mark>. A word inside a sentence has its own
    mark, a word inside a longer one has none."""
    marks = [None] * len(story)  # (class, start) of the mark around each character
    for sentence in sentences(constraints.get(SENTENCE, "")):
        for start, end in places(story, sentence):
            marks[start:end] = [("sentence", start)] * (end - start)
    for word in sorted(constraints.get(WORDS, ()), key=len):
        for found in re.finditer(re.escape(word), story):
            marks[found.start():found.end()] = [("word", found.start())] * len(word)
    html = []
    for mark, group in itertools.groupby(range(len(story)), key=marks.__getitem__):
        text = escape("".join(story[i] for i in group))
        html.append(f'<mark class="{mark[0]}">{text}</mark>' if mark else text)
    return "".join(html)


def story_html(story, constraints, ended):
    """The story, and what it meets of what a rule can check: ✓, or … while it is written, and ✗ at its end."""
    html = [f'<div class="story">{marked(story, constraints)}</div>']
    for name, ok in flat(check(story, constraints)).items():
        kind, sign = ("met", "✓") if ok else ("missed", "✗") if ended else ("open", "…")
        html.append(f'<span class="{kind}">{sign} {escape(name)}</span>')
    return "".join(html)


def pieces(model, tokenizer, instruction, **sampling):
    """-> an iterator over the story's pieces of text. Raises ValueError, in Chinese, if the prompt leaves no room."""
    prompt, limit = encode_prompt(tokenizer, instruction), model.config.block_size
    if len(prompt) >= limit:
        raise ValueError(f"要求太长：共 {len(prompt)} 个 token，而模型连同故事最多只能处理 {limit} 个，请缩短。")
    ids = stream(model, [prompt], eos_id=tokenizer.eos_id, **sampling)
    return tokenizer.decode_stream(row[0] for row in ids)


def write(models, words, features, summary, sentence, temperature, top_p, top_k, max_new_tokens, seed):
    """Let all models [(GPT, Tokenizer)] write the story that the fields ask for, a piece of each in turn; after each
    turn yield a list with the HTML of each. seed None is a random one, the same for all."""
    seed = random.getrandbits(32) if seed is None else int(seed)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": int(top_k) or None, "seed": seed}
    try:
        constraints = asked(words, features, summary, sentence)
        texts = [pieces(*model, render(constraints), max_new_tokens=int(max_new_tokens), **sampling)
                 for model in models]
    except ValueError as e:
        yield [f'<div class="problem">{e}</div>'] * len(models)
        return
    stories = [""] * len(models)
    for new in itertools.zip_longest(*texts):  # None: this story has ended
        stories = [story + (piece or "") for story, piece in zip(stories, new)]
        yield [story_html(story, constraints, piece is None) for story, piece in zip(stories, new)]
    yield [story_html(story, constraints, True) for story in stories]


def build(gr, models):
    """-> the page. models: {name: (GPT, Tokenizer)}"""
    longest = max(model.config.block_size for model, _ in models.values())
    with gr.Blocks(title="MicroStories", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# MicroStories\n按要求写小故事。要求的词和句子在文中标出；能用规则检查的，文后标 ✓ 或 ✗。")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                words = gr.Textbox(label=WORDS, placeholder="铲子，草地")
                features = gr.CheckboxGroup(FEATURES, label=FEATURE, info="其中只有“对话”能用规则检查")
                summary = gr.Textbox(label=SUMMARY, placeholder="一只小蚂蚁找到了一个苹果。")
                sentence = gr.Textbox(label=SENTENCE, placeholder="天空中飘着几朵白云。")
                with gr.Row():
                    start = gr.Button("写故事", variant="primary", min_width=80)
                    stop = gr.Button("停止", min_width=80)
                with gr.Accordion("采样设置", open=False):
                    sampling = [
                        gr.Slider(0, 2, SINGLE["temperature"], step=0.05, label="温度", info="0：总取概率最高的"),
                        gr.Slider(0.05, 1, SINGLE["top_p"], step=0.05, label="top-p"),
                        gr.Slider(0, 200, SINGLE["top_k"], step=1, label="top-k", info="0：不限"),
                        gr.Slider(1, longest, min(400, longest), step=1, label="最多生成的 token 数"),
                        gr.Number(1337, minimum=0, precision=0, label="随机种子", info="留空：每次不同")]
            boxes = []
            for name in models:
                with gr.Column(scale=3, min_width=320):
                    boxes.append(gr.HTML(label=name, show_label=True, container=True, padding=True, min_height=300))

        def show(*fields):
            for texts in write(list(models.values()), *fields):
                yield dict(zip(boxes, texts))

        writing = start.click(show, [words, features, summary, sentence, *sampling], boxes, show_progress="hidden")
        stop.click(None, cancels=writing)
    return page


def parse_args(argv=None):
    parser = common.command_line("A page for the browser, on this machine only: stories from instructions.")
    parser.add_argument("--ckpt", nargs="+", type=to_path, metavar="DIR",
                        help="one or two model directories (default: out/sft, else the base model)")
    parser.add_argument("--port", type=number(int, lambda port: 0 < port < 2**16, "is not a port"), default=7860,
                        help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    args = parser.parse_args(argv)
    if args.ckpt and len(args.ckpt) > 2:
        fail("--ckpt takes one model or two")
    return args


def main(argv=None):
    args = parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ImportError:
        fail(f"the page needs gradio: pip install {GRADIO}")
    try:
        device = pick_device(args.device)
        models = {}
        for ckpt in args.ckpt or [find_model()]:
            model, tokenizer = load_model(ckpt)
            models[str(ckpt)] = model.to(device, torch.float32).eval(), tokenizer
    except (ValueError, OSError) as e:
        fail(e)
    page = build(gr, models)
    os.environ["no_proxy"] = "*"  # gradio asks for its own page, through a proxy where one is set
    try:
        page.launch(server_name="127.0.0.1", server_port=args.port, share=False, ssr_mode=False, run_history=False,
                    footer_links=[], css=CSS, head='<script>document.documentElement.lang = "zh-CN"</script>',
                    quiet=True, prevent_thread_lock=True)
    except OSError:
        fail(f"--port {args.port} is in use, or not allowed")
    print(f"{', '.join(models)}: http://127.0.0.1:{args.port} (Ctrl-C ends)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    from demo import main
    main()
