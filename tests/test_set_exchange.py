"""`stepfuse set import`, `export`, `merge` and `card`."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open

from stepfuse.fuse.backbones.guidance import Branch
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import card, code, plain
from stepfuse.fuse.sets.create import copy_set, create_set
from stepfuse.fuse.sets.manifest import MANIFEST, check_writable
from stepfuse.scripts.cli.main import main
from tests.fixtures_sampler import PROMPTS, assert_near, noise, save_set, save_three_adapters
from tests.fixtures_tiny import add_random_lora, refused, save_stable_diffusion

WEIGHTS_OF = "a=0.5,b=0.3,c=0.2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("exchange")
    folders = save_three_adapters(root, save_stable_diffusion(root / "base"))
    save_set(root / "set", folders)
    return root


@pytest.fixture
def mine(root, tmp_path):
    """The set, to be changed."""
    return shutil.copytree(root / "set", tmp_path / "mine")


@pytest.fixture
def stranger(root, tmp_path):
    """A LoRA as diffusers saves it, without a word of ours."""
    pipeline = load_pipeline(str(root / "base"))
    add_random_lora(pipeline, "style", rank=3, alpha=6, seed=7)
    type(pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="style"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["style"].to_dict(),
        weight_name="style.safetensors",
    )
    return tmp_path / "style.safetensors"


def run(*arguments):
    main([str(argument) for argument in arguments])


def complaint(*arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    return str(error.value.code)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def predict(pipeline, x, t=500):
    """The UNet's own prediction for two prompts."""
    tokens = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    with torch.no_grad():
        return pipeline.unet(x, t, tokens, return_dict=False)[0]


# In.


def test_a_lora_from_elsewhere_makes_a_set_and_joins_one(root, stranger, tmp_path, capsys):
    run(
        "set",
        "import",
        stranger,
        "--objective",
        "style",
        "--eta",
        0.8,
        "--set",
        tmp_path / "set",
        "--base",
        root / "base",
    )
    loaded = load_set(tmp_path / "set")
    (adapter,) = loaded.adapters
    assert (loaded.guidance, loaded.guidance_scale, loaded.num_inference_steps) == ("full", 7.5, 50)
    assert (adapter.name, adapter.objective.reward, adapter.source) == ("style", "unknown", "style.safetensors")
    assert adapter.objective.variance == EtaSchedule(eta=0.8)
    assert adapter.rank == 3

    again = ["--objective", "second", "--eta", 0.5, "--license", "mit", "--reward", "colourfulness"]
    run("set", "import", stranger, *again, "--set", tmp_path / "set")
    loaded = load_set(tmp_path / "set")
    assert loaded.names == ["style", "second"]
    assert loaded.default_weights == {"style": 0.5, "second": 0.5}
    assert (loaded.adapters[1].license, loaded.adapters[1].objective.reward) == ("mit", "colourfulness")

    # One stranger alone in a set is what diffusers makes of its file.
    pipeline = load_pipeline(str(root / "base"))
    pipeline.load_lora_weights(stranger.parent, weight_name=stranger.name)
    sampler = FusedSampler.from_pretrained(tmp_path / "set")
    x = noise(0)
    (ours,) = sampler.denoiser.run(x, 500, sampler_conditioning(sampler), [Branch(Network.of("style"), "+")])
    assert_near(ours, predict(pipeline, x))


def sampler_conditioning(sampler):
    return sampler.backbone.encode(PROMPTS, ["", ""])


def test_a_set_remembers_the_variant_of_its_base(root, stranger, tmp_path):
    """The weights under the variant are those of the base that has the LoRA's shapes."""
    base = save_stable_diffusion(tmp_path / "base", variant="fp16")
    for number, options in enumerate(([], ["--variant", "fp16"])):
        folder = tmp_path / f"set{number}"
        run("set", "import", stranger, "--objective", "a", "--eta", 1, "--set", folder, "--base", base, *options)
        run("set", "import", stranger, "--objective", "b", "--eta", 1, "--set", folder, "--guidance_scale", 7.5)
        assert load_set(folder).base["variant"] == "fp16"
        run("set", "validate", folder, "--load")
    into = ("set", "import", stranger, "--objective", "c", "--eta", 1)
    assert "--variant" in complaint(*into, "--set", folder, "--variant", "ema")
    told = complaint(*into, "--set", tmp_path / "other", "--base", base, "--variant", "ema")
    assert "'ema'" in told
    assert "fp16" in told
    assert "variant" not in load_set(root / "set").base


def test_a_set_has_the_resolution_of_its_first_import(root, stranger, tmp_path):
    base, folder = save_stable_diffusion(tmp_path / "base"), tmp_path / "set"
    first = ("set", "import", stranger, "--objective", "a", "--eta", 1, "--set", folder, "--base", base)
    assert "resolution 9" in complaint(*first, "--resolution", 9)
    run(*first, "--resolution", 32)
    second = ("set", "import", stranger, "--objective", "b", "--eta", 1, "--set", folder, "--guidance_scale", 7.5)
    assert "resolution 32; leave out --resolution" in complaint(*second, "--resolution", 64)
    run(*second)
    assert [entry.base.get("resolution") for entry in load_set(folder).adapters] == [32, 32]
    assert FusedSampler.from_pretrained(folder).backbone.size() == (32, 32)


@pytest.mark.parametrize("name", ["OWNER/NAME", "emoji", "outputs/gone"])
def test_a_set_that_is_not_in_a_folder_cannot_be_changed_and_is_not_downloaded(name, monkeypatch):
    monkeypatch.setattr("stepfuse.fuse.sets.adapter_set.fetch_set", lambda name: pytest.fail("the hub is asked"))
    with refused(repr(name), f"stepfuse pull {name} FOLDER"):
        check_writable(name)


def test_an_import_that_fails_leaves_the_set_as_it_was(root, mine, stranger, tmp_path):
    before = contents(mine)
    taken = ("set", "import", stranger, "--eta", 1, "--set", mine, "--guidance", "shared", "--guidance_scale", 3)
    assert "'a' already" in complaint(*taken, "--objective", "a")
    assert "a set has one: pass --guidance shared" in complaint(
        "set", "import", stranger, "--objective", "style", "--eta", 1, "--set", mine
    )
    assert "eta 2.0" in complaint(*taken[:4], 2, *taken[5:], "--objective", "style")
    assert "'../x'" in complaint(*taken, "--objective", "../x")
    assert "leave out --base" in complaint(*taken, "--objective", "style", "--base", "emoji")
    assert "does not match" in complaint(*taken, "--objective", "style", "--license", "no licence")
    assert contents(mine) == before
    assert "--base" in complaint("set", "import", stranger, "--objective", "x", "--eta", 1, "--set", tmp_path / "new")
    assert "no LoRA at" in complaint(
        "set",
        "import",
        tmp_path / "no.safetensors",
        "--objective",
        "x",
        "--eta",
        1,
        "--set",
        mine,
        "--guidance",
        "shared",
        "--guidance_scale",
        3,
    )
    assert not (tmp_path / "new").exists()


def test_a_lora_of_another_base_is_refused(root, stranger, tmp_path):
    wider = save_stable_diffusion(tmp_path / "wider", channels=(16, 48))
    told = complaint(
        "set", "import", stranger, "--objective", "x", "--eta", 1, "--set", tmp_path / "new", "--base", wider
    )
    assert "of another base" in told


def test_an_adapter_of_one_set_may_be_put_into_another(root, tmp_path):
    create_set(tmp_path / "other", [root / "set" / "b", root / "set" / "c"])
    assert load_set(tmp_path / "other").names == ["b", "c"]
    assert load_set(tmp_path / "other").adapters[0].sha256 == load_set(root / "set").adapters[1].sha256


# Out.


def test_every_adapter_is_exported_or_one(root, tmp_path, capsys):
    run("set", "export", root / "set", "--output", tmp_path / "all")
    assert sorted(contents(tmp_path / "all")) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    run("set", "export", root / "set", "b", "--output", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "all" / "b.safetensors").read_bytes()
    run("set", "export", root / "set", "b", "--format", "peft", "--output", tmp_path / "peft")
    assert sorted(contents(tmp_path / "peft")) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "b.safetensors", "pt") as tensors:
        assert tensors.metadata()["ss_output_name"] == "b"
    assert "exists" in complaint("set", "export", root / "set", "b", "--output", tmp_path / "b.safetensors")
    assert "'d'" in complaint("set", "export", root / "set", "d", "--output", tmp_path / "d.safetensors")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_mixture_as_one_file_draws_what_the_soup_draws(root, tmp_path, form, capsys):
    """In a pipeline that knows nothing of sets; rank is the sum of ranks."""
    file = tmp_path / "soup.safetensors"
    run("set", "merge", root / "set", "--weights", WEIGHTS_OF, "--output", file, "--format", form, "--strength", 1.5)
    assert "rank 7, the exact soup" in capsys.readouterr().out  # 1 + 2 + 4
    pipeline = load_pipeline(str(root / "base"))
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    sampler = FusedSampler.from_pretrained(root / "set", rule="soup", guidance="off")
    x = noise(0)
    soup = Network.merged({"a": 1.5 * 0.5, "b": 1.5 * 0.3, "c": 1.5 * 0.2})
    (ours,) = sampler.denoiser.run(x, 500, sampler_conditioning(sampler), [Branch(soup, "+")])
    assert_near(predict(pipeline, x), ours, 1e-4)


def test_a_mixture_of_a_rank_says_what_it_leaves_out(root, tmp_path, capsys):
    run("set", "merge", root / "set", "--rank", 2, "--output", tmp_path / "two.safetensors")
    said = capsys.readouterr().out
    assert "rank 2, " in said
    assert "% of the exact soup left out" in said
    for told, culprit in (
        (("--weights", "d=1"), "'d'"),
        (("--weights", "a=0.9@0-0.5,b=1"), "no one LoRA"),
        (("--strength", 0), "nothing to merge"),
        (("--rank", 0), "rank 0"),
        (("--output", tmp_path / "x.bin"), ".safetensors"),
    ):
        output = () if "--output" in told else ("--output", tmp_path / "x.safetensors")
        assert culprit in complaint("set", "merge", root / "set", *told, *output)
    assert not (tmp_path / "x.safetensors").exists()


# The card.


def test_a_card_has_its_picture_and_says_what_is_licensed_how(mine, capsys):
    run("set", "card", mine, "--license", "mit", "--base_license", "apache-2.0", "--prompt", "a fox", "--device", "cpu")
    with Image.open(mine / "strip.png") as strip:
        assert strip.width > 5 * 96  # the base, three adapters and their mixture
    text = (mine / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert "| a | mit |" in text
    assert "apache-2.0 |" in text
    assert "](strip.png)" in text
    assert load_set(mine).adapters[0].license == "mit"
    assert "no summary.json" in complaint("set", "card", mine, "--evaluation", mine)


EVIL = "<script>alert(1)</script>|`x`[y](javascript:z)\n# head"


def test_what_a_stranger_wrote_is_text_on_a_card(mine):
    values = json.loads((mine / MANIFEST).read_text())
    values["base"]["name_or_path"] = EVIL
    values["adapters"][0]["reward"]["name"] = EVIL
    values["adapters"][0]["source"] = EVIL
    values["adapters"][1]["training"] = {"algorithm": EVIL[:64], "health": [{"step": EVIL, "what": EVIL}]}
    values["default_rule"] = EVIL[:60]
    gain = {"mean": 1.0, "low": 0.5, "high": 1.5}
    cell = {"rule": EVIL[:60], "weights": EVIL, "strength": 1.0, "gains": {"a": gain}}
    values["evaluation"] = {"prompts": 1, "seeds": 1, "objectives": {"a": EVIL}, "cells": [cell]}
    (mine / MANIFEST).write_text(json.dumps(values))
    text = card(load_set(mine), source="owner/name", shown=[])
    front, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["model-index"][0]["results"]
    assert "<script" not in body
    assert "](javascript" not in body
    assert "\n# head" not in body
    for row in (line for line in body.splitlines() if line.startswith("| a |")):
        assert row.count("|") in (10, 3)  # of the adapters' table and of the licences'
    assert plain("<b>") == "&lt;b&gt;"
    assert code("`<b>|") == "`'‹b›¦`"


def test_a_copy_of_a_set_is_the_set(root, tmp_path):
    copy_set(root / "set", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(root / "set")
    with refused("not empty"):
        copy_set(root / "set", tmp_path / "copy")
    assert (tmp_path / "copy" / "a" / WEIGHTS).stat().st_size
    assert not os.path.exists(tmp_path / "copy.tmp")


# Outputs that are, or hold, files of the set or of other origin.


@pytest.mark.parametrize("command", ["export", "merge", "link"])
def test_a_file_of_the_set_is_not_written_over(mine, tmp_path, command):
    before = contents(mine)
    output = mine / "a" / WEIGHTS
    if command == "link":
        output = tmp_path / "link.safetensors"
        output.symlink_to(mine / "a" / WEIGHTS)
    words = ("export", mine, "a", "--format", "diffusers") if command == "export" else ("merge", mine)
    assert "file of the set" in complaint("set", *words, "--output", output, "--overwrite")
    assert contents(mine) == before


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_adapters_may_be_exported_into_the_set_itself(mine, form):
    before = contents(mine)
    run("set", "export", mine, "--format", form, "--output", mine, "--overwrite")
    after = contents(mine)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3 * (2 if form == "peft" else 1)
    assert load_set(mine).names == ["a", "b", "c"]


def test_exporting_over_a_folder_replaces_peft_files_alone(mine, tmp_path):
    output = tmp_path / "out"
    run("set", "export", mine, "a", "--format", "peft", "--output", output)
    expected = contents(output)
    (output / "adapter_model.safetensors").write_text("broken")
    (output / "notes.md").write_text("mine")
    assert "--overwrite" in complaint("set", "export", mine, "a", "--format", "peft", "--output", output)
    run("set", "export", mine, "a", "--format", "peft", "--output", output, "--overwrite")
    assert contents(output) == expected | {"notes.md": b"mine"}
    (output / "adapter_config.json").unlink()  # no longer an adapter of peft's: its weights are somebody's
    line = complaint("set", "export", mine, "a", "--format", "peft", "--output", output, "--overwrite")
    assert "adapter_model.safetensors" in line


@pytest.mark.parametrize("output", ["file", "file/x.safetensors", "folder.safetensors"])
def test_an_output_that_cannot_be_a_file_is_one_line(mine, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    if output != "file":
        assert output.partition("/")[0] in complaint("set", "merge", mine, "--output", tmp_path / output, "--overwrite")
    assert "file" in complaint("set", "export", mine, "--format", "peft", "--output", tmp_path / "file", "--overwrite")
    assert (tmp_path / "file").read_text() == "mine"


def test_of_several_adapters_all_are_exported_or_none(mine, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    sizes = sorted(file.stat().st_size for file in mine.rglob("*.safetensors"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] // 2, limits[1]))
    try:
        assert str(output) in complaint("set", "export", mine, "--format", "diffusers", "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(output.iterdir()) == []
