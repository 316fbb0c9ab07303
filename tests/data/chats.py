"""Small tokenizers and chat templates of every kind, and how tests read what is learnt."""

from __future__ import annotations

from itertools import groupby

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specforge.data.conversations import parse_record
from specforge.data.templates import ChatTemplate
from specforge.data.turns import TokenSample

_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_SAYS = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}<|im_end|>\n{% endfor %}" + _ASKS
)

# What templates do, by name; all of them are known from published models.
TEMPLATES = {
    "chatml": "{% for m in messages %}" + _SAYS + "{% endfor %}" + _ASKS,
    "default system prompt": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + _SAYS + "{% endfor %}" + _ASKS
    ),
    "alternating": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "generation tags": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}" + _SAYS + "{% endif %}{% endfor %}" + _ASKS
    ),
    "drops old reasoning": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}<|im_start|>assistant\n"
        "<think>{{ m.reasoning_content }}</think>{{ m.content }}<|im_end|>\n{% else %}"
        + _SAYS
        + "{% endif %}{% endfor %}"
        + _ASKS
    ),
    "opens reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "channels": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if '[final]' in m.content %}"
        "{{ raise_exception('content holds channel markers') }}{% endif %}{% if m.thinking and loop.last %}"
        "<|im_start|>assistant[analysis]{{ m.thinking }}<|im_end|>{% endif %}<|im_start|>assistant[final]"
        "{{ m.content }}<|im_end|>{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
    "no generation prompt": "{% for m in messages %}" + _SAYS + "{% endfor %}",
    "asks with a line break": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "trims": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "arguments as JSON": _CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}"),
    "arguments by name": _CALLS.replace(
        "ARGUMENTS", "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}"
    ),
    "arguments added": _CALLS.replace("ARGUMENTS", "{{ '' + c.function.arguments }}"),
    "arguments printed": _CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}"),
    "calls instead of content": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}<call>"
        "{{ m.tool_calls[0].function.name }}</call>{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + _ASKS
    ),
    "closes reasoning": "{% for m in messages %}"
    + _SAYS
    + "{% endfor %}"
    + _ASKS.replace("{% endif %}", "<think></think>{% endif %}"),
    "shows or closes reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{{ '<think>' + m.reasoning_content if m.reasoning_content else '' }}</think>{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}" + _ASKS.replace("{% endif %}", "</think>{% endif %}")
    ),
    "shows or opens reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{{ '<think>' + m.reasoning_content if m.reasoning_content else '' }}</think>{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}" + _ASKS.replace("{% endif %}", "<think>{% endif %}")
    ),
    "shows half of what it asks with": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '</think>' if m.role == 'assistant' else '' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + _ASKS.replace("{% endif %}", "<think></think>{% endif %}")
    ),
    "system prompt before the last question": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content + ' ' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ system if loop.last else '' }}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "ends a text once more": (
        "{% for m in messages %}" + _SAYS + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% else %}<|im_end|>{% endif %}"
    ),
    "tool results closed otherwise when answered": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '\n' if m.role == 'tool' and not loop.last else '' }}<|im_end|>\n{% endfor %}" + _ASKS
    ),
    "shows no reasoning, asks with a line break": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think></think>' if m.role == 'assistant' else '' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + _ASKS.replace("{% endif %}", "<think>\n{% endif %}")
    ),
    "always asks": (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}[answer]{% endif %}{{ m.content }}"
        "<|im_end|>{% endfor %}[assistant]"
    ),
    "date": "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}" + _SAYS + "{% endfor %}" + _ASKS,
}


TEMPLATES["system prompt before the last question, space before the answer"] = TEMPLATES[
    "system prompt before the last question"
].replace("{% else %}{{ m.content", "{% else %} {{ m.content")


def tokenizer(kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, one that merges some with what follows, or one that puts a space before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    if kind == "spaces":
        words = ["▁", "\n", *map(chr, range(33, 127)), "é", "▁H", "▁Hi"]
        made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "H"), ("▁H", "i")]))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        merges = [("Ċ", "Ċ"), ("Ġ", "H"), ("ĠH", "i"), ("o", "k"), ("ok", "Ċ")] if kind == "merging" else []
        vocabulary |= {a + b: len(alphabet) + i for i, (a, b) in enumerate(merges)}
        made = Tokenizer(models.BPE(vocabulary, merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    made.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )


def chat(template: str | None = "chatml", kind: str = "bytes", **options) -> ChatTemplate:
    """A chat template by name, or by its text, over one of the tokenizers."""
    made = tokenizer(kind)
    made.chat_template = TEMPLATES.get(template, template)
    return ChatTemplate(made, **options)


def marked(template: ChatTemplate, sample: TokenSample) -> str:
    """A sample's text, what is learnt between « and »."""
    text = ""
    for learnt, group in groupby(zip(sample.loss_mask, sample.input_ids, strict=True), key=lambda pair: pair[0]):
        piece = template.decode([token for _, token in group])
        text += f"«{piece}»" if learnt else piece
    return text


def learnt(template: ChatTemplate, row: dict) -> list[str]:
    """The marked text of a record's samples."""
    return [marked(template, sample) for sample in template.encode(parse_record("d.jsonl, line 1", row))]


def says(role: str, content: object = "", **more) -> dict:
    """A message."""
    return {"role": role, "content": content, **more}


def talk(*texts: str, **more) -> dict:
    """A record of a conversation between a user, who begins, and the assistant."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [says(role, text) for role, text in zip(roles, texts, strict=False)], **more}
