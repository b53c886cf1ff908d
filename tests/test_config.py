import pytest

from madformer_jax import config
from madformer_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.blocks", 6, "does not tile a 8 x 8 latent"),
        ("model.blocks", 64, "not divisible by the block U-Net's reduction of 2"),
        ("model.diffusion_depth", 4, "from 1 to config.model.depth=3"),
        ("model.diffusion_depth", 0, "from 1 to config.model.depth=3"),
        ("model.rope", "spiral", "'spiral' is unknown"),
        ("model.heads", 3, "head size"),
        ("model.unet_groups", 3, "multiples of"),
        ("codec.patch", 5, "not a multiple of 5"),
        ("sample.labels", "3,10", "10 is no class"),
        ("sample.labels", "three", "class numbers"),
        ("sample.steps", 0, "out of range"),
        ("train.accumulate", 3, "not a multiple"),
        ("loss.text", 1.0, "text_length"),
        ("model.clean_stream", False, "config.loss.clean"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(tiny_config, field, value, words):
    tiny_config.model.unet_channels, tiny_config.model.unet_attention = (8, 16), (False, True)
    *path, name = field.split(".")
    section = tiny_config
    for part in path:
        section = section[part]
    section[name] = value
    if field == "model.clean_stream":
        tiny_config.loss.clean = 0.1
    with pytest.raises(ConfigError, match=words) as error:
        config.validate(tiny_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", [*(choice.field for choice in config._CHOICES), *config._RANGES])
def test_every_choice_and_range_is_checked(tiny_config, field):
    *path, name = field.split(".")
    section = tiny_config
    for part in path:
        section = section[part]
    section[name] = "nonsense" if isinstance(section[name], str) else type(section[name])(-2)
    with pytest.raises(ConfigError, match=f"config.{field}=.*(unknown: one of|out of range: it must be)") as error:
        config.validate(tiny_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.classes": 0}, "config.sample.guidance=1.5 needs a class-conditional model"),
        ({"model.classes": 0, "sample.guidance": 1.0, "sample.labels": "3"}, "config.sample.labels needs a class"),
        ({"loss.image": 0.0, "loss.hidden": 0.0}, "all weights in config.loss are 0"),
        ({"model.unet_attention": (True, False)}, "one entry for each stage"),
        ({"model.unet_time_width": 7}, "config.model.unet_time_width=7 must be even"),
        ({"model.blocks": 0}, "config.model.blocks=0 does not tile"),
        ({"data.image_size": 30}, "config.data.image_size=30 is not a multiple of 4"),
    ],
)
def test_settings_that_contradict_each_other_are_named(tiny_config, changes, words):
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=words) as error:
        config.validate(tiny_config)
    assert "\n" not in str(error.value)


def test_labels_run_through_the_chosen_classes_in_turn(tiny_config):
    tiny_config.sample.labels = "7,2"
    assert config.labels(tiny_config) == [7, 2, 7, 2, 7]


def test_what_differs_from_the_defaults():
    c = config.base()
    assert config.differences(c) == {}
    c.model.width, c.model.unet_channels, c.seed = 96, [16, 32], 3
    assert config.differences(c) == {"model.width": 96, "model.unet_channels": (16, 32), "seed": 3}
    c.model.unet_channels = list(config.base().model.unet_channels)  # as JSON has it
    assert "model.unet_channels" not in config.differences(c)


def test_sizes_of_the_release(tiny_config):
    c = config.base()
    c.data.image_size = 1024
    assert config.validate(c) == (128, 4, 16, 4, 32, 1024, 16, 256)
