"""The shipped configs: their variants are valid, and of the size that the paper says."""

import functools
import math

import jax
import pytest

from madformer_jax.cli import command_line
from madformer_jax.config import schema, validation
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def read(name, *overrides):
    c, _ = command_line.parse(["main", f"--config=configs/{name}", "--workdir=unused", *overrides])
    schema.validate(c)
    return c


def parameters(c):
    tree = jax.eval_shape(functools.partial(madformer.init, madformer.build(c, "cpu")), jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["ffhq1024.py", "imagenet256.py"])
@pytest.mark.parametrize("depth", [7, 14, 21, 28])
@pytest.mark.parametrize("blocks", [1, 4, 8, 16])
def test_variants_of_depth_and_length(name, depth, blocks):
    for tiny in ("", ",tiny"):
        c = read(f"{name}:D={depth},L={blocks}{tiny}")
        assert c.model.diffusion_depth / c.model.depth == depth / 28
        assert c.model.blocks == blocks


@pytest.mark.parametrize("side", [32, 64, 128, 256])
def test_drawings_have_as_many_tokens_a_block_at_every_size(side):
    c = read(f"drawings.py:side={side}")
    assert c.data.image_size == side and schema.validate(c).tokens == 16
    assert not validation.warnings(c)


def test_the_sample_grid_of_the_first_command_is_full_and_has_a_class_per_column():
    c = read("drawings.py")
    columns = math.isqrt(c.sample.n)
    assert c.sample.n == c.sample.grid == columns**2 and columns % c.model.classes == 0
    assert c.train.judge and c.evaluate.n % c.sample.n == 0


def test_drawings_from_captions_have_the_tokenizer_of_the_package():
    c = read("drawings.py:side=32,text")
    assert text.tokenizer_for_config(c).vocabulary == c.text.vocabulary and not c.model.classes


def test_ffhq_in_the_release_variant_has_the_release_s_parameters(reference):
    shapes = reference("madformer_ffhq1024_state_dict.json")
    shapes = shapes.get("shapes", shapes)
    assert parameters(read("ffhq1024.py:release")) == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", ["ffhq1024.py:text", "imagenet256.py:text"])
def test_a_model_that_reads_llama_3_s_tokens_has_the_paper_s_2_1_billion_parameters(name):
    assert round(parameters(read(name)) / 1e9, 2) == 2.14
    small = read(f"{name},tiny")
    assert text.tokenizer_for_config(small).vocabulary == small.text.vocabulary


def test_steps_follow_from_epochs():
    assert read("ffhq1024.py").train.steps == 218_750
    assert read("imagenet256.py").train.steps == 250_227


@pytest.mark.parametrize(
    "name, n, solver, steps",
    [
        ("ffhq1024.py", 8_000, "ddim", 250),
        ("ffhq1024.py:release", 8_000, "dpmpp_2m", 250),
        ("imagenet256.py", 50_000, "ddim", 100),
    ],
)
def test_scores_are_taken_as_in_the_paper(name, n, solver, steps):
    c = read(name)
    assert (c.evaluate.n, c.evaluate.network, c.evaluate.split) == (n, "inception", "train")
    assert (c.sample.solver, c.sample.steps, c.sample.guidance) == (solver, steps, 1.0)


def test_a_tiny_variant_can_be_judged_where_there_is_no_inception():
    assert read("ffhq1024.py:tiny").evaluate.network == "classifier"


@pytest.mark.parametrize("variant", ["D=x", "depth=7", "tiny=1", "huge"])
def test_a_variant_that_is_none_is_told(variant):
    with pytest.raises(
        ConfigError, match=f"variant '{variant}' is unknown: it is made of D=<number>, L=<number>, tiny"
    ):
        schema.variant(variant, {"D": 14, "L": 4}, ("tiny",))
