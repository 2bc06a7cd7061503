"""Other image and batch sizes, other data types of weights, and compiled models."""

import pytest
import torch
import torch.nn.functional as F
from research_layout import research_tokenizer
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel
from evotok_plugin.conversion.tokenizer import convert_tokenizer
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.pixel_decoder import PixelDecoder
from evotok_plugin.positions import resize_positions

SMALL = {
    "image_size": 32, "patch_size": 8, "encoder_hidden_size": 64, "encoder_num_layers": 2, "encoder_num_heads": 2,
    "encoder_intermediate_size": 96, "codebook_dim": 6, "codebook_size": 20, "num_quantizers": 5, "pixel_depth": 4,
    "semantic_depth": 5, "pixel_latent_channels": 10, "decoder_channels": 16,
    "decoder_channel_multipliers": (1, 1, 2, 2), "decoder_num_res_blocks": 0, "decoder_norm_groups": 8,
    "semantic_hidden_size": 32, "semantic_num_layers": 1, "semantic_num_heads": 4, "semantic_head_dim": 8,
    "semantic_dim": 24,
}  # fmt: skip
# Patches of six pixels: 2 ** 2 < 6 < 2 ** 3, so the last resolution is 1.5 times as fine as the one before.
SIX = SMALL | {"image_size": 24, "patch_size": 6}


def small_model(sizes=SMALL):
    torch.manual_seed(0)
    model = EvoTokModel(EvoTokConfig(**sizes)).eval()
    torch.nn.init.normal_(model.semantic_decoder.position_embedding)  # so that positions have an effect
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def models(model):
    """Models by patch size."""
    return {8: model, 6: small_model(SIX)}


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Sizes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 6])
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 2), (1, 1), (3, 7), (5, 1)])
def test_images_of_any_multiple_of_the_patch_size_are_encoded_and_reconstructed(models, patch, grid):
    model, (height, width) = models[patch], (grid[0] * patch, grid[1] * patch)
    pixel_values = images(2, 3, height, width)
    assert model.grid_of(pixel_values) == grid
    output, encoded = model(pixel_values), model.encode(pixel_values)
    assert encoded.codes.shape == (2, grid[0] * grid[1], 5) and torch.equal(output.codes, encoded.codes)
    pixels, features = model.decode_pixels(encoded.codes[..., :4], grid), model.decode_semantics(encoded.codes, grid)
    assert pixels.shape == pixel_values.shape and features.shape == (*encoded.codes.shape[:2], 24)
    torch.testing.assert_close(pixels, output.pixels, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features, output.features, atol=1e-4, rtol=1e-4)
    if height == width:
        assert torch.equal(model.decode_pixels(encoded.codes[..., :4]), pixels)
        assert torch.equal(model.decode_semantics(encoded.codes), features)


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 33, 32), (1, 3, 32, 20), (1, 4, 32, 32), (3, 32, 32), (1, 3, 4, 4), (1, 3, 0, 32), (0, 3, 32, 32)],
)
def test_other_shapes_are_rejected(model, shape):
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\), not empty, .* multiples of the patch size 8"):
            call(torch.zeros(shape))


def test_codes_that_do_not_fill_a_grid_are_rejected(model):
    codes = torch.zeros(1, 21, 5, dtype=torch.long)
    for decode in (model.decode_pixels, model.decode_semantics):
        with pytest.raises(ValueError, match=r"21 positions do not fill 5 rows x 5 columns; pass grid"):
            decode(codes)
        with pytest.raises(ValueError, match="21 positions do not fill 4 rows x 5 columns"):
            decode(codes, (4, 5))
        assert decode(codes, (3, 7)).shape[0] == 1


@torch.no_grad()
def test_the_encoder_interpolates_as_siglip_does(model):
    pixel_values, ours = images(2, 3, 48, 24), model.encoder.embeddings
    sizes = {name: getattr(model.config, name) for name in ("image_size", "patch_size")}
    theirs = SiglipVisionEmbeddings(SiglipVisionConfig(hidden_size=model.config.encoder_hidden_size, **sizes))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(pixel_values), theirs(pixel_values, interpolate_pos_encoding=True))


def test_interpolated_positions_keep_rows_and_columns_apart():
    ramp = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1).view(16, 2)
    torch.testing.assert_close(resize_positions(ramp, 4, (4, 4)), ramp)
    rows, columns = resize_positions(ramp, 4, (8, 12)).view(8, 12, 2).unbind(-1)
    assert (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-5
    assert (columns.diff(dim=1) > 0).all() and columns.diff(dim=0).abs().max() < 1e-5


@torch.no_grad()
def test_the_semantic_decoder_interpolates_positions(model):
    """Compares with a model of the other size that holds the interpolated position embeddings."""
    codes = torch.randint(0, 20, (1, 36, 5))
    other = EvoTokModel(EvoTokConfig(**SMALL | {"image_size": 48})).eval()
    state = dict(model.state_dict())
    table = state["semantic_decoder.position_embedding"]
    resized = resize_positions(table[0, 1:], 4, (6, 6))
    state["semantic_decoder.position_embedding"] = torch.cat([table[:, :1], resized[None]], dim=1)
    state["encoder.embeddings.position_embedding.weight"] = torch.zeros(36, 64)
    other.load_state_dict(state)
    torch.testing.assert_close(model.decode_semantics(codes), other.decode_semantics(codes))


# Patches of any width ----------------------------------------------------------------------------------------


def decoded_by_hand(decoder, latents, sizes):
    """The pixel decoder step by step, upsampling to the given sizes."""
    x = decoder.middle(decoder.conv_in(decoder.from_latent(latents)))
    for stage, size in zip(decoder.stages, [*sizes, None], strict=True):
        for block, attention in zip(stage.blocks, stage.attention, strict=True):
            x = attention(block(x))
        if size is not None:
            if size == 2 * x.shape[2]:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            else:
                x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
            x = stage.upsample(x)
    return decoder.conv_out(F.silu(decoder.norm_out(x)))


@torch.no_grad()
@pytest.mark.parametrize(("patch", "sizes"), [(8, (8, 16, 32)), (6, (8, 16, 24))])
def test_only_the_last_upsampling_factor_depends_on_the_patch_size(models, patch, sizes):
    decoder, latents = models[patch].pixel_decoder, images(2, 6, 4, 4)
    assert torch.equal(decoder(latents), decoded_by_hand(decoder, latents, sizes))


@torch.no_grad()
def test_a_patch_size_that_is_not_a_power_of_two_is_saved_and_loaded(models, tmp_path):
    models[6].save_pretrained(tmp_path)
    EvoTokImageProcessor(size=24).save_pretrained(tmp_path)
    loaded, pixel_values = AutoModel.from_pretrained(tmp_path).eval(), images(2, 3, 24, 36)
    for name, value in models[6](pixel_values).items():
        assert torch.equal(value, loaded(pixel_values)[name]), name


def test_paper_384_encodes_and_decodes_378_pixels():
    config = EvoTokConfig.preset("paper_384")
    assert (config.image_size, config.grid_size) == (378, 27)
    with torch.device("meta"):
        latents = EvoTokEncoder(config)(torch.empty(1, 3, 378, 378))
        pixels = PixelDecoder(config)(latents.transpose(1, 2).unflatten(2, (27, 27)))
    assert latents.shape == (1, 729, 32) and pixels.shape == (1, 3, 378, 378)


@torch.no_grad()
def test_siglip_ignores_the_pixels_that_the_encoder_does_not_have():
    """A tower for 4 x 6 + 5 = 29 pixels has the encoder's 16 positions and uses the same 24 pixels."""
    model = small_model(SIX)
    sizes = {name.removeprefix("encoder_"): value for name, value in SIX.items() if name.startswith("encoder_")}
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_attention_heads=sizes["num_heads"],
            num_hidden_layers=sizes["num_layers"],
            image_size=29,
            patch_size=6,
        )
    ).eval()
    model.encoder.embeddings.load_state_dict(tower.embeddings.state_dict())
    model.encoder.encoder.load_state_dict(tower.encoder.state_dict())
    pixel_values = images(2, 3, 29, 29)
    features = tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state
    assert torch.equal(model.encoder.features(pixel_values[..., :24, :24]), features)


@pytest.mark.parametrize(
    ("patch", "multipliers", "scales"),
    [(1, (1,), []), (2, (1, 1), [2]), (3, (1, 1, 1), [2, 1.5]), (14, (1, 1, 2, 2, 4), [2, 2, 2, 1.75])],
)
def test_decoder_scales_multiply_to_the_patch_size(patch, multipliers, scales):
    sizes = {"image_size": 4 * patch, "patch_size": patch, "decoder_channel_multipliers": multipliers}
    assert EvoTokConfig(**SMALL | sizes).decoder_scales == scales


@pytest.mark.parametrize(
    ("patch", "multipliers", "fitting"),
    [(14, (1, 1, 2, 2), 5), (14, (1, 1, 2, 2, 4, 4), 5), (17, (1, 1, 2, 2, 4), 6), (8, (1, 1, 2, 2, 4), 4), (1, (), 1)],
)
def test_multipliers_that_do_not_fit_the_patch_size_are_rejected(patch, multipliers, fitting):
    message = f"{len(multipliers)} decoder_channel_multipliers.* patch_size {patch}: .* give {fitting} of them"
    with pytest.raises(UserError, match=message):
        EvoTokConfig(image_size=4 * patch, patch_size=patch, decoder_channel_multipliers=multipliers)


def test_image_sizes_that_are_not_multiples_of_the_patch_size_are_rejected():
    with pytest.raises(UserError, match="image_size 384 is not a multiple of patch_size 14; 378 is"):
        EvoTokConfig.preset("paper_384", image_size=384)
    with pytest.raises(UserError, match="patch_size must be at least 1 pixel, got 0"):
        EvoTokConfig(patch_size=0)


def test_a_research_checkpoint_with_such_a_patch_size_is_rejected(models):
    with pytest.raises(UserError, match="patches are 6 pixels wide, .* with 4 resolutions, upsamples 8 times; only"):
        convert_tokenizer(research_tokenizer(models[6]))


# Batches -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(model):
    pixel_values = images(7, 3, 32, 32)
    together = model(pixel_values)
    for index in range(7):
        alone = model(pixel_values[index : index + 1])
        assert torch.equal(alone.codes[0], together.codes[index])
        torch.testing.assert_close(alone.pixels[0], together.pixels[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.features[0], together.features[index], atol=1e-5, rtol=1e-5)


# Types of weights --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["to", "from_pretrained"])
def test_half_precision_weights_keep_exact_codebooks(model, dtype, how, tmp_path):
    pixel_values = images(2, 3, 32, 32)
    if how == "to":
        half = small_model().to(dtype)
    else:
        model.save_pretrained(tmp_path)
        half = EvoTokModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert torch.equal(half.quantizer.codebooks, model.quantizer.codebooks)
    encoded = half.encode(pixel_values)
    # The search is done in float32 regardless of the latents' dtype.
    assert torch.equal(encoded.codes, model.quantizer(encoded.latents.float()).codes)
    grid_codes = model.encode(pixel_values).codes
    for decode in ("decode_pixels", "decode_semantics"):
        exact, rounded = getattr(model, decode)(grid_codes), getattr(half, decode)(grid_codes)
        assert rounded.dtype == dtype and (exact - rounded.float()).norm() < 0.05 * exact.norm(), decode
    output = half(images(1, 3, 48, 24))
    assert output.pixels.shape == (1, 3, 48, 24) and output.pixels.isfinite().all() and output.features.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_decode_a_patch_size_that_is_not_a_power_of_two(models, dtype):
    half, codes = small_model(SIX).to(dtype), torch.randint(0, 20, (2, 16, 4))
    exact, rounded = models[6].decode_pixels(codes), half.decode_pixels(codes)
    assert rounded.dtype == dtype and (exact - rounded.float()).norm() < 0.05 * exact.norm()


# Compiled ----------------------------------------------------------------------------------------------------


def check_compiled(backend, shapes, sizes=SMALL):
    model = small_model(sizes)
    compiled = {
        name: torch.compile(getattr(model, name), fullgraph=True, backend=backend)
        for name in ("encode", "decode_pixels", "decode_semantics")
    }
    with torch.inference_mode():
        for shape in shapes:
            pixel_values = images(*shape)
            eager, encoded = model.encode(pixel_values), compiled["encode"](pixel_values)
            torch.testing.assert_close(encoded.latents, eager.latents, atol=1e-4, rtol=1e-4)
            assert torch.equal(encoded.codes, eager.codes)
            for name, codes in (("decode_pixels", eager.codes[..., :4]), ("decode_semantics", eager.codes)):
                torch.testing.assert_close(compiled[name](codes), getattr(model, name)(codes), atol=1e-4, rtol=1e-4)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_encode_and_decode_compile_without_graph_breaks(fresh_compiler):
    """Traces and lowers the model without generating machine code."""
    check_compiled("aot_eager", [(2, 3, 32, 32)])


def test_a_patch_size_that_is_not_a_power_of_two_compiles_without_graph_breaks(fresh_compiler):
    check_compiled("aot_eager", [(2, 3, 24, 24)], SIX)


@pytest.mark.slow
def test_varying_batches_and_sizes_compile_without_graph_breaks(fresh_compiler):
    check_compiled("aot_eager", [(2, 3, 32, 32), (3, 3, 32, 32), (3, 3, 48, 48), (1, 3, 64, 64)])
    check_compiled("aot_eager", [(2, 3, 24, 24), (3, 3, 24, 24), (3, 3, 36, 36), (1, 3, 48, 48)], SIX)


@pytest.mark.slow
def test_compiled_machine_code_agrees_with_eager(fresh_compiler):
    check_compiled("inductor", [(2, 3, 32, 32)])
    check_compiled("inductor", [(2, 3, 24, 24)], SIX)
