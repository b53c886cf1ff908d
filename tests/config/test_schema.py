import copy
import itertools
import json

import pytest
from ml_collections import ConfigDict

from madformer_jax.config import schema, validation
from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.config.table import FIELDS
from madformer_jax.errors import ConfigError
from madformer_jax.models.plan import ablation_switches, training_plan
from madformer_jax.runtime import stored_config


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
        ("codec.shift_factor", 0.1, "shift_factor=0.1 needs config.codec.scaling_factor"),
        ("sample.labels", "[3, 10]", "10 is not a class"),
        ("sample.labels", "[3.5]", "3.5 must be a class name"),
        ("sample.steps", 0, "out of range"),
        ("train.accumulate", 3, "not a multiple"),
        ("train.keep_every", 3, "only steps that are saved can be kept"),
        ("train.evaluate_every", 3, "only steps that are saved can be scored"),
        ("train.evaluate_n", 9, "at least 10"),
        ("profile", "3", "a first and a last step"),
        ("profile", "4:3", "a first and a last step"),
        ("profile", "5:6", "the last step is 5"),
        ("train.init_from", "None", "is not a path"),
        ("loss.text", 1.0, "a class has no tokens to predict"),
        ("text.length", 2, "config.text.length=2 needs captions"),
        ("text.tokenizer", "a.json", "needs captions"),
        ("text.vocabulary", 300, "captions or classes"),
        ("sample.prompts", "a cat", "needs a model that reads captions"),
        ("model.unet_channels", (8, 0), "multiples of"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("train.steps", 2**31, "at most 2147483647"),
        ("sample.n", 2**31, "at most 2147483647"),
        ("mesh.data", -(2**31), "at most 2147483647"),
        ("sample.guidance", float("nan"), "out of range"),
        ("sample.guidance", float("inf"), "from 0 to 1000"),
        ("sample.guidance_interval", (600, 200), r"interval=\(600, 200\) must be the lowest and the highest timestep"),
        ("sample.guidance_interval", (0, 1000), "from 0 to 999"),
        ("sample.guidance_interval", (-1, 5), "from 0 to 999"),
        ("sample.guidance_interval", (5,), "the lowest and the highest"),
        ("optimizer.learning_rate", float("inf"), "a finite number"),
        ("data.path", "None", "config.data.path='None' is not a path"),
        ("codec.path", "a\nb", "is not supported in a path"),
        ("model.clean_stream", False, "config.loss.clean"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(tiny_config, field, value, words):
    tiny_config.model.unet_channels, tiny_config.model.unet_attention = (8, 16), (False, True)
    tiny_config.update_from_flattened_dict({field: value})
    if field == "model.clean_stream":
        tiny_config.loss.clean = 0.1
    with pytest.raises(ConfigError, match=words) as error:
        schema.validate(tiny_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample.context_noise": 9, "train.context_noise": 5}, "is more than the model has trained with: use at most"),
        ({"train.context_noise": 5, "model.clean_timestep": "noisy"}, "needs config.model.clean_timestep='zero'"),
        ({"train.ema_snapshots": 3, "train.checkpoint_every": 2}, "only steps that are saved can be snapshots"),
        ({"train.elastic_depth": True, "train.elastic_depths": (1, 2), "train.scan": 2}, "set config.train.scan=1"),
        (
            {"train.elastic_depth": True, "train.elastic_depths": (1, 9)},
            "must be different numbers of diffusion layers",
        ),
        ({"sample.diffusion_depth": 1}, "the model is trained with D = "),
        ({"codec.name": "vae", "codec.downsampling": 6}, "must be a power of 2 for a VAE"),
        ({"train.own_context": 0.5, "model.blocks": 1}, "has no effect with config.model.blocks=1"),
        ({"train.context_noise": 5, "model.blocks": 1}, "has no effect with config.model.blocks=1"),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(tiny_config, changes, words):
    tiny_config.model.diffusion_depth = 2
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=words) as error:
        schema.validate(tiny_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("own_context", 0.5), ("context_noise", 5)])
def test_a_changed_context_is_refused_exactly_where_no_layer_reads_it(tiny_config, field, value):
    """The plan says whether the U-Net embeds clean blocks: for the layers, or for the hidden or the clean loss."""
    tiny_config.train[field] = value
    cases = itertools.product(
        (True, False), (True, False), ("sequence", "block"), ("condition", "noisy"), (0, 0.1), (0, 0.1)
    )
    for ar_condition, clean_stream, attention, hidden_from, hidden, clean in cases:
        c = copy.deepcopy(tiny_config)
        c.model.ar_condition, c.model.clean_stream, c.model.diffusion_attention = ar_condition, clean_stream, attention
        c.model.hidden_from, c.loss.hidden, c.loss.clean = hidden_from, float(hidden), float(clean and clean_stream)
        terms = tuple(term for term in LOSS_TERMS if c.loss[term])
        plan = training_plan(terms, ablation_switches(c))
        if "clean" in plan.downsampled:
            schema.validate(c)
        else:
            with pytest.raises(
                ConfigError, match=f"config.train.{field}={value} has no effect: no layer reads clean blocks"
            ):
                schema.validate(c)


@pytest.mark.parametrize("field", [name for name, field in FIELDS.items() if field.choices or field.has_range])
def test_every_choice_and_range_is_checked(tiny_config, field):
    default = FIELDS[field].default
    tiny_config.update_from_flattened_dict({field: "nonsense" if isinstance(default, str) else type(default)(-2)})
    with pytest.raises(ConfigError, match=f"config.{field}=.*(unknown: one of|out of range: it must be)") as error:
        schema.validate(tiny_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.classes": 0}, "config.sample.guidance=1.5 needs a class-conditional model"),
        (
            {"model.classes": 0, "sample.guidance": 1.0, "sample.guidance_interval": (1, 999)},
            r"config.sample.guidance_interval=\(1, 999\) needs a class-conditional model",
        ),
        ({"model.classes": 0, "sample.guidance": 1.0, "sample.labels": "3"}, "config.sample.labels needs a class"),
        (
            {"sample.solver": "ddim", "sample.spacing": "leading", "sample.steps": 1},
            "starts at t = 0 and returns noise",
        ),
        (
            {"sample.solver": "ddim", "sample.spacing": "linspace", "sample.steps": 1},
            "starts at t = 0 and returns noise",
        ),
        (
            {"sample.steps": 1000},
            "config.sample.steps=1000 is out of range: it must be from 1 to 999 for config.diffusion",
        ),
        ({"diffusion.path": "flow", "sample.spacing": "leading"}, "needs config.diffusion.path='ddpm': use trailing"),
        ({"diffusion.shift": 3.0}, "config.diffusion.shift=3 needs a continuous path"),
        ({"diffusion.time_sampling": "logit_normal"}, "set config.diffusion.path=flow or cosine"),
        ({"model.classes": 0, "text.vocabulary": 300, "text.length": 2}, "use at least 3"),
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
        schema.validate(tiny_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.width": "96"}, "config.model.width='96' must be of type int"),
        ({"model.width": 96.0}, "must be of type int"),
        ({"model.width": True}, "must be of type int"),
        ({"model.clean_stream": 1}, "must be of type bool"),
        ({"loss.image": None}, "must be of type float"),
        ({"model.unet_channels": (8, "16")}, r"config.model.unet_channels=\(8, '16'\) must be of type tuple of int"),
        ({"model.unet_channels": 8}, "must be of type tuple of int"),
        ({"train.stps": 3}, "config.train.stps is not a field: did you mean config.train.steps"),
        ({"model": 3}, "config.model=3 must be a section"),
    ],
)
def test_fields_of_a_wrong_kind_are_named(tiny_config, changes, words):
    """A config file or an old config.json may have such fields."""
    content = json.loads(tiny_config.to_json())
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (content[section] if section else content)[field] = value
    with pytest.raises(ConfigError, match=words) as error:
        schema.validate(ConfigDict(content, type_safe=False))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"run/config.json: .*{words}"):
        stored_config.config_from_saved(content, "run/config.json")


def test_a_field_that_is_missing_is_named_in_a_config_and_has_its_default_in_an_old_workdir(tiny_config):
    content = json.loads(tiny_config.to_json())
    del content["model"]["rope"]
    with pytest.raises(ConfigError, match="config.model.rope is missing"):
        schema.validate(ConfigDict(content))
    assert stored_config.config_from_saved(content, "config.json", trusted=True).to_dict() == tiny_config.to_dict()
    with pytest.raises(ConfigError, match="holds no config"):
        stored_config.config_from_saved([1], "config.json")


def test_channels_that_cannot_hold_the_noise_are_told(tiny_config):
    assert "unet_channels[0]=8 is less than the 16 values" in validation.warnings(tiny_config)[0]
    assert "stays above 0.50" in validation.warnings(tiny_config)[0]
    tiny_config.model.unet_channels = (16,)
    assert validation.warnings(tiny_config) == []


def test_a_tiny_config_of_a_depth_that_there_is_not_speaks_of_the_depth_that_was_asked_for():
    c = schema.base()
    c.model.diffusion_depth = 99
    with pytest.raises(ConfigError, match=r"diffusion_depth=99 \(D\) must be from 1 to config.model.depth=28"):
        schema.as_tiny(c)


def test_a_tiny_config_of_another_unet_and_of_several_depths_is_valid():
    c = schema.base()
    c.model.unet_channels, c.model.unet_attention, c.model.unet_groups = (64, 128, 256), (False, False, True), 32
    c.train.elastic_depth, c.train.elastic_depths = True, (7, 14, 28)
    schema.as_tiny(c)
    schema.validate(c)
    assert c.model.diffusion_depth == 2 and c.train.elastic_depths == (1, 2, 4)


def test_labels_run_through_the_chosen_classes_in_turn(tiny_config):
    tiny_config.sample.labels = "7,2"
    assert schema.sample_labels(tiny_config) == [7, 2, 7, 2, 7]


def test_random_labels_are_a_function_of_the_seed_and_the_number(tiny_config):
    tiny_config.sample.label_sampling, tiny_config.sample.n = "random", 3000
    tiny_config.sample.labels = "7,2,4"
    many = schema.sample_labels(tiny_config)
    assert many[:12] == [4, 4, 2, 7, 2, 2, 4, 7, 2, 2, 4, 2]  # on every machine
    assert all(900 < many.count(k) < 1100 for k in (2, 4, 7))
    tiny_config.sample.n = 5
    assert schema.sample_labels(tiny_config) == many[:5]
    tiny_config.sample.n, tiny_config.seed = 3000, 1
    assert 800 < sum(a == b for a, b in zip(schema.sample_labels(tiny_config), many, strict=True)) < 1200


def test_what_differs_from_the_defaults():
    c = schema.base()
    assert schema.differences(c) == {}
    c.model.width, c.model.unet_channels, c.seed = 96, [16, 32], 3
    assert schema.differences(c) == {"model.width": 96, "model.unet_channels": (16, 32), "seed": 3}
    c.model.unet_channels = list(schema.base().model.unet_channels)  # as JSON has it
    assert "model.unet_channels" not in schema.differences(c)


def test_sizes_of_the_release(tiny_config):
    c = schema.base()
    c.data.image_size = 1024
    assert schema.validate(c) == (128, 4, 16, 4, 32, 1024, 16, 256)


def test_names_of_classes_become_their_numbers(tiny_config):
    tiny_config.sample.labels = "zwei, 7,eins"
    schema.validate(tiny_config)  # without the data, nobody knows them
    with pytest.raises(ConfigError, match="'zwei' is neither a class number nor a class name"):
        schema.sample_labels(tiny_config)
    schema.resolve_label_numbers(tiny_config, ["null", "eins", "zwei"])
    assert schema.sample_labels(tiny_config) == [2, 7, 1, 2, 7]
    tiny_config.sample.labels = "zwie"
    with pytest.raises(ConfigError, match=r"'zwie' is neither .* \(names are 'zwei', \.\.\.\)"):
        schema.resolve_label_numbers(tiny_config, ["null", "eins", "zwei"])
    with pytest.raises(ConfigError, match="this data set names none"):
        schema.resolve_label_numbers(tiny_config, ())
