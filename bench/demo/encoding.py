"""The demo's tokenizer and chat format, and conversations as ids and labels. Knows no model."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bench.demo.sampling import Chat, Sampler

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
VOCAB_SIZE = 1280
IGNORED = -100

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{%- elif message['role'] in ['system', 'developer'] -%}"
    "{{ '<|system|>' + message['content'] }}"
    "{%- else -%}"
    "{{ '<|user|>' + message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one training row and its labels, IGNORED where nothing is to be learned."""

    ids: list[int]
    labels: list[int]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the generated text: any UTF-8 goes in, digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [BOS, EOS, PAD, SYSTEM, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _corpus(seed: int) -> Iterable[str]:
    sampler = Sampler(seed)
    for _ in range(8000):
        chat = sampler.base_chat()
        if chat.system:
            yield chat.system
        for turn in chat.turns:
            yield turn.question
            yield turn.answer


def encode_chat(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> Sample:
    """A conversation in the chat template's own tokens; only answers carry labels."""
    ids, labels = _ids(tokenizer, BOS), [IGNORED]
    head = f"{SYSTEM}{chat.system}" if chat.system is not None else ""
    for turn in chat.turns:
        prompt = _ids(tokenizer, f"{head}{USER}{turn.question}{ASSISTANT}")
        answer = _ids(tokenizer, f"{turn.answer}{EOS}")
        ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer
        head = ""
    return Sample(ids, labels)


def encode_statement(tokenizer: PreTrainedTokenizerFast, text: str) -> Sample:
    """Plain text between BOS and EOS, every token learned."""
    ids = _ids(tokenizer, f"{BOS}{text}{EOS}")
    return Sample(ids, list(ids))


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token that is known to exist."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def batches(samples: Sequence[Sample], size: int, pad: int, rng: random.Random) -> list["Batch"]:
    """Rows of similar length together, right-padded, in random order."""
    order = sorted(samples, key=lambda sample: len(sample.ids))
    groups = [_stack(order[at : at + size], pad) for at in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups


@dataclass(frozen=True, slots=True)
class Batch:
    """ids and labels, int64 [rows, longest]; causal attention needs no mask for right padding."""

    ids: torch.Tensor
    labels: torch.Tensor


def _stack(rows: Sequence[Sample], pad: int) -> Batch:
    width = max(len(row.ids) for row in rows)
    return Batch(
        torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows]),
        torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]),
    )
