"""The command line, in this process: what it writes, what it says, and what it leaves alone."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.manifest import MANIFEST
from stepfuse.scripts.cli.main import main
from tests.fixtures_tiny import generators, save_adapter, save_stable_diffusion

PROMPTS = ["a red apple on a blue background", "a fox on a green background"]
REFERENCE = ("--reference_eta", 0.5)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = save_stable_diffusion(root / "base")
    for seed, (name, eta) in enumerate({"bright": 0.3, "small": 0.8}.items()):
        save_adapter(root / name, base, name, alpha=40, seed=seed, variance=EtaSchedule(eta=eta), beta=0.1 * 4**seed)
    save_adapter(root / "full", base, "full", guidance="full")
    return root


@pytest.fixture(scope="module")
def set_folder(adapters, tmp_path_factory):
    output = tmp_path_factory.mktemp("sets") / "set"
    run("set", "create", output, "--adapter", adapters / "bright", "--adapter", adapters / "small", *REFERENCE)
    return output


@pytest.fixture(scope="module")
def sampler(set_folder):
    return FusedSampler.from_pretrained(set_folder)


def run(*arguments):
    main([str(argument) for argument in arguments])


def error_of(*arguments):
    """The one line that a failing command ends in; Python prints it to stderr and exits with 1."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert re.fullmatch(r"error: [^\n]+", stop.value.code)
    return stop.value.code


def array(image):
    return np.asarray(image.convert("RGB"), dtype=int)


def places(sheet, cell):
    """Where on the sheet the cell lies, (left, top)."""
    height, width = cell.shape[:2]
    candidates = [
        (x, y)
        for y, x in np.argwhere((sheet == cell[0, 0]).all(-1))
        if y + height <= len(sheet) and x + width <= sheet.shape[1] and (sheet[y, x : x + width] == cell[0]).all()
    ]
    return [(int(x), int(y)) for x, y in candidates if (sheet[y : y + height, x : x + width] == cell).all()]


# Sets.


def test_set_create_gathers_adapters(adapters, tmp_path, capsys):
    output = tmp_path / "new" / "set"
    run("set", "create", output, "--adapter", adapters / "small", "--adapter", adapters / "bright", *REFERENCE)
    assert capsys.readouterr().out == f"{output}: small, bright\n"
    created = load_set(output)
    assert created.names == ["small", "bright"]
    assert created.base_schedule == EtaSchedule(eta=0.5)


def test_set_create_keeps_a_folder_that_is_not_empty(adapters, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    command = ("set", "create", tmp_path / "set", "--adapter", adapters / "small")
    message = error_of(*command)
    assert str(tmp_path / "set") in message
    assert "--overwrite" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine.txt"]
    run(*command, "--overwrite")
    assert load_set(tmp_path / "set").names == ["small"]


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--adapter", "small", "--adapter", "small"], "'small'"),
        (["--adapter", "small", "--adapter", "full"], "full 3"),
        (["--adapter", "missing"], "missing"),
        (["--adapter", "small", "--reference_eta", "7"], "7"),
    ],
    ids=str,
)
def test_set_create_names_what_is_wrong_and_writes_nothing(adapters, tmp_path, monkeypatch, options, culprit):
    monkeypatch.chdir(adapters)
    assert culprit in error_of("set", "create", tmp_path / "set", *options)
    assert list(tmp_path.iterdir()) == []


def test_set_create_interrupted_leaves_nothing(adapters, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(SystemExit, match=r"^130$"):
        run("set", "create", tmp_path / "set", "--adapter", adapters / "small")
    assert list(tmp_path.iterdir()) == []


def test_set_validate_checks_every_file(set_folder, tmp_path, capsys):
    copy = shutil.copytree(set_folder, tmp_path / "set")
    run("set", "validate", copy)
    assert re.match(rf"{copy}: valid; 2 adapters of base '.+'\n", capsys.readouterr().out)
    run("set", "validate", copy, "--load")
    assert "valid" in capsys.readouterr().out
    file = copy / "small" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in error_of("set", "validate", copy)
    assert MANIFEST in error_of("set", "validate", tmp_path)


def test_set_validate_with_load_finds_that_the_base_is_gone(set_folder, tmp_path):
    copy = shutil.copytree(set_folder, tmp_path / "set")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["base"]["name_or_path"] = str(tmp_path / "gone")
    (copy / MANIFEST).write_text(json.dumps(manifest))
    run("set", "validate", copy)
    assert str(tmp_path / "gone") in error_of("set", "validate", copy, "--load")


def test_set_show_prints_what_a_set_holds(adapters, set_folder, capsys):
    run("set", "show", set_folder)
    head, *objectives = capsys.readouterr().out.removesuffix("\n").split("\n\n")
    assert re.search(rf"base +{adapters}/base\n", head)
    assert re.search(r"guidance +shared 3\n", head)
    assert re.search(r"steps +3\n", head)
    assert re.search(r'reference +{"kind": "eta", "eta": 0.5}', head)
    for text, name, eta, beta in zip(objectives, ("bright", "small"), (0.3, 0.8), (0.1, 0.4), strict=True):
        assert re.match(rf"{name} +\(default weight 0.5\)", text)
        assert re.search(rf"reward +reward_of_{name}\n", text)
        assert re.search(rf'variance +{{"kind": "eta", "eta": {eta}}}\n', text)
        assert re.search(rf"beta +{beta}\n +rank +2\n +licence +not stated\Z", text)


# Samples.


def test_one_image_is_what_the_sampler_draws(set_folder, sampler, tmp_path, capsys):
    output = tmp_path / "new" / "one.png"
    run(
        *("sample", set_folder, "--weights", "bright=0.7,small=0.3", "--prompt", PROMPTS[0], "--seed", 5),
        *("--strength", 0.8, "--weights_on", "rewards", "--steps", 2, "--negative_prompt", "a dog"),
        *("--height", 24, "--width", 20, "--device", "cpu", "--output", output),
    )
    assert capsys.readouterr().out == f"{output}\n"
    (expected,) = sampler.sample(
        PROMPTS[0],
        {"bright": 0.7, "small": 0.3},
        strength=0.8,
        weights_on="rewards",
        num_inference_steps=2,
        generator=generators(5),
        negative_prompt="a dog",
        height=24,
        width=20,
        progress=False,
    )
    with Image.open(output) as image:
        assert (image.format, image.size) == ("PNG", (20, 24))
        assert (array(image) == array(expected)).all()


def test_a_weight_below_0_is_drawn_with_a_word_about_it(set_folder, tmp_path, capsys):
    run(
        *("sample", set_folder, "--weights", "bright=1.1,small=-0.1", "--prompt", PROMPTS[0], "--rule", "soup"),
        *("--steps", 2, "--output", tmp_path / "one.png"),
    )
    told = "The weight of small is below 0, which no adapter was trained for: images may become empty or noise.\n"
    assert told in capsys.readouterr().err


def test_a_grid_holds_a_row_a_prompt_and_a_column_a_set_of_weights(set_folder, sampler, tmp_path):
    output = tmp_path / "grid.png"
    run(
        *("sample", set_folder, "--weights", "bright=1", "--weights", "small=1", "--device", "cpu"),
        *("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--seed", 7, "--output", output),
    )
    expected = sampler.sample(
        [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]],
        [{"bright": 1}, {"small": 1}] * 2,
        generator=generators(7, 7, 8, 8),
        progress=False,
    )
    with Image.open(output) as image:
        assert image.format == "PNG"
        sheet = array(image)
    found = []
    for image in expected:  # each pixel a square: cells have 128 pixels a side, the least there are
        times = 128 // image.width
        (place,) = places(sheet, array(image).repeat(times, 0).repeat(times, 1))
        found.append(place)
    (left, top), (right, _), (_, bottom), _ = found
    assert found == [(left, top), (right, top), (left, bottom), (right, bottom)]
    assert right >= left + 128
    assert bottom >= top + 128
    # Labels are dark: beside each row, above each column.
    for label in (sheet[:top, left : left + 128], sheet[:top, right : right + 128]):
        assert label.min() < 64
    for label in (sheet[top : top + 128, :left], sheet[bottom : bottom + 128, :left]):
        assert label.min() < 64


def test_the_same_command_draws_the_same_picture(set_folder, tmp_path):
    for name in ("first.png", "second.png"):
        run("sample", set_folder, "--prompt", PROMPTS[0], "--device", "cpu", "--output", tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_a_picture_that_is_there_is_kept_unless_overwritten(set_folder, tmp_path):
    output = tmp_path / "one.png"
    output.write_text("precious")
    command = ("sample", set_folder, "--prompt", PROMPTS[0], "--steps", 1, "--device", "cpu", "--output", output)
    message = error_of(*command)
    assert str(output) in message
    assert "--overwrite" in message
    assert output.read_text() == "precious"
    run(*command, "--overwrite")
    with Image.open(output) as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--weights", "shiny=1"], "'shiny'"),
        (["--weights", "bright"], "'bright'"),
        (["--weights", "bright=0"], "bright=0"),
        (["--weights", "small=1", "--strength", "1.7"], "largest valid strength"),
        (["--strength", "-1"], "-1"),
        (["--height", "18"], "18"),
        (["--height", "0"], "height"),
        (["--steps", "0"], "0"),
        (["--batch_size", "0"], "batch_size 0"),
        (["--rule", "average"], "'average'"),
        (["--gate", "0.5"], "stepfuse set profile"),
        (["--gate", "-0.5"], "gate -0.5"),
        (["--rule", "soup", "--gate", "0.5"], "'gate'"),
        (["--guidance_interval", "0.5"], "'0.5'"),
        (["--guidance_interval", "0.8-0.2"], "0.8-0.2"),
        (["--rows_at_once", "0"], "rows_at_once 0"),
        (["--forwards", "separate", "--compile", "regional"], "batched"),
        (["--mode", "reduce-overhead"], "--compile"),
        (["--compile", "regional", "--mode", "reduce-overhead"], "GPU"),
        (["--batch_invariant", "--rule", "code"], "batch_invariant"),
        (["--prompt", " "], "prompt"),
        (["--device", "abacus"], "abacus"),
        (["--output", "picture"], "picture"),
        (["--output", "picture.xyz"], ".xyz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sample_names_what_is_wrong_and_writes_nothing(set_folder, tmp_path, monkeypatch, options, culprit):
    monkeypatch.chdir(tmp_path)
    assert culprit in error_of("sample", set_folder, "--prompt", PROMPTS[0], "--device", "cpu", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --config dpo/emoji-joint", "python -m stepfuse.train.dpo"),
        ("sample emoji --num_inference_steps 5", "did you mean '--steps'?"),
        ("sample --set emoji", "unknown flag --set; the set is an argument without a flag"),
        (
            "sample emoji --prompt a --weights a=1 b=1",
            "unexpected argument 'b=1'; values of one option are joined by commas",
        ),
    ],
)
def test_habits_of_other_programs_are_answered(capsys, words, told):
    with pytest.raises(SystemExit) as error:
        main(words.split())
    assert error.value.code == 2
    assert told in capsys.readouterr().err


def test_a_profiled_set_is_sampled_with_a_gate(set_folder, tmp_path, capsys):
    """The profile is measured, told and kept; with a gate above every gap the pictures are the soup's."""
    profiled = tmp_path / "set"
    shutil.copytree(set_folder, profiled)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run("set", "profile", profiled, "--prompts", tmp_path / "prompts.txt", "--device", "cpu")
    told = capsys.readouterr().out
    (profile,) = load_set(profiled).profiles
    assert profile.images == len(PROMPTS)
    assert profile.mixtures == ({"bright": 0.5, "small": 0.5},)
    assert told.startswith("KL( product ‖ soup ) at each of 3 steps, guidance shared 3, in nats, means of 2 images")
    run("set", "show", profiled)
    assert told.strip() in capsys.readouterr().out
    pictures = []
    for number, options in enumerate([[], ["--gate", 0], ["--gate", 2 * max(profile.gaps[0])]]):
        file = tmp_path / f"{number}.png"
        run("sample", profiled, "--prompt", PROMPTS[0], "--device", "cpu", "--output", file, *options)
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_sampling_options_of_speed_change_no_picture(set_folder, tmp_path):
    pictures = []
    for number, options in enumerate(
        [[], ["--forwards", "separate"], ["--rows_at_once", 2], ["--guidance_interval", "0-1"]]
    ):
        file = tmp_path / f"{number}.png"
        run("sample", set_folder, "--prompt", PROMPTS[0], "--device", "cpu", "--output", file, *options)
        with Image.open(file) as image:
            pictures.append(array(image))
    assert all(np.abs(picture - pictures[0]).max() <= 1 for picture in pictures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_named(set_folder, tmp_path):
    output = tmp_path / "one.png"
    assert "cuda" in error_of("sample", set_folder, "--prompt", PROMPTS[0], "--device", "cuda", "--output", output)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_not_hold_a_picture_is_named_before_any_is_drawn(set_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    drawn = []
    monkeypatch.setattr(FusedSampler, "sample", lambda *_, **__: drawn.append(1) or [Image.new("RGB", (16, 16))])
    command = ("sample", set_folder, "--prompt", PROMPTS[0], "--device", "cpu", "--overwrite", "--output")
    for place in ("file/one.png", "folder", "one.xyz"):
        assert str(tmp_path / place.split("/")[0]) in error_of(*command, tmp_path / place)
    assert not drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_sampling_leaves_the_global_generator_alone(set_folder, tmp_path):
    before = torch.get_rng_state()
    run("sample", set_folder, "--prompt", PROMPTS[0], "--device", "cpu", "--output", tmp_path / "one.png")
    assert torch.equal(torch.get_rng_state(), before)
