"""EvoTok as a vision tower of the LLaVA code bases, against a small stand-in for their code."""

import importlib
import itertools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evotok_plugin import EvoTokVisionTower, register_llava
from evotok_plugin.errors import UserError

POSITIONS, WIDTH = 9, 128  # of the tiny tokenizer

BUILDER = """
def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    return {"built_by": "llava", "name": name, **kwargs}
"""
ARCH = """
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .multimodal_encoder.builder import build_vision_tower


class LlavaMetaModel:
    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=config.delay_load)
            self.mm_projector = nn.Linear(config.mm_hidden_size, config.hidden_size)

    def initialize_vision_modules(self, model_args):
        self.config.mm_vision_tower = model_args.vision_tower
        if getattr(self, "vision_tower", None) is None:
            self.vision_tower = build_vision_tower(model_args)
        else:
            self.vision_tower.load_model()
        self.config.mm_hidden_size = self.vision_tower.hidden_size
        self.mm_projector = nn.Linear(self.config.mm_hidden_size, self.config.hidden_size)


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen_stand_in"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    config_class = LlavaQwenConfig

    def __init__(self, config):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def encode_images(self, images):
        return self.model.mm_projector(self.model.vision_tower(images))
"""


@pytest.fixture
def llava_code(tmp_path, monkeypatch):
    """An importable package `llava` with the structure of LLaVA's; `arch()` imports its models."""
    encoder = tmp_path / "code" / "llava" / "model" / "multimodal_encoder"
    encoder.mkdir(parents=True)
    for folder in (encoder, encoder.parent, encoder.parent.parent):
        (folder / "__init__.py").touch()
    (encoder / "builder.py").write_text(BUILDER)
    (encoder.parent / "llava_arch.py").write_text(ARCH)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield SimpleNamespace(
        arch=lambda: importlib.import_module("llava.model.llava_arch"),
        builder=lambda: importlib.import_module("llava.model.multimodal_encoder.builder"),
        folder=tmp_path / "code" / "llava",
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
        del sys.modules[name]


@pytest.mark.parametrize("llava_first", [True, False])
def test_llava_builds_evotok_towers_after_registration(llava_code, tiny_evotok_folder, llava_first):
    if llava_first:
        llava_code.arch()
    register_llava()
    for module in (llava_code.builder(), llava_code.arch()):
        for arguments in ({"mm_vision_tower": str(tiny_evotok_folder)}, {"vision_tower": str(tiny_evotok_folder)}):
            assert isinstance(module.build_vision_tower(SimpleNamespace(**arguments)), EvoTokVisionTower)


def test_other_towers_are_built_by_llava(llava_code, tiny_backbone_folder, tmp_path):
    register_llava()
    (tmp_path / "config.json").write_text("not JSON")
    build = llava_code.arch().build_vision_tower
    for name in ("openai/clip-vit-large-patch14-336", str(tiny_backbone_folder), str(tmp_path), "", None):
        built = build(SimpleNamespace(mm_vision_tower=name), delay_load=True)
        assert built == {"built_by": "llava", "name": name, "delay_load": True}


def test_registration_is_idempotent(llava_code, tiny_evotok_folder):
    register_llava()
    once = llava_code.arch().build_vision_tower
    register_llava()
    assert llava_code.arch().build_vision_tower is once is llava_code.builder().build_vision_tower
    assert once(SimpleNamespace(vision_tower="clip"))["built_by"] == "llava"


def test_the_error_without_llava_says_what_to_install(monkeypatch):
    def absent(name, path=None, target=None):
        if name == "llava":
            raise ModuleNotFoundError("No module named 'llava'", name=name)

    monkeypatch.delitem(sys.modules, "llava", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=absent), *sys.meta_path])
    with pytest.raises(ImportError, match="llava is not installed; install the LLaVA or LLaVA-NeXT code base"):
        register_llava()


def test_the_error_names_the_reason_if_llava_cannot_be_imported(llava_code):
    (llava_code.folder / "model" / "__init__.py").write_text("from transformers import no_such_name")
    with pytest.raises(ImportError, match="llava cannot be imported: .*no_such_name.*found torch .*, transformers "):
        register_llava()


def test_the_tower_has_the_interface_that_llava_expects(tiny_evotok_folder, pixel_values, features):
    tower = EvoTokVisionTower(str(tiny_evotok_folder))
    assert tower.is_loaded and not any(p.requires_grad for p in tower.parameters())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size) == (WIDTH, 9, 3, 48)
    assert (tower.config.hidden_size, tower.config.image_size, tower.config.patch_size) == (WIDTH, 48, 16)
    assert tower.dtype == torch.float32 and tower.device == torch.device("cpu")
    assert torch.equal(tower.dummy_feature, torch.zeros(1, WIDTH))
    found = tower(pixel_values)
    torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)
    assert not found.requires_grad
    one_by_one = tower(list(pixel_values))
    assert [part.shape for part in one_by_one] == [(1, POSITIONS, WIDTH)] * 2
    torch.testing.assert_close(torch.cat(one_by_one), found, atol=1e-4, rtol=1e-4)


def test_features_have_the_dtype_of_the_images(tiny_evotok_folder, tokenizer, pixel_values):
    tower = EvoTokVisionTower(str(tiny_evotok_folder)).to(dtype=torch.bfloat16)
    assert tower.dtype == tower.dummy_feature.dtype == torch.bfloat16
    assert torch.equal(tower.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert tower(pixel_values.to(dtype)).dtype == dtype
        assert tower([image.to(dtype) for image in pixel_values])[0].dtype == dtype


def test_weights_may_be_loaded_later(tiny_evotok_folder, pixel_values, features):
    tower = EvoTokVisionTower(str(tiny_evotok_folder), SimpleNamespace(), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters()) and tower.hidden_size == WIDTH
    assert tower.image_processor.crop_size == {"height": 48, "width": 48}
    with pytest.raises(ValueError, match="are not loaded yet; call load_model"):
        tower(pixel_values)
    tower.load_model(device_map="cpu")
    held = tower.vision_tower
    tower.load_model()
    assert tower.is_loaded and tower.vision_tower is held and not any(p.requires_grad for p in tower.parameters())
    torch.testing.assert_close(tower(pixel_values), features, atol=1e-4, rtol=1e-4)


def test_an_incomplete_folder_is_rejected(tiny_evotok_folder, tokenizer, tmp_path):
    shutil.copytree(tiny_evotok_folder, tmp_path / "tower")
    state = {name: value for name, value in tokenizer.state_dict().items() if name != "quantizer.codebooks"}
    tokenizer.save_pretrained(tmp_path / "tower", state_dict=state)
    with pytest.raises(UserError, match=r"weights 1 missing \(quantizer.codebooks\)"):
        EvoTokVisionTower(tmp_path / "tower")
    weights = tmp_path / "tower" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="model.safetensors is cut off or damaged"):
        EvoTokVisionTower(tmp_path / "tower")
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        EvoTokVisionTower(tmp_path / "tower")


def llava_config(arch, backbone, tower, **options):
    config = arch.LlavaQwenConfig.from_pretrained(backbone)
    settings = {"mm_vision_tower": str(tower), "mm_hidden_size": WIDTH, "delay_load": False} | options
    for name, value in settings.items():
        setattr(config, name, value)
    return config


TRAINED = [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}]


@pytest.mark.parametrize(
    ("delay_load", "holds_tower", "dtype"), itertools.product([False, True], [False, True], ["float32", "bfloat16"])
)
def test_a_frozen_tower_inside_from_pretrained_comes_from_its_folder(
    llava_code,
    tiny_backbone_folder,
    tiny_evotok_folder,
    pixel_values,
    features,
    tmp_path,
    delay_load,
    holds_tower,
    dtype,
):
    """`from_pretrained` creates models on the meta device and would initialize missing weights at random."""
    register_llava()
    arch = llava_code.arch()
    config = llava_config(arch, tiny_backbone_folder, tiny_evotok_folder, delay_load=delay_load)
    model = arch.LlavaQwenForCausalLM.from_pretrained(tiny_backbone_folder, config=config)
    if holds_tower:
        model.model.vision_tower.load_model()
    model.save_pretrained(tmp_path / "llava")

    loaded = arch.LlavaQwenForCausalLM.from_pretrained(tmp_path / "llava", dtype=dtype)
    loaded.model.vision_tower.load_model()
    torch.testing.assert_close(loaded.model.vision_tower(pixel_values), features, atol=1e-4, rtol=1e-4)
    assert loaded.encode_images(pixel_values.to(loaded.dtype)).shape == (2, POSITIONS, 32)


@pytest.mark.parametrize(("trained", "delay_load"), itertools.product(TRAINED, [False, True]))
def test_a_trained_tower_comes_from_the_checkpoint_and_missing_weights_from_its_folder(
    llava_code,
    tiny_backbone_folder,
    tiny_evotok_folder,
    tokenizer,
    pixel_values,
    features,
    tmp_path,
    trained,
    delay_load,
):
    register_llava()
    arch = llava_code.arch()
    options = {"delay_load": delay_load, **trained}
    config = llava_config(arch, tiny_backbone_folder, tiny_evotok_folder, **options)
    model = arch.LlavaQwenForCausalLM.from_pretrained(tiny_backbone_folder, config=config)
    tower = model.model.vision_tower
    assert tower.is_loaded
    torch.testing.assert_close(tower(pixel_values), features, atol=1e-4, rtol=1e-4)  # none of it is in the backbone

    with torch.no_grad():
        tower.vision_tower.encoder.to_latent[2].bias += 1
    learned = tower(pixel_values)
    weights = {name: value for name, value in model.state_dict().items() if "quantizer" not in name}
    model.save_pretrained(tmp_path / "llava", state_dict=weights)  # only parameters, as with adapters
    for dtype in (torch.float32, torch.bfloat16):
        again = arch.LlavaQwenForCausalLM.from_pretrained(tmp_path / "llava", dtype=dtype).model.vision_tower
        again.load_model()
        assert again.dtype == dtype and torch.equal(
            again.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks
        )
        if dtype == torch.float32:
            assert torch.equal(again(pixel_values), learned) and not torch.allclose(learned, features, atol=1e-2)


def test_a_projector_is_trained_on_images(llava_code, tiny_backbone_folder, tiny_evotok_folder, tokenizer, pictures):
    """Turns a language model into a LLaVA, as in the first training stage of the code bases."""
    register_llava()
    arch = llava_code.arch()
    model = arch.LlavaQwenForCausalLM.from_pretrained(tiny_backbone_folder)
    model.model.initialize_vision_modules(SimpleNamespace(vision_tower=str(tiny_evotok_folder)))
    model.train()
    tower = model.model.vision_tower
    images = torch.stack(
        [tower.image_processor.preprocess(p, return_tensors="pt")["pixel_values"][0] for p in pictures]
    )
    with torch.no_grad():
        torch.testing.assert_close(tower(images), tokenizer(images).features, atol=1e-4, rtol=1e-4)
    embedded = model.encode_images(images)
    model(inputs_embeds=embedded, labels=torch.zeros(3, POSITIONS, dtype=torch.long)).loss.backward()
    assert model.model.mm_projector.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in tower.parameters())
    assert torch.equal(tower.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks)


def test_an_unfrozen_tower_learns(tiny_evotok_folder, pixel_values):
    tower = EvoTokVisionTower(str(tiny_evotok_folder)).requires_grad_(True)
    tower(pixel_values).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


def test_photographs_give_the_same_features_in_both_towers(tiny_evotok_folder, tower):
    folder = Path(__file__).resolve().parents[4] / "shared" / "data" / "photos_256"
    if not folder.is_dir():
        pytest.skip("the photographs (../shared/data/photos_256) are not available")
    photographs = [Image.open(path) for path in sorted(folder.glob("*.jpg"))[:4]]
    plugged = EvoTokVisionTower(str(tiny_evotok_folder))
    pixel_values = plugged.image_processor(photographs).pixel_values
    found = plugged(pixel_values)
    assert torch.equal(found, tower(pixel_values).last_hidden_state)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
