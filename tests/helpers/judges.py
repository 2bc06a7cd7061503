"""Small random judges of the real architectures, saved as the folders that a user would download."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

# Large class logits, so that a random detector is confident enough for the later steps to be tested.
_CLASS_LOGITS_STD = 0.7


def write_detector(folder: Path) -> Path:
    """A Mask2Former with COCO's 80 classes and a tiny Swin, for images of 64 pixels."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    from eval_tasks.judging.vocabulary import CLASSES

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=20,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16,
        id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data.normal_(std=_CLASS_LOGITS_STD)
    for name, parameter in model.named_parameters():
        if "mask_embedder" in name or "mask_projection" in name or "queries" in name:
            parameter.data.normal_(std=0.0 if name.endswith("bias") else 0.5)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP of 32 pixels in open_clip's format."""
    import open_clip

    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    for name, parameter in model.named_parameters():
        if name in ("visual.conv1.weight", "visual.proj", "text_projection", "token_embedding.weight"):
            parameter.data.normal_(std=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def write_vqa(folder: Path) -> Path:
    """A LLaVA with a chat template, whose tokenizer has Yes and No as words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "Yes", "No", *letters]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<image>|Yes|No|."), "isolated")
    words_of = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    model.lm_head.weight.data.normal_(std=1.0)
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}:"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), words_of, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Colored noise in large patches."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def write_blip(folder: Path) -> Path:
    """A BLIP for question answering, without a chat template and with a separate decoder."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "yes",
        "no",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "encoder_hidden_size": 16, "projection_dim": 16, "max_position_embeddings": 64,
        "bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    words_of = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), words_of).save_pretrained(folder)
    return folder
