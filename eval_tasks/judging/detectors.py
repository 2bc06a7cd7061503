"""Object detectors: the interface, and Mask2Former through transformers.

Q queries, K classes, H, W size of an image in pixels; boxes are (left, top, right, bottom) in pixels.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from eval_tasks.judging.rules import GENEVAL_RULES, Box, Instance, Rules
from eval_tasks.judging.vocabulary import CLASSES
from eval_tasks.judging.weights import require_weights
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, model_type_of, open_config, open_processor

_WHAT = "the detector's weights"
# COCO's names where GenEval's differ.
_COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
# Spellings that differ between lists of COCO's classes.
_SPELLINGS = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv", "hair dryer": "hair drier",
}  # fmt: skip
_MAX_DETECTIONS = 100  # pairs of query and class per image, as in mmdet's Mask2Former


def check_detector(folder: Path) -> None:
    """Check, without loading weights, that a folder holds a Mask2Former with COCO's classes.

    Raises:
        UserError: a missing folder, another kind of model, or other classes than COCO's 80.
    """
    require_weights(folder, _WHAT)
    from transformers import Mask2FormerConfig

    kind = model_type_of(folder)
    if kind != "mask2former":
        raise UserError(f"{_WHAT}: {folder} holds a model of type {kind!r}, expected 'mask2former'")
    labels = open_config(Mask2FormerConfig, folder).id2label or {}
    _check_labels({int(number): name for number, name in labels.items()})


class Detector(Protocol):
    """Finds instances of `classes`; the thresholds in `rules` fit its scale of confidence."""

    @property
    def classes(self) -> Collection[str]: ...

    @property
    def rules(self) -> Rules: ...

    def detect_batch(self, images: Sequence[Image]) -> list[list[Instance]]:
        """For each RGB image, all instances that pass the lowest threshold of the rules, with masks (H, W)."""
        ...


class Mask2FormerDetector:
    """COCO instance segmentation with GenEval's class names; the original judge is the Swin-S checkpoint.

    Scores and boxes follow mmdet's Mask2Former, which GenEval was built on: a score is the class probability times the
    mean probability of the mask's pixels, a box encloses these pixels, and masks are upsampled as logits.
    """

    rules = GENEVAL_RULES
    classes = CLASSES

    def __init__(self, model: Any, processor: Any, device: torch.device | str = "cpu") -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, torch.device(device)
        self._least = min(self.rules.min_score, self.rules.min_score_counting)
        _check_labels(model.config.id2label)

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> "Mask2FormerDetector":
        """Load a Mask2Former folder of transformers.

        Raises:
            UserError: a missing folder, another kind of model, damaged files, missing or mismatched weights, or other
                classes than COCO's 80.
        """
        check_detector(folder)
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

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
        """The instances of each image; only images of the same size are batched.

        Padding a smaller image to the size of a larger one would change its detections.
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
        # The mean probability of a mask is at most 1, so a class probability below the threshold needs no upsampling.
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
    """The box around a nonempty mask (H, W); right and bottom edges are exclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _check_labels(labels: dict[int, str]) -> None:
    """Check that the labels are COCO's 80 in COCO's order, since classes are identified by their number."""
    if len(labels) != len(CLASSES):
        raise UserError(
            f"the detector has {len(labels)} classes, expected COCO's {len(CLASSES)} things; use a checkpoint for "
            "instance segmentation, not for panoptic or semantic segmentation"
        )
    for number, name in sorted(labels.items()):
        plain = str(name).lower().replace("_", " ")
        known = {plain, _COCO_NAMES.get(plain), _SPELLINGS.get(plain)}
        if CLASSES[number] not in known and not plain.startswith("label "):
            raise UserError(f"the detector's class {number} is {name!r}, expected COCO's {CLASSES[number]!r}")
