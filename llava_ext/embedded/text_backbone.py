"""The embedded text backbone: a byte-level BPE and a small Qwen2 LM, both trained on the text of the scene corpus."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor
from evotok_plugin.common.files import apply_umask_to_weights
from evotok_plugin.common.foreign_files import reading
from evotok_plugin.scenes.records import text_records
from llava_ext.data.collators import Collator
from llava_ext.data.dataset import ConversationDataset, Sample
from llava_ext.data.records import parse_record
from llava_ext.processing_evotok_llava import IMAGE_TOKENS, EvoTokLlavaProcessor
from llava_ext.training.callbacks import MetricsFile, ProgressBar

logger = logging.getLogger(__name__)

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
# Contents are strings or lists of parts, joined as by `read_messages`; {% generation %} marks the learned text.
CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|image_pad|>{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ text(message['content']) }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ text(message['content']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_text_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text, and save it with its chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = [PAD, USER, ASSISTANT, END, *IMAGE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def corpus_texts(scene_folder: Path, records: list[dict]) -> Iterable[str]:
    """All turns of text-only `records` and of the conversations in a scene folder.

    Raises:
        UserError: the records of the scene folder cannot be read.
    """
    yield from _turns_of(records)
    required, optional = (
        ("pretrain", "finetune"),
        ("questions", "places", "mixed", "other"),
    )  # older corpora lack the latter
    files = [scene_folder / "train" / f"{name}.json" for name in (*required, *optional)]
    for file in (file for file in files if file.stem in required or file.exists()):
        with reading(str(file), "choose another --workspace, or delete the folder of the scenes to draw them again"):
            turns = _turns_of(json.loads(file.read_text()))
        yield from turns


def _turns_of(records: list[dict]) -> list[str]:
    return [turn["value"] for record in records for turn in record["conversations"]]


class EveryToken(Dataset):
    """Conversations in which every token is a target, as in language-model pretraining."""

    def __init__(self, conversations: ConversationDataset) -> None:
        self._conversations = conversations

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Sample:
        sample = self._conversations[index]
        return Sample(sample.input_ids, sample.input_ids, [])


def train_backbone(
    tokenizer: PreTrainedTokenizerFast, folder: str | Path, num_steps: int, seed: int = 0, batch_size: int = 32
) -> None:
    """Train the small LM on text-only conversations about scenes and save it as a causal LM folder."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        # In the same time, a width of 256 learns less of the scenes: it takes three times the operations per token.
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        # The usual 0.02 suits widths of thousands; at this width attention would stay nearly uniform for a long time.
        initializer_range=128**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    vision = EvoTokConfig.preset("tiny")
    processor = EvoTokLlavaProcessor.from_parts(
        EvoTokImageProcessor(size=vision.image_size), tokenizer, vision, config.vocab_size
    )
    rows = text_records(num_steps * batch_size, seed)
    dataset = ConversationDataset([parse_record(row, None) for row in rows], processor, max_length=512)
    use_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, num_steps // 20),
        weight_decay=0.01,
        adam_beta2=0.95,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=0,
        remove_unused_columns=False,
        use_cpu=not use_cuda,
        dataloader_pin_memory=use_cuda,
        seed=seed,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=EveryToken(dataset), data_collator=Collator(processor))
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    trainer.add_callback(ProgressBar())
    trainer.add_callback(MetricsFile())
    trainer.train()
    model.save_pretrained(folder)
    apply_umask_to_weights(folder)
    tokenizer.save_pretrained(folder)
