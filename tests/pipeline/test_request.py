"""Request: what it refuses, what it fills in, and what a file says of its picture."""

import inspect
from dataclasses import fields, replace

import numpy as np
import pytest

from sd.config import TINY
from sd.model_loader import new_models
from sd.pipeline import GenerateError, describe, generate
from sd.request import Request, again, parameters_of
from sd.sampling.samplers import SAMPLERS


def test_the_fields_are_arguments_of_generate_with_the_same_defaults():
    arguments = inspect.signature(generate).parameters
    for field in fields(Request):
        default = arguments[field.name].default
        assert field.name == "prompt" or default == field.default and type(default) is type(field.default), field.name
    others = {"models", "device", "idle_device", "tokenizer", "on_step"}
    assert {field.name for field in fields(Request)} == set(arguments) - others


@pytest.mark.parametrize("settings, sentence", [
    ({"prompt": []}, "prompt is an empty list"), ({"cfg_scale": "x"}, "cfg_scale is 'x'; allowed: a finite number"),
    ({"seed": 1.5}, "seed 1.5 is not allowed"), ({"seed": object()}, "is not allowed; a whole number"),
    ({"lora": 3}, "lora is 3; allowed: a dict"), ({"lora": ["a"]}, "allowed: a dict of multipliers"),
    ({"mask": "m.png"}, "input_image is missing"), ({"merged": "yes"}, "merged is 'yes'"), ({"eta": 0.5}, "only ddim"),
    ({"n_inference_steps": 0}, "n_inference_steps is 0; allowed: whole numbers from 1"), ({"n_inference_steps": 2.0}, "is 2.0"),
    ({"sampler_name": "foo"}, "sampler 'foo' is unknown; allowed: ddpm"),
])
def test_what_needs_no_model_is_refused_at_once(settings, sentence):
    with pytest.raises(GenerateError, match=sentence):
        Request(**{"prompt": "x"} | settings)


def test_a_change_of_a_request_is_checked_too():
    with pytest.raises(GenerateError, match="strength is 2"):
        replace(Request("x"), strength=2)


def test_fitting_fills_in_what_was_left_open_and_changes_a_fitted_request_no_more():
    image = np.zeros((20, 30, 3), np.uint8)
    request = Request(["a", "b"], ["c", "d"], images_per_prompt=2, seed=7, do_cfg=False, input_image=image, mask=image)
    fitted = request.fit(TINY)
    assert fitted.prompt == ["a", "a", "b", "b"] and fitted.uncond_prompt == ["c", "c", "d", "d"]
    assert fitted.seed == [7, 8, 9, 10] and fitted.images_per_prompt == 1 and fitted.cfg_scale == 1.0
    assert (fitted.width, fitted.height, fitted.spacing) == (64, 64, "leading")
    assert [(image.size, image.mode) for image in (fitted.input_image, fitted.mask)] == [((64, 64), "RGB"), ((64, 64), "L")]
    twice = fitted.fit(TINY)
    for field in fields(Request):
        if field.name not in ("input_image", "mask"):
            assert getattr(twice, field.name) == getattr(fitted, field.name), field.name
    assert twice.input_image.tobytes() == fitted.input_image.tobytes()
    assert (request.prompt, request.width) == (["a", "b"], None)


def test_a_seed_that_is_left_open_is_drawn_once():
    fitted = Request(["a", "b"]).fit(TINY)
    assert fitted.seed == fitted.fit(TINY).seed and fitted.seed[1] == fitted.seed[0] + 1
    assert fitted.seed != Request(["a", "b"]).fit(TINY).seed


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_says_what_makes_it_again(sampler):
    models, image = new_models(TINY), np.zeros((8, 8, 3), np.uint8)
    for settings in ({"n_inference_steps": 4}, {"input_image": image, "strength": 0.5, "do_cfg": False}, {"width": 72}):
        request = Request("a cat", "dog", sampler_name=sampler, seed=3, lora={}, **settings)
        about = parameters_of(request, models)
        assert list(about)[:11] == ["prompt", "uncond_prompt", "n_inference_steps", "sampler_name", "cfg_scale", "seed",
                                    "width", "height", "model", "spacing", "clip_skip"]
        assert about == describe(models, "a cat", uncond_prompt="dog", seed=3, sampler_name=sampler, **settings)
        others = {"input_image": image} if "input_image" in settings else {}
        assert parameters_of(again(about, "a.png", models, **others), models) == about


def test_describe_leaves_out_how_a_picture_was_run():
    models = new_models(TINY)
    assert describe(models, "x", seed=1, merged=True, device="cpu", on_step=print) == describe(models, "x", seed=1)
    with pytest.raises(GenerateError, match="describe.. is for one picture"):
        describe(models, "x", seed=1, lora=[{}])
