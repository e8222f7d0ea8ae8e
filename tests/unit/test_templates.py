"""Chats under the templates of real models' families: what is trained on, what ends a turn, and what pads.

The templates are written for these tests in the format of each family, with what is peculiar to its published one; the
tokenizers are small ones of the same kind (byte-level or sentencepiece-like) with the family's special tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sdd.errors import UserError
from sdd.finetuning.module import TrainingRow, labelled
from sdd.models.chats import (
    PLAIN_TEMPLATE,
    accepted,
    answer_ids,
    chat_prompt_ids,
    end_of_turn,
    prepare_tokenizer,
    stop_ids,
    training_ids,
)
from sdd.models.lengths import lengths_of

TEXTS = ["What is 2 + 2?", "It is four.\nThe answer is 4.", "Be brief.", "user model assistant system 26 Jul 2024"]

LLAMA3 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}"
    "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    "{{ '\n\n' + ns.system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
"""Puts the system prompt into the task only while that is the last turn: with its answer, a chat begins otherwise."""
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{% if loop.index0 > ns.asked %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Takes an answer's train of thought apart from it, shows that of the last one, and writes an empty one if told to."""
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + (eos_token if loop.last else '\n') }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SMOL3 = (
    "{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% if '/no_think' in system %}{% set mode = '/no_think' %}{% endif %}"
    "{% set system = system.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{% set empty = '' if mode == '/think' else '<think>\n\n</think>\n' %}"
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\nMode: ' + mode + '\n' }}"
    "{{ (system if system else 'Think.' if mode == '/think' else 'Be helpful.') + '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + empty + m['content'].lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}"
    "{% elif m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + empty }}{% endif %}"
)
SILENT = (
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Drops the system prompt without a word, and ends a turn with no special token."""


@dataclass(frozen=True)
class Family:
    """Special tokens in order of their ids; what a chat of `What is 2 + 2?` must look like, system prompt and all."""

    template: str | None
    special: tuple[str, ...]
    bos: str | None
    eos: str
    prompt: str
    system: str
    target: str
    pad: str | None
    pieces: bool = False
    adds_bos: bool = True
    shipped_pad: str | None = None


Q, A, S = "What is 2 + 2?", "It is four.\nThe answer is 4.", "Be brief."
HEADER = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
L3USER = f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{Q}<|eot_id|>"
L3ASKED = "<|start_header_id|>assistant<|end_header_id|>\n\n"
IM = f"<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
SMOL_HEADER = "<|im_start|>system\nToday: 26 July 2024\nMode: /no_think\n"
FAMILIES = {
    "llama 3": Family(
        LLAMA3,
        (
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "<|finetune_right_pad_id|>",
        ),
        "<|begin_of_text|>",
        "<|eot_id|>",
        HEADER + L3USER + L3ASKED,
        HEADER + S + L3USER + L3ASKED,
        f"{A}<|eot_id|>",
        "<|finetune_right_pad_id|>",
    ),
    "llama 2": Family(
        LLAMA2,
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        f"<s>[INST] {Q} [/INST]",
        f"<s>[INST] <<SYS>>\n{S}\n<</SYS>>\n\n{Q} [/INST]",
        f" {A} </s>",
        "<unk>",
        pieces=True,
    ),
    "mistral": Family(
        MISTRAL,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        f"<s>[INST] {Q}[/INST]",
        f"<s>[INST] {S}\n\n{Q}[/INST]",
        f" {A}</s>",
        "<unk>",
        pieces=True,
    ),
    "mistral, with a system prompt": Family(
        MISTRAL_SYSTEM,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        f"<s>[INST] {Q}[/INST]",
        f"<s>[INST] {S}\n\n{Q}[/INST]",
        f" {A}</s>",
        "<unk>",
        pieces=True,
    ),
    "qwen 2.5": Family(
        QWEN25,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|im_start|>system\nYou are helpful." + IM,
        f"<|im_start|>system\n{S}" + IM,
        f"{A}<|im_end|>",
        "<|endoftext|>",
        adds_bos=False,
        shipped_pad="<|endoftext|>",
    ),
    "qwen 3": Family(
        QWEN3,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        None,
        "<|im_end|>",
        IM.removeprefix("<|im_end|>\n") + "<think>\n\n</think>\n\n",
        f"<|im_start|>system\n{S}" + IM + "<think>\n\n</think>\n\n",
        f"{A}<|im_end|>",
        "<|endoftext|>",
        adds_bos=False,
    ),
    "gemma 2": Family(
        GEMMA2,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        f"<bos><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n",
        f"<bos><start_of_turn>user\n{S}\n\n{Q}<end_of_turn>\n<start_of_turn>model\n",
        f"{A}<end_of_turn>",
        "<pad>",
        shipped_pad="<pad>",
    ),
    "gemma 3": Family(
        GEMMA3,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        f"<bos><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n",
        f"<bos><start_of_turn>user\n{S}\n\n{Q}<end_of_turn>\n<start_of_turn>model\n",
        f"{A}<end_of_turn>",
        "<pad>",
        shipped_pad="<pad>",
    ),
    "phi 3": Family(
        PHI3,
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        "<s>",
        "<|endoftext|>",
        f"<|user|>\n{Q}<|end|>\n<|assistant|>\n",
        f"<|system|>\n{S}<|end|>\n<|user|>\n{Q}<|end|>\n<|assistant|>\n",
        f"{A}<|end|>",
        "<unk>",
        adds_bos=False,
        shipped_pad="<|endoftext|>",
    ),
    "olmo 2": Family(
        OLMO2,
        ("<|endoftext|>", "<|pad|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        f"<|endoftext|><|user|>\n{Q}\n<|assistant|>\n",
        f"<|endoftext|><|system|>\n{S}\n<|user|>\n{Q}\n<|assistant|>\n",
        f"{A}<|endoftext|>",
        "<|pad|>",
        adds_bos=False,
    ),
    "smollm 3": Family(
        SMOL3,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        SMOL_HEADER + "Be helpful." + IM + "<think>\n\n</think>\n",
        SMOL_HEADER + S + IM + "<think>\n\n</think>\n",
        f"{A}<|im_end|>",
        "<|endoftext|>",
        adds_bos=False,
    ),
    "drops the system prompt": Family(
        SILENT,
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        f"<s>user: {Q}\nassistant: ",
        f"<s>user: {S}\n\n{Q}\nassistant: ",
        f"{A}</s>",
        "<unk>",
    ),
    "no template": Family(
        None,
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        f"<s>Question:\n{Q}\n\nAnswer:\n",
        f"<s>{S}\n\nQuestion:\n{Q}\n\nAnswer:\n",
        f"{A}</s>",
        "<unk>",
        pieces=True,
    ),
    "no template, no begin": Family(
        None,
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|>",
        f"Question:\n{Q}\n\nAnswer:\n",
        f"{S}\n\nQuestion:\n{Q}\n\nAnswer:\n",
        f"{A}<|endoftext|>",
        None,
        adds_bos=False,
    ),
}


@pytest.fixture(scope="module")
def made() -> Callable[[Family], Any]:
    """A function from a family to a new tokenizer of its kind, before anything is added to it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    @cache
    def trained(family: Family) -> Any:
        special = list(family.special)
        if family.pieces:
            tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
                    pre_tokenizers.Split(Regex(r"\n"), "isolated"),
                ]
            )
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
            alphabet = sorted(set("".join(TEXTS) + "[]/<>:INSTYQuestionAnswer▁\n"))
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        else:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
            )
        tokenizer.train_from_iterator(TEXTS * 4, trainer)
        if family.adds_bos:
            assert family.bos
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
            )
        return tokenizer.to_str()

    def make(family: Family) -> Any:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(trained(family)),
            bos_token=family.bos,
            eos_token=family.eos,
            unk_token="<unk>" if "<unk>" in family.special else None,
            pad_token=family.shipped_pad,
            chat_template=family.template,
        )

    return make


def said(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@every_family
def test_prompts_are_the_templates_own_with_one_begin_token(family: Family, made: Callable[[Family], Any]) -> None:
    tokenizer = prepare_tokenizer(made(family))
    for system, expected in ((None, family.prompt), (S, family.system)):
        ids = chat_prompt_ids(tokenizer, Q, system)
        assert said(tokenizer, ids) == expected
        if family.bos:
            assert ids.count(tokenizer.bos_token_id) == expected.count(family.bos) <= 1


@every_family
def test_lengths_without_transformers_are_those_of_its_ids(
    family: Family, made: Callable[[Family], Any], tmp_path: Path
) -> None:
    tokenizer = made(family)
    tokenizer.save_pretrained(tmp_path)
    lengths, tokenizer = lengths_of(tmp_path, None), prepare_tokenizer(tokenizer)
    assert lengths is not None
    turns = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
    for before in ([], turns, [{"role": "system", "content": S}, *turns]):
        for system in (None, "", S):
            assert lengths.asked(Q, system, before) == len(chat_prompt_ids(tokenizer, Q, system, before))
    assert [lengths.answered(text) for text in (A, "")] == [len(answer_ids(tokenizer, text)) for text in (A, "")]


@every_family
@pytest.mark.parametrize("system", [None, S])
def test_the_loss_is_on_the_answer_and_its_end_and_on_nothing_else(
    system: str | None, family: Family, made: Callable[[Family], Any]
) -> None:
    tokenizer = prepare_tokenizer(made(family))
    ids, length = training_ids(tokenizer, Q, A, system)
    assert ids[:length] == chat_prompt_ids(tokenizer, Q, system), "training reads what generation is asked with"
    assert said(tokenizer, ids[length:]) == family.target
    assert ids[-1] == end_of_turn(tokenizer)
    assert (
        ids.count(ids[-1]) == (family.prompt if system is None else family.system).count(said(tokenizer, ids[-1:])) + 1
    )
    longer = TrainingRow([*ids, *ids], length)
    _, mask, labels = labelled([TrainingRow(ids, length), longer])
    assert labels[0][labels[0] != -100].tolist() == ids[length:]
    assert int((labels[0] != -100).sum()) == len(ids) - length
    assert labels[0][mask[0] == 0].unique().tolist() == [-100], "a pad is never a target"


@every_family
def test_the_pad_is_in_the_vocabulary_and_ends_no_turn(family: Family, made: Callable[[Family], Any]) -> None:
    before = made(family)
    tokenizer = prepare_tokenizer(made(family))
    assert len(tokenizer) == len(before), "the embedding would have to be resized"
    assert tokenizer.pad_token == family.pad
    assert tokenizer.pad_token_id not in stop_ids(tokenizer)
    ids, length = training_ids(tokenizer, Q, A)
    assert tokenizer.pad_token_id not in ids[length:]


def test_a_pad_beyond_the_embedding_is_passed_over(made: Callable[[Family], Any]) -> None:
    tokenizer = made(FAMILIES["llama 2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]"]})
    assert prepare_tokenizer(tokenizer, len(tokenizer) - 1).pad_token == "<unk>"


def test_stops_are_those_of_template_tokenizer_and_generation_config(made: Callable[[Family], Any]) -> None:
    from transformers import GenerationConfig

    tokenizer = prepare_tokenizer(made(FAMILIES["gemma 2"]))
    end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<end_of_turn>", "<eos>"))
    assert stop_ids(tokenizer) == sorted([end, eos])
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=None)) == sorted([end, eos])
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=7)) == sorted([end, eos, 7])
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[eos, 8, 9])) == sorted([end, eos, 8, 9])


def test_prompts_do_not_depend_on_the_day(made: Callable[[Family], Any]) -> None:
    """`strftime_now` is what transformers gives a template; the one fixed day stands in for it."""
    tokenizer = prepare_tokenizer(made(FAMILIES["smollm 3"]))
    today = tokenizer.apply_chat_template([{"role": "user", "content": Q}], tokenize=False)
    assert "26 July 2024" not in today
    assert "26 July 2024" in said(tokenizer, chat_prompt_ids(tokenizer, Q))


def test_an_answer_with_white_space_around_it_is_trained_as_the_template_writes_it(
    made: Callable[[Family], Any],
) -> None:
    trimming, exact = (prepare_tokenizer(made(FAMILIES[name])) for name in ("gemma 2", "qwen 2.5"))
    ids, length = training_ids(trimming, Q, f"\n {A} \n")
    assert said(trimming, ids[length:]) == f"{A}<end_of_turn>"
    ids, length = training_ids(exact, Q, f"\n {A} \n")
    assert said(exact, ids[length:]) == f"\n {A} \n<|im_end|>"


def test_a_train_of_thought_in_an_answer_is_trained_as_it_stands(made: Callable[[Family], Any]) -> None:
    """The template would put it where the prompt has an empty one: that would not be the prompt of generation."""
    tokenizer = prepare_tokenizer(made(FAMILIES["qwen 3"]))
    thought = f"<think>\nTwo and two.\n</think>\n\n{A}"
    ids, length = training_ids(tokenizer, Q, thought)
    assert ids[:length] == chat_prompt_ids(tokenizer, Q)
    assert said(tokenizer, ids[length:]) == f"{thought}<|im_end|>"
    ids, length = training_ids(tokenizer, Q, f"\n\n{A}")
    assert said(tokenizer, ids[length:]) == f"{A}<|im_end|>"


def test_a_system_prompt_that_the_template_changes_goes_before_the_task(made: Callable[[Family], Any]) -> None:
    tokenizer = prepare_tokenizer(made(FAMILIES["smollm 3"]))
    expected = SMOL_HEADER + "Be helpful." + IM.replace(Q, f"{S} /think now.\n\n{Q}") + "<think>\n\n</think>\n"
    assert said(tokenizer, chat_prompt_ids(tokenizer, Q, f"{S} /think now.")) == expected


@pytest.mark.parametrize("name", ["gemma 2", "mistral", "drops the system prompt"])
def test_examples_of_an_evaluation_keep_a_refused_system_prompt(name: str, made: Callable[[Family], Any]) -> None:
    tokenizer = prepare_tokenizer(made(FAMILIES[name]))
    turns = [("system", S), ("user", "One?"), ("assistant", "1"), ("user", Q)]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert accepted(tokenizer, messages) == [{"role": "user", "content": f"{S}\n\nOne?"}, *messages[2:]]
    assert accepted(tokenizer, messages[1:]) == messages[1:]


def test_a_template_of_its_own_is_kept_and_a_plain_one_added(made: Callable[[Family], Any]) -> None:
    assert prepare_tokenizer(made(FAMILIES["phi 3"])).chat_template == PHI3
    assert prepare_tokenizer(made(FAMILIES["no template"])).chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    assert prepare_tokenizer(made(FAMILIES["no template, no begin"])).chat_template == PLAIN_TEMPLATE


def test_tokenizers_that_no_chat_can_be_made_with(made: Callable[[Family], Any]) -> None:
    endless = made(FAMILIES["no template"])
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare_tokenizer(endless)
    broken = made(FAMILIES["mistral"])
    broken.chat_template = "{{ raise_exception('no chats here') }}"
    with pytest.raises(UserError, match=r"does not render a question and its answer \(no chats here\)"):
        prepare_tokenizer(broken)
