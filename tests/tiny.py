"""A model of a few thousand random weights with a real tokenizer, made on the spot: tests need no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

SENTENCES = (
    "Problem: Ann had 3 apples and Bob gave her 4 more. How many apples does she have now?",
    "Equation: x = 3 + 4",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "user asks a question and the assistant answers it; the system says how.",
)

# As most templates do, it writes a line break after the token that ends a turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few words, with further special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>", "<pad>", *special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def make_tiny_model(folder: Path, *, chat_template: bool = True, tied: bool = False, spare_rows: int = 0) -> Path:
    """Save a tiny Llama and its tokenizer to a folder that the transformers Auto classes load, and return it.

    Args:
        folder: where to save.
        chat_template: whether the tokenizer has a chat template.
        tied: whether the output layer's weight is the embedding's.
        spare_rows: rows of the embedding that no token has.
    """
    tokenizer = make_tokenizer()
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SEEING_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_tiny_seeing_model(folder: Path, kind: str = "idefics3") -> Path:
    """Save a tiny model that sees images, with its processor, and return the folder.

    Args:
        folder: where to save.
        kind: ``"idefics3"``, in which an image of another size has another number of tokens and a row has what stands
            around them; or ``"llava"``, in which each image has 4 tokens.
    """
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]}
    )
    tokenizer.chat_template = SEEING_TEMPLATE
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # With the usual deviation such a tower would see hardly any difference between images.
    tower = {**sizes, "image_size": 8, "patch_size": 4, "initializer_range": 0.3}
    text = {**sizes, **ids, "model_type": "llama", "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 256}
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor: Any
    config: Any
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
        processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SEEING_TEMPLATE)
        config = Idefics3Config(vision_config=tower, text_config=text, image_token_id=image, scale_factor=1)
    else:
        square = {"height": 8, "width": 8}
        processor = LlavaProcessor(
            CLIPImageProcessorPil(size=square, crop_size=square),
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=SEEING_TEMPLATE,
        )
        vision = {"model_type": "clip_vision_model", **tower}
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_tiny_encoder(folder: Path) -> Path:
    """Save a tiny BERT and its tokenizer, which has no end-of-text token, and return the folder.

    As in most checkpoints, there are no weights of a pooler.
    """
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [*SENTENCES, " ".join(map(str, range(100))), "jumps runs sleeps cat mouse Rome Paris in of is"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_t5(folder: Path, *, gated: bool = False, chat_template: bool = False) -> Path:
    """Save a tiny T5 and its tokenizer, which marks words as T5's does and ends texts with ``</s>``.

    Args:
        folder: where to save.
        gated: whether it is one of T5 1.1, mT5 and FLAN, whose output layer has a weight of its own.
        chat_template: whether the tokenizer has a chat template.
    """
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    alphabet = sorted({*"".join(SENTENCES), *"0123456789()+-*/=.?,xyN_"})
    texts = [*SENTENCES, *alphabet, *(f"N_{number}" for number in range(4)), "x = ( N_0 + N_1 ) * N_2 / N_3 - 5"]
    unigram.train_from_iterator(
        texts * 3,
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    config = T5Config(
        # As those that are published, it has rows that no token has.
        vocab_size=len(tokenizer) + 5,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
