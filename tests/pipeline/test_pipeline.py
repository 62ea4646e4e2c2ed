"""generate() against diffusers' pipelines on the same random weights, and what a user may ask of it."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from sd.config import TINY
from sd.lora import LoRAError, active_multipliers, apply_lora_to_model, get_lora_parameters, lora_layers, set_adapters
from sd.model_loader import Models, preload_models_from_standard_weights, save_checkpoint
from sd.pipeline import GenerateError, compare, generate
from sd.sampling.samplers import SAMPLERS
from tests.peers import ours_and_peers
from tests.sampling.peers import peer_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    ours, _ = ours_and_peers(TINY)
    # Random weights give flat pictures; a louder last layer gives something to compare.
    ours["decoder"].conv_out.weight.data.mul_(3)
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(Models(ours, TINY), path)
    return path


@pytest.fixture
def models(folder):
    return preload_models_from_standard_weights(folder, "cpu")


def peer_pipeline(cls, folder, sampler_name, **kwargs):
    pipe = cls.from_pretrained(folder, **kwargs)
    pipe.scheduler = peer_of(sampler_name, base=pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours, theirs):
    assert ours.shape == np.asarray(theirs).shape and ours.std() > 20
    return np.abs(ours.astype(float) - np.asarray(theirs).astype(float)).mean()


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_same_seed_same_picture_as_diffusers(folder, models, sampler_name):
    pipe = peer_pipeline(StableDiffusionPipeline, folder, sampler_name)
    theirs = pipe("a photo of a cat", negative_prompt="blurry", num_inference_steps=6, guidance_scale=4.0, height=72, width=88,
                  generator=torch.Generator().manual_seed(7), output_type="pil").images[0]
    ours = generate("a photo of a cat", "blurry", models=models, seed=7, n_inference_steps=6, cfg_scale=4.0, height=72,
                    width=88, sampler_name=sampler_name)
    assert difference(ours, theirs) < 0.5


def test_a_batch_equals_diffusers_with_a_generator_for_each_image(folder, models):
    pipe = peer_pipeline(StableDiffusionPipeline, folder, "euler_a")
    theirs = pipe(["a cat", "a dog"], num_images_per_prompt=2, num_inference_steps=4, height=64, width=64, output_type="pil",
                  generator=[torch.Generator().manual_seed(s) for s in (3, 4, 5, 6)]).images
    ours = generate(["a cat", "a dog"], models=models, seed=3, images_per_prompt=2, n_inference_steps=4, sampler_name="euler_a")
    assert ours.shape == (4, 64, 64, 3) and difference(ours, np.stack(theirs)) < 0.5


def picture(seed=0, size=(90, 70), mode="RGB"):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.BICUBIC).convert(mode)


@pytest.mark.parametrize("sampler_name", ["ddim", "dpmpp_2m", "euler", "euler_a"])
def test_img2img_equals_diffusers(folder, models, sampler_name):
    pipe = peer_pipeline(StableDiffusionImg2ImgPipeline, folder, sampler_name)
    image = picture().resize((64, 64), Image.LANCZOS)
    theirs = pipe("a cat", image, strength=0.6, num_inference_steps=7, guidance_scale=3.0, output_type="pil",
                  generator=[torch.Generator().manual_seed(5)]).images[0]
    ours = generate("a cat", input_image=image, strength=0.6, models=models, seed=5, n_inference_steps=7, cfg_scale=3.0,
                    sampler_name=sampler_name)
    assert difference(ours, theirs) < 0.5


@pytest.mark.parametrize("sampler_name", ["ddim", "dpmpp_2m"])
def test_inpainting_equals_diffusers(folder, models, sampler_name):
    pipe = peer_pipeline(StableDiffusionInpaintPipeline, folder, sampler_name)
    image, mask = picture().resize((64, 64), Image.LANCZOS), Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    theirs = pipe("a cat", image, mask, strength=0.7, num_inference_steps=7, guidance_scale=3.0, output_type="pil", height=64,
                  width=64, generator=[torch.Generator().manual_seed(5)]).images[0]
    ours = generate("a cat", input_image=image, mask=mask, strength=0.7, models=models, seed=5, n_inference_steps=7,
                    cfg_scale=3.0, sampler_name=sampler_name)
    assert difference(ours, theirs) < 0.5


def test_an_image_depends_on_its_own_seed_only(models):
    arguments = dict(models=models, n_inference_steps=3, sampler_name="ddpm")
    together = generate(["a cat", "a dog", "a bird"], seed=[5, 9, 2], **arguments)
    alone = generate("a dog", seed=9, **arguments)
    assert np.abs(together[1].astype(int) - alone).max() <= 1
    assert np.array_equal(generate("a dog", seed=9, **arguments), alone)
    assert not np.array_equal(generate("a dog", seed=10, **arguments), alone)


# ---- LoRA in generate ------------------------------------------------------------------------------------------------

def add_lora(models, *names, targets="kohya"):
    for i, name in enumerate(names):
        apply_lora_to_model({k: models[k] for k in ("clip", "diffusion")}, rank=2, alpha=3.0, target_modules=targets, name=name)
        g = torch.Generator().manual_seed(i)
        for p in get_lora_parameters(models, name):
            p.data.add_(torch.randn(p.shape, generator=g) * 0.15)
    return models


def test_toggle_blend_and_zero(models):
    make = lambda **kw: generate("a cat", models=models, seed=1, n_inference_steps=2, **kw)  # noqa: E731
    base = make()
    add_lora(models, "a", "b")
    set_adapters(models, {"a": 1.0})
    on = make()
    assert not np.array_equal(on, base)
    assert np.array_equal(make(use_lora=False), base)
    assert np.array_equal(make(use_lora=False, lora={"a": 1.0}), base)
    assert np.array_equal(make(lora={}), base)
    assert np.array_equal(make(lora={"a": 0.0, "b": 0.0}), base)
    assert np.array_equal(make(lora={"a": 1.0}), on)
    assert not np.array_equal(make(lora={"a": 1.0, "b": 0.5}), on)
    assert active_multipliers(models) == {"a": 1.0}
    with pytest.raises(LoRAError, match="no adapter is named 'c'"):
        make(lora={"c": 1.0})
    assert active_multipliers(models) == {"a": 1.0} and np.array_equal(make(), on)


def test_merged_and_unmerged_agree_and_the_choice_follows_the_dtype(models):
    add_lora(models, "a")
    arguments = dict(models=models, seed=1, n_inference_steps=2, lora={"a": 0.8})
    merged, adapters = generate("a cat", merged=True, **arguments), generate("a cat", merged=False, **arguments)
    assert not any(layer.merged_weight is not None for layer in lora_layers(models).values())
    assert np.abs(merged.astype(int) - adapters).max() <= 1
    assert np.array_equal(generate("a cat", **arguments), merged)
    assert all(layer.merged_weight is not None for layer in lora_layers(models).values())
    for network in models.values():
        network.to(torch.bfloat16)
    generate("a cat", **arguments)
    assert not any(layer.merged_weight is not None for layer in lora_layers(models).values())
    with pytest.raises(GenerateError, match="merged is 'yes'; allowed: 'auto', True, False"):
        generate("a cat", models=models, merged="yes")


@pytest.mark.parametrize("do_cfg", [True, False])
def test_a_batch_with_another_lora_for_each_image_equals_the_separate_runs(models, do_cfg):
    add_lora(models, "a", "b")
    variants = [{}, {"a": 1.0}, {"b": -0.7, "a": 0.2}, {"b": 0.0}]
    arguments = dict(models=models, n_inference_steps=3, sampler_name="dpmpp_2m", do_cfg=do_cfg)
    together = generate(["a cat"] * 4, seed=[1] * 4, lora=variants, **arguments)
    for i, variant in enumerate(variants):
        alone = generate("a cat", seed=1, lora=variant, merged=False, **arguments)
        assert np.abs(together[i].astype(int) - alone).max() <= 1
    assert np.array_equal(together[0], together[3]) and not np.array_equal(together[0], together[1])
    with pytest.raises(GenerateError, match="lora has 2 dicts for 4 images"):
        generate(["a cat"] * 4, lora=variants[:2], **arguments)


def test_img2img_with_another_lora_for_each_image(models):
    add_lora(models, "a")
    arguments = dict(models=models, input_image=picture(), strength=0.5, n_inference_steps=4, seed=[1, 1])
    mask = Image.new("L", (20, 20), 255)
    for kw in ({}, {"mask": mask}):
        together = generate(["x", "x"], lora=[{}, {"a": 1.0}], **arguments, **kw)
        alone = generate(["x", "x"], lora={"a": 1.0}, **arguments, **kw)
        assert np.abs(together[1].astype(int) - alone[1]).max() <= 1 and not np.array_equal(together[0], together[1])


def test_multipliers_for_another_number_of_images_are_refused(models):
    add_lora(models, "a")
    set_adapters(models, {"a": torch.tensor([0.0, 1.0, 1.0])})
    for prompts in ("x", ["x"] * 4):
        with pytest.raises(GenerateError, match="the multipliers of 'a' are for 3 images"):
            generate(prompts, models=models, n_inference_steps=2)


def test_compare_makes_one_sheet_of_all_variants(models):
    add_lora(models, "a")
    sheet = compare(["a cat", "a dog"], models, [{}, {"a": 1.0}, {"a": 0.5}], n_inference_steps=2)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3 and sheet.shape[2] == 3
    assert sheet.shape[1] > 3 * 64 and sheet.shape[0] > 2 * 64
    assert np.array_equal(compare(["a cat"], models, n_inference_steps=2), compare(["a cat"], models, [{}, {"a": 1.0}],
                                                                                   n_inference_steps=2))


def test_inpainting_models_with_nine_channels_take_mask_and_picture():
    from dataclasses import replace
    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    ours, _ = ours_and_peers(config)
    models = Models(ours, config)
    with pytest.raises(GenerateError, match="input_image is missing"):
        generate("x", models=models, n_inference_steps=2)
    with pytest.raises(GenerateError, match="needs mask="):
        generate("x", models=models, n_inference_steps=2, input_image=picture())
    mask = Image.new("L", (64, 64), 255)
    out = generate(["x", "y"], models=models, n_inference_steps=2, input_image=picture(), mask=mask, strength=1.0, seed=1)
    assert out.shape == (2, 64, 64, 3)


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    (dict(sampler_name="eulr"), r"sampler 'eulr' is unknown; allowed: ddpm, ddim"),
    (dict(spacing="even"), r"spacing 'even'"),
    (dict(n_inference_steps=-5), r"n_inference_steps is -5; allowed: whole numbers from 1"),
    (dict(n_inference_steps=5000), r"5000 steps are not possible"),
    (dict(width=100), r"width is 100, no multiple of 8; the nearest are 96 and 104"),
    (dict(height=0), r"height is 0; allowed: whole numbers of pixels from 8 to 512, 8 times this"),
    (dict(width=10**9), r"width is 1000000000"),
    (dict(height=64.0), r"height is 64.0"),
    (dict(prompt=[]), r"prompt is an empty list"),
    (dict(prompt=[1]), r"prompt holds 1, which is not a string"),
    (dict(prompt=None), r"prompt holds None, which is not a string"),
    (dict(uncond_prompt=["a", "b"]), r"2 uncond_prompts for 1 prompts"),
    (dict(images_per_prompt=0), r"images_per_prompt is 0"),
    (dict(seed=-1), r"seed -1 is not allowed"),
    (dict(seed=[1, 2]), r"2 seeds are given for 1 images"),
    (dict(cfg_scale=float("nan")), r"cfg_scale is nan"),
    (dict(cfg_scale=None), r"cfg_scale is None"),
    (dict(strength="a"), r"strength is 'a'"),
    (dict(clip_skip=1.5), r"clip_skip is 1.5; allowed: whole numbers from 1 to 2"),
    (dict(sampler_name=[]), r"sampler \[\] is unknown"),
    (dict(device="cuda:9"), r"device 'cuda:9' cannot be used"),
    (dict(images_per_prompt=2.0), r"images_per_prompt is 2.0; allowed: whole numbers from 1 to 4096"),
    (dict(clip_skip=9), r"clip_skip is 9; allowed: whole numbers from 1 to 2"),
    (dict(eta=0.5), r"only ddim has an eta"),
    (dict(mask=Image.new("L", (8, 8))), r"input_image is missing"),
    (dict(input_image="no such file.png"), r"no such file"),
    (dict(input_image=picture(), strength=0.01), r"strength 0.01 of 3 steps leaves no step"),
    (dict(input_image=picture(), strength=1.5), r"strength is 1.5; allowed: 0 to 1"),
    (dict(models={}), r"models is a dict; pass what preload_models_with_lora"),
])
def test_bad_arguments_are_one_sentence_before_any_network_runs(models, arguments, sentence):
    for network in models.values():
        network.register_forward_pre_hook(lambda *a: pytest.fail("a network ran"))
    with pytest.raises(ValueError, match=sentence):
        generate(**(dict(prompt="a cat", models=models, n_inference_steps=3) | arguments))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16", "CMYK"])
def test_input_pictures_of_any_mode_work(models, mode):
    image = picture().convert("L").convert("I").convert("I;16") if mode == "I;16" else picture(mode=mode)
    assert generate("x", input_image=image, models=models, n_inference_steps=2, seed=1).shape == (64, 64, 3)


def test_exif_rotation_is_applied(models, tmp_path):
    image = picture(size=(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 270 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    arguments = dict(models=models, n_inference_steps=4, strength=0.3, seed=1)
    shown = generate("x", input_image=image.transpose(Image.Transpose.ROTATE_270), **arguments)
    assert np.array_equal(generate("x", input_image=str(tmp_path / "turned.png"), **arguments), shown)


def test_empty_and_endless_prompts_work(models):
    generate("", models=models, n_inference_steps=1, seed=1)
    with pytest.warns(UserWarning, match="the prompt has .* tokens, the model takes 75; cut: "):
        generate("a photograph of " * 625, models=models, n_inference_steps=1, seed=1)


def test_no_argument_is_written_to(models):
    image = np.asarray(picture()).copy()
    before = image.copy()
    lora, prompts = {}, ["a"]
    generate(prompts, input_image=image, lora=lora, models=models, n_inference_steps=2, seed=1)
    assert np.array_equal(image, before) and lora == {} and prompts == ["a"]


def test_steps_are_reported(models):
    seen = []
    generate("x", models=models, n_inference_steps=3, seed=1, sampler_name="euler",
             on_step=lambda i, n, x0: seen.append((i, n)))
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_a_picture_of_nan_is_an_error_that_says_why(models):
    arguments = dict(models=models, n_inference_steps=1, seed=1)
    with pytest.raises(RuntimeError, match="not finite: a network overflowed in float32; load it with"):
        generate("x", cfg_scale=1e38, **arguments)
    with torch.no_grad():
        models["diffusion"].mid_block.resnets[0].conv1.weight[0, 0, 1, 1] = float("nan")
    with pytest.raises(RuntimeError, match="1 tensors .* hold NaN or infinity, first: diffusion.mid_block"):
        generate("x", **arguments)


def test_networks_move_to_the_idle_device_and_come_back(models):
    arguments = dict(models=models, n_inference_steps=2, seed=1)
    expected = generate("x", **arguments)
    assert np.array_equal(generate("x", device="cpu", idle_device="cpu", **arguments), expected)
