"""What finds objects in images: the interface, and Mask2Former through transformers.

Q queries, K classes, H, W size of an image in pixels; boxes are (left, top, right, bottom) in pixels.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from eval_tasks.judging.rules import GENEVAL_RULES, Box, Instance, Rules
from eval_tasks.judging.vocabulary import CLASSES
from eval_tasks.judging.weights import require_weights
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, model_type_of, open_processor

_WHAT = "the detector's weights"
# COCO's own names where GenEval has others.
_COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
# Names that differ between lists of COCO's classes.
_SPELLINGS = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv", "hair dryer": "hair drier",
}  # fmt: skip
_MAX_DETECTIONS = 100  # pairs of query and class an image, as mmdet's Mask2Former keeps


class Detector(Protocol):
    """Finds instances; `rules` have its scale of confidence, `classes` are the names that it knows."""

    @property
    def classes(self) -> Collection[str]: ...

    @property
    def rules(self) -> Rules: ...

    def detect_batch(self, images: Sequence[Image]) -> list[list[Instance]]:
        """Per RGB image all instances that some rule could trust, of any class, with masks (H, W)."""
        ...


class Mask2FormerDetector:
    """COCO instance segmentation with GenEval's class names; the original judge is the Swin-S checkpoint.

    Scores and boxes follow mmdet's Mask2Former, which GenEval was built on: the class's probability times the mean
    probability of the mask's own pixels, the box around these pixels, masks scaled up as logits.
    """

    rules = GENEVAL_RULES
    classes = CLASSES

    def __init__(self, model: torch.nn.Module, processor, device: torch.device | str = "cpu") -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, torch.device(device)
        self._least = min(self.rules.min_score, self.rules.min_score_counting)
        _check_labels(model.config.id2label)

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> "Mask2FormerDetector":
        """Load a folder of transformers' Mask2Former.

        Raises:
            UserError: no such folder, another kind of model, damaged files, weights that are missing or do not fit, or
                other classes than COCO's 80.
        """
        require_weights(folder, _WHAT)
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        kind = model_type_of(folder)
        if kind != "mask2former":
            raise UserError(f"{_WHAT}: {folder} holds a model of type {kind!r}, expected 'mask2former'")
        model = load_whole(
            Mask2FormerForUniversalSegmentation,
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            local_files_only=True,
        )
        processor = open_processor(
            AutoImageProcessor,
            folder,
            "the detector's image processor",
            [("preprocessor_config.json", "processor_config.json")],
            "download the folder again",
            local_files_only=True,
        )
        return cls(model, processor, device)

    @torch.inference_mode()
    def detect_batch(self, images: Sequence[Image]) -> list[list[Instance]]:
        """The instances of each image; images of one size go through the model together.

        Padding a smaller image to a larger one's size would change what is found in it.
        """
        found: list[list[Instance]] = [[] for _ in images]
        for size in dict.fromkeys(image.size for image in images):
            places = [place for place, image in enumerate(images) if image.size == size]
            for place, instances in zip(places, self._detect([images[place] for place in places]), strict=True):
                found[place] = instances
        return found

    def _detect(self, images: Sequence[Image]) -> list[list[Instance]]:
        inputs = self.processor(images=list(images), return_tensors="pt", device=self.device)
        pixel_values = inputs["pixel_values"].to(self.device)
        outputs = self.model(pixel_values, pixel_mask=inputs["pixel_mask"].to(self.device))
        return [
            self._instances(logits, masks, tuple(pixel_values.shape[-2:]), (image.height, image.width))
            for logits, masks, image in zip(
                outputs.class_queries_logits.float(), outputs.masks_queries_logits.float(), images, strict=True
            )
        ]

    def _instances(
        self, logits: Tensor, masks: Tensor, seen_size: tuple[int, int], size: tuple[int, int]
    ) -> list[Instance]:
        """Class logits (Q, K + 1) and mask logits (Q, h, w) as instances of an image of `size` = (H, W)."""
        probabilities = logits.softmax(dim=-1)[:, :-1].flatten()
        scores, pairs = probabilities.topk(min(_MAX_DETECTIONS, probabilities.numel()))
        # A mask's mean probability is at most 1, so what is not trusted by its class alone need not be scaled up.
        pairs = pairs[scores > self._least]
        queries, labels = pairs // (logits.shape[-1] - 1), pairs % (logits.shape[-1] - 1)
        instances = []
        for query, label, class_score in zip(queries, labels, probabilities[pairs], strict=True):
            seen = F.interpolate(masks[query][None, None], seen_size, mode="bilinear", align_corners=False)
            mask_logits = F.interpolate(seen, size, mode="bilinear", align_corners=False)[0, 0]  # (H, W)
            mask = mask_logits > 0
            area = mask.sum()
            score = float(class_score * (mask_logits.sigmoid() * mask).sum() / (area + 1e-6))
            if score > self._least:
                pixels = mask.cpu().numpy()
                instances.append(Instance(CLASSES[int(label)], score, _box(pixels), pixels))
        return instances


def _box(mask: np.ndarray) -> Box:
    """The box around a mask (H, W) that is not empty; right and bottom edges lie behind its last pixels."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _check_labels(labels: dict[int, str]) -> None:
    """Labels must be COCO's 80 in COCO's order: classes are told apart by their number."""
    if len(labels) != len(CLASSES):
        raise UserError(
            f"the detector knows {len(labels)} classes, expected COCO's {len(CLASSES)} things; take an instance "
            "segmentation checkpoint, not a panoptic or a semantic one"
        )
    for number, name in sorted(labels.items()):
        plain = str(name).lower().replace("_", " ")
        known = {plain, _COCO_NAMES.get(plain), _SPELLINGS.get(plain)}
        if CLASSES[number] not in known and not plain.startswith("label "):
            raise UserError(f"the detector's class {number} is {name!r}, expected COCO's {CLASSES[number]!r}")
