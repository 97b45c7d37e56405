"""Sets made of adapters: whole or not at all, and half the size where that is wanted."""

import json
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stepfuse.data.file_info import file_hash
from stepfuse.data.folder_swap import WORK
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import write_card
from stepfuse.fuse.sets.create import add_adapter, copy_set, create_set
from stepfuse.fuse.sets.manifest import MANIFEST, OBJECTIVE
from stepfuse.scripts.cli.main import main
from tests.fixtures_tiny import refused


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("folders", "culprits"),
    [
        ([], ["at least one adapter"]),
        (["a", "a"], ["two adapters", "'a'"]),
        (["a", "b", "a"], ["two adapters", "'a'"]),
        (["a", "of-second"], ["'c'", "base"]),
        (["a", "of-wider"], ["'c'", "base"]),
        (["a", "full"], ["'c'", "full 3", "'a'", "shared 3"]),
        (["a", "scale"], ["'c'", "shared 7", "'a'", "shared 3"]),
        (["a", "none"], ["none", OBJECTIVE]),
    ],
    ids=str,
)
def test_adapters_that_make_no_set_are_named_and_nothing_is_written(adapters, tmp_path, folders, culprits):
    with refused(*culprits):
        create_set(tmp_path / "set", [adapters / folder for folder in folders])
    assert list(tmp_path.iterdir()) == [adapters]


def test_a_broken_adapter_leaves_an_old_set_as_it_was(adapters, adapter_set):
    before = contents(adapter_set)
    (adapters / "b" / WEIGHTS).write_bytes(b"")
    with refused(str(adapters / "b" / WEIGHTS)):
        create_set(adapter_set, [adapters / "a", adapters / "b"], overwrite=True)
    assert contents(adapter_set) == before


def test_a_folder_that_is_not_empty_is_kept_unless_overwritten(adapters, tmp_path):
    output = tmp_path / "set"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with refused(str(output), "--overwrite"):
        create_set(output, [adapters / "a"])
    assert contents(output) == {"mine.txt": b"precious"}
    create_set(output, [adapters / "a"], overwrite=True)
    assert sorted(contents(output)) == sorted(["mine.txt", MANIFEST, f"a/{WEIGHTS}"])
    assert (output / "mine.txt").read_text() == "precious"


def test_an_empty_folder_is_taken(adapters, tmp_path):
    (tmp_path / "set").mkdir()
    assert create_set(tmp_path / "set", [adapters / "b"]).names == ["b"]


def test_a_set_may_be_made_anew_of_its_own_adapters(adapters, adapter_set):
    create_set(adapter_set, [adapter_set / "b", adapters / "a"], overwrite=True)
    assert load_set(adapter_set).names == ["b", "a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_kept(adapters, tmp_path, overwrite):
    (tmp_path / "set").write_text("precious")
    with refused(str(tmp_path / "set")):
        create_set(tmp_path / "set", [adapters / "a"], overwrite=overwrite)
    assert (tmp_path / "set").read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [adapters, tmp_path / "set"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("existing", [False, True])
def test_a_creation_that_fails_half_way_leaves_everything_as_it_was(adapters, tmp_path, monkeypatch, error, existing):
    output = tmp_path / "set"
    if existing:
        create_set(output, [adapters / "b"])
    before = contents(tmp_path)
    copied = []

    def copy(source, target, **options):
        if copied:
            raise error
        copied.append(target)
        return original(source, target, **options)

    original = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(ValueError if isinstance(error, OSError) else KeyboardInterrupt):
        create_set(output, [adapters / "a", adapters / "b"], overwrite=True)
    assert len(copied) == 1
    assert contents(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == sorted([adapters] + [output] * existing)


# Of and over itself, and over files of other origin.


def test_overwriting_replaces_the_files_of_the_set_and_keeps_all_others(adapters, adapter_set):
    foreign = {"notes.md": b"mine", "b/mine.txt": b"mine", ".git/HEAD": b"ref"}
    for name, content in foreign.items():
        (adapter_set / name).parent.mkdir(exist_ok=True)
        (adapter_set / name).write_bytes(content)
    (adapter_set / "strip.png").write_bytes(b"of the old set")
    create_set(adapter_set, [adapters / "a"], overwrite=True)
    assert contents(adapter_set).keys() == {MANIFEST, f"a/{WEIGHTS}", *foreign}
    assert contents(adapter_set).items() >= foreign.items()


@pytest.mark.parametrize("name", ["README.md", f"c/{WEIGHTS}"])
def test_files_of_other_origin_are_not_taken_for_those_of_a_set(adapters, adapter_set, name):
    """A README.md that is no card, and weights that the manifest does not list."""
    (adapter_set / name).parent.mkdir(exist_ok=True)
    (adapter_set / name).write_text("mine")
    create_set(adapter_set, [adapters / "a"], overwrite=True)
    assert (adapter_set / name).read_text() == "mine"
    if name == "README.md":
        with refused("README.md"):
            write_card(adapter_set, load_set(adapter_set))
    else:
        before = contents(adapter_set)
        shutil.copytree(adapters / "of-second", adapters / "c")
        with refused(name):
            create_set(adapter_set, [adapters / "c"], overwrite=True)
        assert contents(adapter_set) == before


def test_a_file_that_no_set_may_hold_is_named_before_the_set_is_replaced(adapters, adapter_set):
    (adapter_set / "mine.bin").write_text("mine")
    before = contents(adapter_set)
    with refused("mine.bin"):
        create_set(adapter_set, [adapters / "a"], overwrite=True)
    assert contents(adapter_set) == before


def test_a_set_may_be_copied_onto_itself(adapter_set):
    write_card(adapter_set, load_set(adapter_set))
    before = contents(adapter_set)
    copy_set(adapter_set, adapter_set, overwrite=True)
    assert contents(adapter_set) == before


def test_a_set_that_is_broken_can_be_overwritten(adapters, adapter_set):
    (adapter_set / MANIFEST).write_text("{")
    create_set(adapter_set, [adapters / "a"], overwrite=True)
    assert contents(adapter_set).keys() == {MANIFEST, f"a/{WEIGHTS}"}


@pytest.mark.parametrize("kind", ["link", "dot", "dots"])
def test_a_set_is_written_where_a_path_leads(adapters, tmp_path, monkeypatch, kind):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    output = {"link": tmp_path / "link", "dot": ".", "dots": "../link/../real"}[kind]
    for name in ("a", "b"):
        create_set(output, [adapters / name], overwrite=True)
        assert load_set(tmp_path / "real").names == [name]
    assert (tmp_path / "link").is_symlink()


def test_a_set_whose_replacement_was_cut_off_is_completed_when_it_is_loaded(adapters, adapter_set, tmp_path):
    """As `kill -9` leaves it: the old manifest moved out, nothing moved in."""
    create_set(tmp_path / "next", [adapters / "a"])
    work, new = adapter_set / WORK, [MANIFEST, f"a/{WEIGHTS}"]
    shutil.copytree(tmp_path / "next", work / "new")
    (work / "old").mkdir()
    old = [*new, f"b/{WEIGHTS}"]
    (work / "plan.json").write_text(json.dumps({"old": old, "new": new}))
    (adapter_set / MANIFEST).rename(work / "old" / MANIFEST)
    assert load_set(adapter_set).names == ["a"]
    assert contents(adapter_set) == contents(tmp_path / "next")


def test_an_adapter_that_cannot_be_added_leaves_the_set_as_it_was(adapters, tmp_path):
    create_set(tmp_path / "set", [adapters / "a"])
    before = contents(tmp_path / "set")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((adapters / "b" / WEIGHTS).stat().st_size - 1, limits[1]))
    try:
        with refused(str(tmp_path / "set")):
            add_adapter(tmp_path / "set", adapters / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "set") == before
    assert add_adapter(tmp_path / "set", adapters / "b").names == ["a", "b"]


# Half the size.


def test_a_set_in_half_precision_holds_the_weights_rounded_and_its_own_hashes(adapters, tmp_path):
    whole = create_set(tmp_path / "whole", [adapters / "a", adapters / "b"])
    half = create_set(tmp_path / "half", [adapters / "a", adapters / "b"], half=True)
    assert half.objectives == whole.objectives
    for name in ("a", "b"):
        files = [folder / name / WEIGHTS for folder in (tmp_path / "whole", tmp_path / "half")]
        full, rounded = map(load_file, files)
        assert full.keys() == rounded.keys()
        assert all(torch.equal(rounded[key], full[key].half()) for key in full)
        entries = json.loads((tmp_path / "half" / MANIFEST).read_text())["adapters"]
        (entry,) = (entry for entry in entries if entry["name"] == name)
        assert entry["weights"]["sha256"] == file_hash(files[1]) != file_hash(files[0])
        assert entry["weights"]["bytes"] == files[1].stat().st_size
        with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as other:
            assert one.metadata() == other.metadata()


def test_a_set_in_half_precision_is_drawn_with_in_full(adapters, tmp_path):
    pictures = []
    for half in (False, True):
        create_set(tmp_path / f"half-{half}", [adapters / "a"], half=half)
        sampler = FusedSampler.from_pretrained(tmp_path / f"half-{half}")
        generator = torch.Generator().manual_seed(0)
        pictures.append(sampler.sample("a fox", {"a": 1.0}, generator=generator, output_type="pt"))
    assert pictures[1].dtype == torch.float32
    difference = (pictures[0] - pictures[1]).abs().max().item()
    assert 0 < difference < 0.01  # weights of about 0.1 are rounded by 3e-5 at most


def test_a_set_may_be_guided_otherwise_than_its_adapters_were_trained(adapters, tmp_path, capsys):
    created = create_set(tmp_path / "set", [adapters / "a"], guidance="full", guidance_scale=2.0)
    assert (created.guidance, created.guidance_scale) == ("full", 2.0)
    assert created.describe_guidance() == "full 2; adapters trained with shared 3"
    assert str(FusedSampler.from_pretrained(created).denoiser.guidance) == "full 2"
    added = add_adapter(tmp_path / "set", adapters / "b")  # trained as the first was
    assert (added.guidance, added.guidance_scale, added.names) == ("full", 2.0, ["a", "b"])
    with refused("'c'", "shared 7", "'a' with shared 3"):
        add_adapter(tmp_path / "set", adapters / "scale")
    write_card(tmp_path / "set", load_set(tmp_path / "set"))
    assert "Guidance is full 2; adapters trained with shared 3;" in (tmp_path / "set" / "README.md").read_text()


def test_guidance_needs_a_scale_where_training_had_none(adapters, tmp_path):
    change(tmp_path / "off", adapters / "a", guidance="off")
    with refused("guidance shared needs guidance_scale", "'a'"):
        create_set(tmp_path / "set", [tmp_path / "off"], guidance="shared")
    assert not (tmp_path / "set").exists()
    assert create_set(tmp_path / "set", [tmp_path / "off"], guidance="shared", guidance_scale=2.0).guidance == "shared"
    assert create_set(tmp_path / "plain", [tmp_path / "off"]).describe_guidance() == "off"
    with refused("guidance embedded, but the network of base", "does not take the guidance scale"):
        create_set(tmp_path / "other", [tmp_path / "off"], guidance="embedded", guidance_scale=2.0)
    with refused("guidance_scale 4.5 and guidance off"):
        create_set(tmp_path / "other", [tmp_path / "off"], guidance_scale=4.5)


def test_a_set_has_the_resolution_that_all_of_its_adapters_were_trained_at(adapters, tmp_path, capsys):
    for name, resolution in (("a", 8), ("b", 8), ("c", 12)):
        source = adapters / ("b" if name == "c" else name)
        base = json.loads((source / OBJECTIVE).read_text())["base"]
        change(tmp_path / name, source, name=name, base=base | {"resolution": resolution})
    created = create_set(tmp_path / "set", [tmp_path / "a", tmp_path / "b"])
    assert created.base["resolution"] == 8
    (image,) = FusedSampler.from_pretrained(created).sample("a cat", num_inference_steps=1, progress=False)
    assert image.size == (8, 8)
    write_card(tmp_path / "set", created)
    assert "8 × 8 pixels" in (tmp_path / "set" / "README.md").read_text()
    main(["set", "show", str(tmp_path / "set")])
    assert "resolution  8\n" in capsys.readouterr().out
    assert "resolution" not in create_set(tmp_path / "mixed", [tmp_path / "a", tmp_path / "c"]).base


def test_a_pipeline_takes_over_what_a_set_records_and_keeps_the_rest(adapters, tmp_path):
    pipeline = load_pipeline(base_of(adapters), resolution=8)
    sampler = FusedSampler.from_pretrained(create_set(tmp_path / "set", [adapters / "a"]), pipeline=pipeline)
    assert sampler.backbone.size() == (8, 8)
    with refused("resolution 9 is not one of this base", "height is 9"):
        load_pipeline(base_of(adapters), resolution=9)


def base_of(adapters):
    return json.loads((adapters / "a" / OBJECTIVE).read_text())["base"]["name_or_path"]


def change(folder, source, **values):
    """A copy of an adapter whose objective.json has other values."""
    file = shutil.copytree(source, folder) / OBJECTIVE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
